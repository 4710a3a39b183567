#include "kernels/partials.cuh"

namespace mop::kernels {
namespace {

__global__ void __launch_bounds__(1024)
    sum_partials_kernel(const float* partials, int64_t parts, int64_t cols, void* out, Type type,
                        bool accumulate) {
  sum_partial_columns(partials, parts, cols, out, type, accumulate);
}

}  // namespace

void sum_partials(const float* partials, int64_t parts, int64_t cols, void* out, Type type, bool accumulate,
                  cudaStream_t stream) {
  if (cols <= 0) return;
  sum_partials_kernel<<<static_cast<unsigned>(ceil_div(cols, 32)), dim3(32, 32), 0, stream>>>(
      partials, parts, cols, out, type, accumulate);
  check_launch("sum_partials");
}

}  // namespace mop::kernels
