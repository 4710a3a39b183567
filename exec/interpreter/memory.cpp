#include "exec/interpreter/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "sim/base/error.h"
#include "sim/base/integer.h"

namespace mop::interpreter {

using program::Buffer;
using program::BufferId;
using program::Space;

MemoryPlan plan_memory(const program::StepProgram& program, int64_t guard) {
  ensure(guard >= 0, "a guard zone has a size");
  if (guard == 0) return {program::plan_arenas(program), 0};
  guard = ceil_div(guard, program::kAlignment) * program::kAlignment;
  program::StepProgram enlarged = program;
  for (Buffer& buffer : enlarged.buffers)
    if (buffer.bytes > 0) buffer.bytes += 2 * guard * buffer.slots;
  return {program::plan_arenas(enlarged), guard};
}

Memory::Memory(const program::StepProgram& program, const MemoryPlan& plan, std::byte* hbm, std::byte* host)
    : program_(program), plan_(plan), hbm_(hbm), host_(host) {}

int64_t Memory::slot_bytes(BufferId id) const {
  const Buffer& buffer = program_.buffers[id];
  ensure(buffer.bytes % buffer.slots == 0, "the slots of a buffer are of one size");
  return buffer.bytes / buffer.slots;
}

std::byte* Memory::at(BufferId id, int64_t slot) const {
  const Buffer& buffer = program_.buffers[id];
  ensure(slot >= 0 && slot < buffer.slots, "a buffer has that slot");
  if (buffer.bytes == 0) return base(buffer.space);
  const auto& arenas = plan_.arenas;
  const int64_t offset = (buffer.space == Space::hbm ? arenas.hbm : arenas.host).offset[id];
  if (offset == program::kNotHere)
    throw InternalError(fmt::format("buffer '{}' has no place in the arena", program_.buffer_name(id)));
  return base(buffer.space) + offset + slot * (slot_bytes(id) + 2 * plan_.guard) + plan_.guard;
}

int64_t extent(const program::View& view) {
  if (view.elements() == 0) return 0;
  const int64_t last = (view.count - 1) * view.stride + (view.rows - 1) * view.ld + view.cols;
  return last * program::size_of(view.type);
}

HostBytes::HostBytes(int64_t bytes) : bytes_(static_cast<size_t>(std::max<int64_t>(bytes, 1))) {
  void* const mapped =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED)
    throw UserError(fmt::format("{} bytes of memory cannot be had ({}): run a smaller model or context",
                                bytes_, std::strerror(errno)));
  data_ = static_cast<std::byte*>(mapped);
}

HostBytes::~HostBytes() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

HostBytes::HostBytes(HostBytes&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

HostBytes& HostBytes::operator=(HostBytes&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace mop::interpreter
