// Errors of CUDA and its libraries.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace mop::kernels {

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw CudaError(std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// After the launch of a kernel.
inline void check_launch(const char* what) {
  check(cudaGetLastError(), what);
}

}  // namespace mop::kernels
