// The second stage of sums over rows: `parts` rows of partial sums, added up in a fixed order.
#pragma once
#include "kernels/device.cuh"

namespace mop::kernels {

// out(cols) (+)= sum of the rows of partials(parts, cols)
void sum_partials(const float* partials, int64_t parts, int64_t cols, void* out, Type type, bool accumulate,
                  cudaStream_t stream);

// The same for the block's 32 columns; a block has 32 x 32 threads and all of them call it.
__device__ inline void sum_partial_columns(const float* partials, int64_t parts, int64_t cols, void* out,
                                           Type type, bool accumulate) {
  __shared__ double sums[32][33];
  const int64_t col = int64_t{blockIdx.x} * 32 + threadIdx.x;
  double sum = 0;
  if (col < cols) {
#pragma unroll 8
    for (int64_t part = threadIdx.y; part < parts; part += 32) sum += partials[part * cols + col];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  sum = 0;
  for (int i = 0; i < 32; ++i) sum += sums[i][threadIdx.x];
  if (accumulate) sum += load1(out, type, col);
  store1(out, type, col, static_cast<float>(sum));
}

}  // namespace mop::kernels
