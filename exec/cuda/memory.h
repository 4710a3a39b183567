// Memory of the GPU, and host memory that its copy engines read and write.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace mop::cuda {

struct DeviceFree {
  void operator()(std::byte* p) const { cudaFree(p); }
};
struct PinnedFree {
  void operator()(std::byte* p) const { cudaFreeHost(p); }
};
using DeviceBytes = std::unique_ptr<std::byte, DeviceFree>;
using PinnedBytes = std::unique_ptr<std::byte, PinnedFree>;
// Errors of all: UserError when there is not enough, with how much is.
DeviceBytes device_bytes(int64_t bytes, const char* what);
PinnedBytes pinned_bytes(int64_t bytes, const char* what);

// A large pinned piece, zeroed: in huge pages where the kernel has them (pinning a page at a time takes
// minutes for hundreds of GB), on the NUMA node of the cores that this process may run on.
class PinnedSlab {
 public:
  explicit PinnedSlab(int64_t bytes);
  ~PinnedSlab();
  PinnedSlab(const PinnedSlab&) = delete;
  PinnedSlab& operator=(const PinnedSlab&) = delete;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Before anything is allocated: whether this host can give `bytes` to each of `processes`. Returns a warning,
// empty for none, where the host's memory grows as it is used and cannot be known. Errors: UserError with the
// numbers.
std::string check_host_memory(int64_t bytes, int processes);

}  // namespace mop::cuda
