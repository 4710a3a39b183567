// A kernel that leaves no other any room: every multiprocessor has as many threads as it can hold.
#pragma once
#include <cuda_runtime_api.h>

#include <chrono>

namespace mop::cuda::testing {

// Three times in a row, for so long each.
void occupy(std::chrono::nanoseconds time, cudaStream_t stream);

}  // namespace mop::cuda::testing
