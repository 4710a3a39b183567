#include "exec/cuda/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "exec/host/memory.h"
#include "exec/host/workers.h"
#include "sim/base/error.h"
#include "sim/base/quantity.h"

namespace mop::cuda {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

std::string bytes_text(int64_t bytes) {
  return format_bytes(static_cast<double>(bytes));
}

// Rounded up; also of an address.
size_t whole_pages(size_t bytes) {
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

size_t at_least_one(int64_t bytes) {
  return static_cast<size_t>(std::max<int64_t>(bytes, 1));
}

// The driver gives pages of 2 MiB in any case; another process maps a piece that does not end with one by
// pages of 4 KiB: 130 GiB take 2.5 s and a table of 260 MiB for each.
size_t on_device(int64_t bytes) {
  const size_t size = at_least_one(bytes);
  return size < kHugePage ? size : whole_pages(size);
}

}  // namespace

DeviceBytes device_bytes(int64_t bytes, const char* what) {
  std::byte* p = nullptr;
  if (cudaMalloc(reinterpret_cast<void**>(&p), on_device(bytes)) != cudaSuccess) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw UserError(fmt::format(
        "{} needs {} of GPU memory, and {} of {} is free: another program may be using the GPU, or "
        "the plan is too large for it",
        what, bytes_text(bytes), bytes_text(static_cast<int64_t>(free)),
        bytes_text(static_cast<int64_t>(total))));
  }
  return DeviceBytes(p);
}

PinnedBytes pinned_bytes(int64_t bytes, const char* what) {
  std::byte* p = nullptr;
  if (cudaHostAlloc(reinterpret_cast<void**>(&p), at_least_one(bytes), cudaHostAllocPortable) !=
      cudaSuccess) {
    cudaGetLastError();
    throw UserError(fmt::format("{} needs {} of pinned host memory, which this host does not give", what,
                                bytes_text(bytes)));
  }
  return PinnedBytes(p);
}

PinnedSlab::PinnedSlab(int64_t bytes) : bytes_(whole_pages(at_least_one(bytes))) {
  const auto fail = [&](const char* why) {
    throw UserError(fmt::format(
        "{} of pinned host memory cannot be had ({}): {} is available; take fewer ranks a host, or "
        "keep more optimizer states and checkpoints in HBM",
        bytes_text(static_cast<int64_t>(bytes_)), why, bytes_text(host::available_memory())));
  };
  // A huge page more, so that it can start at one.
  void* const mapped = mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) fail(std::strerror(errno));
  const auto begin = reinterpret_cast<uintptr_t>(mapped), start = whole_pages(begin);
  if (start > begin) munmap(mapped, start - begin);
  if (start - begin < kHugePage) munmap(reinterpret_cast<void*>(start + bytes_), kHugePage - (start - begin));
  data_ = reinterpret_cast<std::byte*>(start);
  madvise(data_, bytes_, MADV_HUGEPAGE);
  host::first_touch(host::Workers::of_process(), data_, static_cast<int64_t>(bytes_));
  if (const cudaError_t status = cudaHostRegister(data_, bytes_, cudaHostRegisterPortable);
      status != cudaSuccess) {
    cudaGetLastError();
    munmap(data_, bytes_);
    fail(cudaGetErrorString(status));
  }
}

PinnedSlab::~PinnedSlab() {
  cudaHostUnregister(data_);
  munmap(data_, bytes_);
}

std::string check_host_memory(int64_t bytes, int processes) {
  const int64_t needed = bytes * processes, there = host::available_memory();
  if (needed <= there) return {};
  const std::string numbers =
      fmt::format("{} of pinned host memory for {} ranks on this host, of which {} is available",
                  bytes_text(needed), processes, bytes_text(there));
  if (host::memory_grows()) return numbers + "; this virtual machine's memory may grow, so the run goes on";
  throw UserError(numbers +
                  "; take fewer ranks a host, or keep more optimizer states and checkpoints in HBM");
}

}  // namespace mop::cuda
