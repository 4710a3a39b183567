// Root-mean-square normalisation: y = w x / sqrt(mean(x^2) + eps) over every `d` columns, d = w.cols.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/matrix.h"

namespace mop::kernels {

inline constexpr int64_t kWidestNorm = 16384;  // d

// x, w (1, d), [residual], y, [sum]: of one type. sum = x + residual, rounded to the type, is what is
// normalised. Outputs may be inputs.
struct RmsNormArgs {
  ConstMatrix x, w, residual;
  Matrix y, sum;
  float eps = 0;
};
void rms_norm(const RmsNormArgs& args, cudaStream_t stream);

// dx = gradient of x (+ d_sum), dw (1, d) (+)= the weight's. x, w, d_sum and dx are of one type; dy of that
// or fp32; dw of either. dx may be dy or d_sum. Sums have a fixed order.
struct RmsNormBwdArgs {
  ConstMatrix dy, x, w, d_sum;
  Matrix dx, dw;
  float eps = 0;
  bool accumulate = false;  // dw
  float* scratch = nullptr;
};
void rms_norm_bwd(const RmsNormBwdArgs& args, cudaStream_t stream);
int64_t rms_norm_bwd_scratch(int64_t rows, int64_t cols, int64_t d);  // bytes

}  // namespace mop::kernels
