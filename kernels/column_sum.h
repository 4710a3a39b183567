// Sums over rows: the gradients of biases, in a fixed order.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/matrix.h"

namespace mop::kernels {

// x(r, n) -> sum(1, n), added to it with accumulate. scratch: column_sum_scratch(r, n, 1) bytes
struct ColumnSumArgs {
  ConstMatrix x;
  Matrix sum;
  bool accumulate = false;
  float* scratch = nullptr;
};
void column_sum(const ColumnSumArgs& args, cudaStream_t stream);

// d_biases[e] (n) = the sum of the rows experts[e] of dy(R, n), each times its weight if there are weights
// (R); added to it with accumulate. At most kMostExperts of them, in host memory; d_biases of `type`.
// scratch: column_sum_scratch(R, n, count) bytes
struct ExpertBiasBwdArgs {
  ConstMatrix dy;
  const float* weights = nullptr;
  const ExpertRows* experts = nullptr;
  void* const* d_biases = nullptr;
  int count = 0;
  Type type = Type::bf16;
  bool accumulate = false;
  float* scratch = nullptr;
};
void expert_bias_bwd(const ExpertBiasBwdArgs& args, cudaStream_t stream);

int64_t column_sum_scratch(int64_t rows, int64_t cols, int count);

}  // namespace mop::kernels
