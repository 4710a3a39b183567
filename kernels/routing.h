// Rows of routed copies: from tokens to the order in which they are sent, and back.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/matrix.h"

namespace mop::kernels {

// Copies [first_in_order, + rows) of the order are rows [at, + rows) of what is sent. Flows of one launch:
// ascending in `at`, without gaps, from 0 on.
struct Flow {
  int32_t first_in_order = 0, rows = 0, at = 0;
};
inline constexpr int kMostFlows = 1024;  // of one launch; launchers take any number and launch several times

// What is sent in a round. order (n k): routed copies, token x k + choice. Flows are in host memory, read
// before the launcher returns.
struct SentRows {
  const Flow* flows = nullptr;
  int64_t flow_count = 0;
  const int32_t* order = nullptr;
  int64_t choices = 0;  // k
};

// x(n, h) -> to_x(R, h), [dy -> to_dy], [weights(n, k), contiguous fp32 -> to_weights(R)]; x and to_x of one
// type, dy and to_dy as well.
struct PermuteArgs {
  SentRows sent;
  ConstMatrix x, dy;
  const float* weights = nullptr;
  Matrix to_x, to_dy;
  float* to_weights = nullptr;
};
void permute(const PermuteArgs& args, cudaStream_t stream);

// y(n, h) fp32 += weight x row for the rows(R, h) of its copies in the round, in the order of their choices.
// weights (n, k), contiguous; scratch: unpermute_scratch bytes.
struct UnpermuteArgs {
  SentRows sent;
  ConstMatrix rows;
  const float* weights = nullptr;
  Matrix y;
  int32_t* scratch = nullptr;
};
void unpermute(const UnpermuteArgs& args, cudaStream_t stream);

// dx(n, h) fp32 += row; d_weights(n, k) = row_d_weights(R) for the copies in the round
struct UnpermuteBwdArgs {
  SentRows sent;
  ConstMatrix rows;
  const float* row_d_weights = nullptr;
  Matrix dx;
  float* d_weights = nullptr;
  int32_t* scratch = nullptr;
};
void unpermute_bwd(const UnpermuteBwdArgs& args, cudaStream_t stream);

int64_t unpermute_scratch(int64_t tokens, int64_t choices);

}  // namespace mop::kernels
