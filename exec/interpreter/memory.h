// Where a rank's buffers are: one arena of HBM and one of host memory, at the offsets that the program's
// arena planner gives, and the bytes that a buffer has there.
#pragma once
#include <cstddef>
#include <cstdint>

#include "sim/program/arena.h"
#include "sim/program/program.h"

namespace mop::interpreter {

struct MemoryPlan {
  program::Arenas arenas;
  int64_t guard = 0;  // bytes before and behind every slot of every buffer that belong to nobody
};

// guard: rounded up to the arenas' alignment; above 0 the arenas are larger than those of the simulator.
MemoryPlan plan_memory(const program::StepProgram& program, int64_t guard = 0);

// A rank's view of its arenas. Refers to program and plan, owns nothing.
class Memory {
 public:
  // hbm, host: plan.arenas.hbm.bytes and .host.bytes, aligned to program::kAlignment.
  Memory(const program::StepProgram& program, const MemoryPlan& plan, std::byte* hbm, std::byte* host);

  std::byte* base(program::Space space) const { return space == program::Space::hbm ? hbm_ : host_; }
  int64_t guard() const { return plan_.guard; }
  int64_t slot_bytes(program::BufferId id) const;
  // Where slot `slot` of a buffer starts. Errors: InternalError when the arenas have no place for it.
  std::byte* at(program::BufferId id, int64_t slot) const;

 private:
  const program::StepProgram& program_;
  const MemoryPlan& plan_;
  std::byte *hbm_, *host_;
};

// Bytes [0, end) that a view covers, counted from where it starts.
int64_t extent(const program::View& view);

// Zeroed memory of this process, aligned to pages; pages that nobody touches cost nothing.
class HostBytes {
 public:
  // Errors: UserError when the machine does not have that much.
  explicit HostBytes(int64_t bytes);
  ~HostBytes();
  HostBytes(HostBytes&& other) noexcept;
  HostBytes& operator=(HostBytes&& other) noexcept;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mop::interpreter
