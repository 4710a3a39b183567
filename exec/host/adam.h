// AdamW on the CPU over fp32 states: one pass, as fast as memory is.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "exec/host/workers.h"
#include "exec/interpreter/step.h"
#include "sim/program/program.h"

namespace mop::host {

// A gradient and the weights that it moves: elements [first, first + n) of the states. Types: bf16 or f32.
struct AdamPair {
  const std::byte* gradient;
  program::Type gradient_type;
  std::byte* weights;
  program::Type weights_type;
  int64_t first, n;
};

// The states are blocks of `bucket` elements each, [master |] m | v. m, v and master become those of the next
// step, weights a copy of the master; without master the weights are it, and fp32. Gradients are multiplied
// by the factor; one that is not finite leaves everything as it is. bf16 is rounded to nearest, and its
// master never lies halfway between two (sim/program/master.h).
struct AdamArgs {
  float* states = nullptr;
  int64_t bucket = 0;
  bool master = true;
  std::span<const AdamPair> pairs;
  float factor = 1;
  interpreter::AdamW settings;
};

// The loop over the elements: they differ by rounding (only AVX-512 fuses products with sums).
enum class AdamPath : uint8_t { portable, avx512 };
const char* text(AdamPath path);
bool runs_here(AdamPath path);  // on this CPU
AdamPath adam_path();           // the fastest that does

// Splits the elements of all pairs, in their order, evenly over the workers. The results do not depend on how
// many there are. Errors: InternalError for arguments against the above.
void adam(const AdamArgs& args, Workers& workers, AdamPath path = adam_path());

}  // namespace mop::host
