#include "exec/interpreter/checks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "sim/base/error.h"

namespace mop::interpreter {

using program::BufferId;
using program::Op;
using program::OpId;
using program::Type;
using program::View;

namespace {

// Every aligned 16 or 32 bits of it are a NaN, so that what reads a guard is seen as well.
std::byte pattern(const std::byte* at) {
  constexpr std::byte kBytes[] = {std::byte{0xb5}, std::byte{0xff}, std::byte{0xb1}, std::byte{0x7f}};
  return kBytes[reinterpret_cast<uintptr_t>(at) % 4];
}

void write_guard(std::byte* begin, int64_t bytes) {
  for (std::byte* at = begin; at != begin + bytes; ++at) *at = pattern(at);
}

bool intact(const std::byte* begin, int64_t bytes) {
  for (const std::byte* at = begin; at != begin + bytes; ++at)
    if (*at != pattern(at)) return false;
  return true;
}

template <typename T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

bool is_finite(const std::byte* at, Type type) {
  switch (type) {
    case Type::bf16:
      return (load<uint16_t>(at) & 0x7f80) != 0x7f80;
    case Type::f32:
      return std::isfinite(load<float>(at));
    case Type::f64:
      return std::isfinite(load<double>(at));
    case Type::i32:
      break;
  }
  return true;
}

bool all_finite(const Operand& operand) {
  const View& view = operand.view;
  const int64_t element = program::size_of(view.type);
  for (int64_t matrix = 0; matrix < view.count; ++matrix)
    for (int64_t row = 0; row < view.rows; ++row) {
      const std::byte* at = operand.data + (matrix * view.stride + row * view.ld) * element;
      for (int64_t col = 0; col < view.cols; ++col, at += element)
        if (!is_finite(at, view.type)) return false;
    }
  return true;
}

}  // namespace

bool tells(const program::StepProgram& program, const Launch& launch, size_t output) {
  const Call& call = launch.call;
  if (!call.out[output]) return false;
  // Low bits of masters are no numbers; what is wrong with the states shows in the weights beside them.
  const auto uses = program.operands(*call.op).last(call.out.size());
  const program::Holds holds = program.buffers[uses[output].buffer].holds;
  if (holds == program::Holds::optimizer_states || holds == program::Holds::staging) return false;
  // Of a routed operation's rows and slots only those of the round are written; what comes of them is
  // scanned where it is added up.
  const View& view = call.out[output].view;
  return call.op->routed == program::Routed::no ||
         (view.rows != program.round_rows && view.cols != program.round_rows &&
          (view.count != program.spill_slots || view.count == 0));
}

NotFinite not_finite(const program::StepProgram& program, int64_t rank, const Launch& launch, size_t output) {
  const Call& call = launch.call;
  return {launch.issue, call.id, call.round,
          fmt::format("rank {}: output {} of operation {} ({}), round {}, is not finite", rank, output,
                      call.id, program.op_name(call.id), call.round)};
}

Checks::Checks(const program::StepProgram& program, const Memory& memory, int64_t rank, bool finite)
    : program_(program),
      memory_(memory),
      rank_(rank),
      finite_(finite),
      opener_(program.buffers.size(), program::kNoOp) {
  for (OpId id = 0; id < program.ops.size(); ++id) {
    const Op& op = program.ops[id];
    for (const program::Use& use : program.uses_of(op))
      opener_[use.buffer] = std::min(opener_[use.buffer], id);
  }
  size_t slots = 0;
  for (const program::Buffer& buffer : program.buffers) {
    first_slot_.push_back(slots);
    slots += buffer.slots;
  }
  guarded_ = std::make_unique<std::atomic<int64_t>[]>(slots);
  for (size_t slot = 0; slot < slots; ++slot) guarded_[slot] = -1;
  if (memory_.guard() == 0) return;
  for (BufferId b = 0; b < program.buffers.size(); ++b) {
    if (!program.buffers[b].persistent || program.buffers[b].bytes == 0) continue;
    std::byte* const data = memory_.at(b, 0);
    write_guard(data - memory_.guard(), memory_.guard());
    write_guard(data + memory_.slot_bytes(b), memory_.guard());
  }
}

void Checks::before(const Launch& launch) {
  if (memory_.guard() == 0) return;
  const Op& op = *launch.call.op;
  for (const program::Use& use : program_.uses_of(op)) {
    const BufferId b = use.buffer;
    if (opener_[b] != launch.call.id) continue;
    const program::Buffer& buffer = program_.buffers[b];
    // Of a region's buffer each slot has a first use in every step: the other one may still be in use.
    if (buffer.persistent || buffer.bytes == 0 || launch.call.round >= buffer.slots) continue;
    const int64_t slot = launch.iteration % buffer.slots;
    std::byte* const data = memory_.at(b, slot);
    write_guard(data - memory_.guard(), memory_.guard());
    write_guard(data + memory_.slot_bytes(b), memory_.guard());
    guarded_[first_slot_[b] + static_cast<size_t>(slot)].store(launch.pass, std::memory_order_relaxed);
  }
}

void Checks::after(const Launch& launch) {
  if (finite_) scan(launch);
  if (memory_.guard() == 0) return;
  const Op& op = *launch.call.op;
  for (const program::Use& use : program_.uses_of(op)) {
    const BufferId b = use.buffer;
    if (program_.buffers[b].bytes == 0) continue;
    const program::Buffer& buffer = program_.buffers[b];
    const int64_t slot = launch.iteration % buffer.slots;
    // In a flush the first use may have been left out: others' bytes may be there.
    if (!buffer.persistent &&
        guarded_[first_slot_[b] + static_cast<size_t>(slot)].load(std::memory_order_relaxed) != launch.pass)
      continue;
    const std::byte* const data = memory_.at(b, slot);
    const bool front = intact(data - memory_.guard(), memory_.guard());
    if (front && intact(data + memory_.slot_bytes(b), memory_.guard())) continue;
    throw InternalError(fmt::format(
        "bytes {} buffer '{}' of {} bytes were overwritten when operation {} ({}), round {}, had ended",
        front ? "behind" : "before", program_.buffer_name(b), memory_.slot_bytes(b), launch.call.id,
        program_.op_name(launch.call.id), launch.call.round));
  }
}

void Checks::scan(const Launch& launch) {
  for (size_t o = 0; o < launch.call.out.size(); ++o) {
    if (!tells(program_, launch, o) || all_finite(launch.call.out[o])) continue;
    const std::lock_guard lock(mutex_);
    if (first_ && first_->issue <= launch.issue) return;
    first_ = not_finite(program_, rank_, launch, o);
    return;
  }
}

std::optional<NotFinite> Checks::first_not_finite() const {
  const std::lock_guard lock(mutex_);
  return first_;
}

}  // namespace mop::interpreter
