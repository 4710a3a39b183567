// AdamW with decoupled weight decay over fp32 states.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/type.h"

namespace mop::kernels {

// Where the fp32 master is: among the states; the weights are it (fp32); or weights are bf16 and the states
// have its low 16 bits, so that as integers master = weight x 2^16 + the low bits, signed. A master halfway
// between two bf16 numbers, which could be rounded either way, is moved by its last bit toward zero wherever
// weights are bf16.
enum class Master { states, weights, low };

// Elements [first, first + n) of the states, which are blocks of `bucket` elements each, [master |] m | v [|
// low bits]. m, v and master become those of the next step; weights (n) of `weights_type` a copy of the
// master. gradient (n) of `gradient_type`, times *factor if there is one; a factor that is not finite leaves
// everything as it is. With low bits, a bucket is even.
struct AdamArgs {
  float* states = nullptr;
  int64_t bucket = 0, first = 0, n = 0;
  Master master = Master::states;
  const void* gradient = nullptr;
  void* weights = nullptr;
  Type gradient_type = Type::bf16, weights_type = Type::bf16;
  const float* factor = nullptr;
  int64_t step = 1;  // counts from 1: bias corrections
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
};
void adam(const AdamArgs& args, cudaStream_t stream);

}  // namespace mop::kernels
