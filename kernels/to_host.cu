#include <algorithm>

#include "kernels/check.h"
#include "kernels/to_host.h"

namespace mop::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void store_to_host(const uint32_t* from, uint32_t* to, int64_t words) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < words;
       i += int64_t{gridDim.x} * kThreads)
    to[i] = from[i];
}

}  // namespace

void to_host(const void* from, void* to, int64_t bytes, cudaStream_t stream) {
  const int64_t words = bytes / 4;
  if (words == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((words + kThreads - 1) / kThreads, 32));
  store_to_host<<<blocks, kThreads, 0, stream>>>(static_cast<const uint32_t*>(from),
                                                 static_cast<uint32_t*>(to), words);
  check_launch("to the host");
}

}  // namespace mop::kernels
