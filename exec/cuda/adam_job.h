// A CPU update that a CUDA stream runs in its turn.
#pragma once
#include <cstdint>
#include <vector>

#include "exec/cuda/rank.h"
#include "exec/interpreter/step.h"

namespace mop::cuda {

struct Rank::AdamJob {
  AdamJob() : factor(pinned_bytes(sizeof(float), "a clip factor")) { pairs.reserve(2); }

  struct Pair {
    const std::byte* gradient;
    program::Type gradient_type;
    std::byte* weights;
    program::Type weights_type;
    int64_t first, n;  // elements of the states
  };
  float* states = nullptr;
  int64_t bucket = 0;
  bool master = true, clipped = false;
  std::vector<Pair> pairs;
  interpreter::AdamW adam;
  PinnedBytes factor;

  void run() const;  // on all cores of the process; no CUDA inside
};

}  // namespace mop::cuda
