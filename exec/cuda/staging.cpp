#include "exec/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "exec/host/workers.h"
#include "kernels/check.h"

namespace mop::cuda {
namespace {

using kernels::check;

constexpr int64_t kChunk = int64_t{16} << 20;
constexpr int64_t kGrain = 4096;  // bytes: parts of threads

// By all cores of the process; what is small is not worth waking them.
void host_copy(std::byte* to, const std::byte* from, int64_t bytes) {
  if (bytes <= kGrain) {
    std::copy_n(from, bytes, to);
    return;
  }
  host::Workers& workers = host::Workers::of_process();
  workers.run([&](int thread) {
    const host::Range part = host::part_of(bytes, kGrain, thread, workers.count());
    std::memcpy(to + part.begin, from + part.begin, static_cast<size_t>(part.end - part.begin));
  });
}

bool of_gpu(const std::byte* p) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, p), "where memory is");
  return attributes.type == cudaMemoryTypeDevice;
}

}  // namespace

Staging::Staging() : pinned_(pinned_bytes(2 * kChunk, "a staging buffer")) {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  for (cudaEvent_t& event : travelled_)
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
}

Staging::~Staging() {
  for (cudaEvent_t event : travelled_) cudaEventDestroy(event);
  cudaStreamDestroy(stream_);
}

std::byte* Staging::half(int64_t chunk) const {
  return pinned_.get() + chunk % 2 * kChunk;
}

void Staging::copy(std::byte* to, const std::byte* from, int64_t bytes) {
  check(cudaDeviceSynchronize(), "what runs before a copy");
  const bool to_gpu = of_gpu(to), from_gpu = of_gpu(from);
  if (to_gpu && !from_gpu) return up(to, from, bytes);
  if (from_gpu && !to_gpu) return down(to, from, bytes);
  if (!to_gpu) return host_copy(to, from, bytes);
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_), "a copy");
  check(cudaStreamSynchronize(stream_), "a copy");
}

void Staging::up(std::byte* to, const std::byte* from, int64_t bytes) {
  for (int64_t at = 0, chunk = 0; at < bytes; at += kChunk, ++chunk) {
    const int64_t some = std::min(kChunk, bytes - at);
    cudaEvent_t event = travelled_[static_cast<size_t>(chunk % 2)];
    check(cudaEventSynchronize(event), "a copy to the GPU");
    host_copy(half(chunk), from + at, some);
    check(cudaMemcpyAsync(to + at, half(chunk), static_cast<size_t>(some), cudaMemcpyHostToDevice, stream_),
          "a copy to the GPU");
    check(cudaEventRecord(event, stream_), "a copy to the GPU");
  }
  check(cudaStreamSynchronize(stream_), "a copy to the GPU");
}

void Staging::down(std::byte* to, const std::byte* from, int64_t bytes) {
  const auto start = [&](int64_t chunk) {
    const int64_t at = chunk * kChunk;
    if (at >= bytes) return;
    check(cudaMemcpyAsync(half(chunk), from + at, static_cast<size_t>(std::min(kChunk, bytes - at)),
                          cudaMemcpyDeviceToHost, stream_),
          "a copy from the GPU");
    check(cudaEventRecord(travelled_[static_cast<size_t>(chunk % 2)], stream_), "a copy from the GPU");
  };
  start(0);
  for (int64_t at = 0, chunk = 0; at < bytes; at += kChunk, ++chunk) {
    check(cudaEventSynchronize(travelled_[static_cast<size_t>(chunk % 2)]), "a copy from the GPU");
    start(chunk + 1);
    host_copy(to + at, half(chunk), std::min(kChunk, bytes - at));
  }
}

}  // namespace mop::cuda
