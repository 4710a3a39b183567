// Copies between ordinary host memory and a GPU at the speed of the link: the driver's own way, through one
// small pinned buffer and one core, takes ten seconds for a full model's weights and states.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "exec/cuda/memory.h"

namespace mop::cuda {

class Staging {
 public:
  Staging();  // for the current device
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Either may be of the host or of the GPU. All that was launched before comes first; returns when the bytes
  // are there.
  void copy(std::byte* to, const std::byte* from, int64_t bytes);

 private:
  void up(std::byte* to, const std::byte* from, int64_t bytes);
  void down(std::byte* to, const std::byte* from, int64_t bytes);
  std::byte* half(int64_t chunk) const;

  PinnedBytes pinned_;  // two halves: one travels, one is filled or emptied
  cudaStream_t stream_ = nullptr;
  std::array<cudaEvent_t, 2> travelled_{};
};

}  // namespace mop::cuda
