// Elementwise work over (rows, packs of columns). An operation has `In load(row, col)` and
// `void store(row, col, In)` for the pack that starts there; a thread has several loads under way before it
// stores, so an output may be an input at the same place.
#pragma once
#include "kernels/device.cuh"

namespace mop::kernels {

template <int V, int Unroll, class Operation>
__global__ void __launch_bounds__(kThreads) map_kernel(Operation operation, int64_t rows, int64_t packs) {
  using In = decltype(operation.load(int64_t{}, int64_t{}));
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows;
       row += int64_t{gridDim.y} * blockDim.y) {
    for (int64_t pack = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; pack < packs; pack += Unroll * step) {
      In in[Unroll];
#pragma unroll
      for (int i = 0; i < Unroll; ++i)
        if (pack + i * step < packs) in[i] = operation.load(row, (pack + i * step) * V);
#pragma unroll
      for (int i = 0; i < Unroll; ++i)
        if (pack + i * step < packs) operation.store(row, (pack + i * step) * V, in[i]);
    }
  }
}

// V: elements of a pack; cols: a multiple of it.
template <int V, int Unroll, class Operation>
void map(const Operation& operation, int64_t rows, int64_t cols, cudaStream_t stream) {
  const int64_t packs = cols / V;
  if (rows <= 0 || packs <= 0) return;
  // Blocks divide a row evenly, or take several.
  const int64_t per_row = ceil_div(packs, Unroll), across = ceil_div(per_row, kThreads);
  const auto x = static_cast<unsigned>(ceil_div(per_row, across));
  const unsigned y = kThreads / x;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(across, 1 << 20)),
                  static_cast<unsigned>(std::min<int64_t>(ceil_div(rows, y), 65535)));
  map_kernel<V, Unroll><<<grid, dim3(x, y), 0, stream>>>(operation, rows, packs);
  check_launch("map");
}

}  // namespace mop::kernels
