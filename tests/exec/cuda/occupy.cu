#include "kernels/check.h"
#include "tests/exec/cuda/occupy.h"

namespace mop::cuda::testing {
namespace {

constexpr int kThreads = 1024, kBlocks = 2, kWaves = 3;  // blocks of a multiprocessor at a time

__device__ long long now() {
  long long nanoseconds = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

__global__ void __launch_bounds__(kThreads, kBlocks) wait(long long nanoseconds) {
  const long long begin = now();
  while (now() - begin < nanoseconds) {
  }
}

}  // namespace

void occupy(std::chrono::nanoseconds time, cudaStream_t stream) {
  int device = 0, processors = 0;
  kernels::check(cudaGetDevice(&device), "the GPU");
  kernels::check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
                 "multiprocessors");
  wait<<<static_cast<unsigned>(processors * kBlocks * kWaves), kThreads, 0, stream>>>(time.count());
  kernels::check_launch("a kernel that leaves no room");
}

}  // namespace mop::cuda::testing
