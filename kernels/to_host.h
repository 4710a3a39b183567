// A few bytes to the host while the copy engines work on large copies: a small copy would wait for all of
// those.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace mop::kernels {

// bytes: a multiple of 4. from: device memory; to: pinned host memory. Both aligned to 4 bytes.
void to_host(const void* from, void* to, int64_t bytes, cudaStream_t stream);

}  // namespace mop::kernels
