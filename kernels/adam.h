// AdamW with decoupled weight decay over fp32 states.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/type.h"

namespace mop::kernels {

// Elements [first, first + n) of the states, which are blocks of `bucket` elements each, [master |] m | v. m,
// v and master become those of the next step; weights (n) of `weights_type` a copy of the master. Without
// master the weights are it, and fp32. gradient (n) of `gradient_type`, times *factor if there is one; a
// factor that is not finite leaves everything as it is.
struct AdamArgs {
  float* states = nullptr;
  int64_t bucket = 0, first = 0, n = 0;
  bool master = true;
  const void* gradient = nullptr;
  void* weights = nullptr;
  Type gradient_type = Type::bf16, weights_type = Type::bf16;
  const float* factor = nullptr;
  int64_t step = 1;  // counts from 1: bias corrections
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
};
void adam(const AdamArgs& args, cudaStream_t stream);

}  // namespace mop::kernels
