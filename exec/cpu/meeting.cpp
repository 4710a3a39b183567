#include "exec/cpu/meeting.h"

#include <fmt/format.h>

#include "sim/base/error.h"

namespace mop::cpu {

Room::Room(int size, const std::atomic<bool>& aborted) : size_(size), aborted_(aborted) {
  for (size_t turn = 0; turn < calls_.size(); ++turn) {
    calls_[turn].resize(static_cast<size_t>(size));
    for (const Call& call : calls_[turn]) pointers_[turn].push_back(&call);
  }
}

void Room::wake() {
  const std::lock_guard lock(mutex_);
  everyone_.notify_all();
}

void Room::barrier() {
  std::unique_lock lock(mutex_);
  if (aborted_) throw Aborted{};
  const uint64_t generation = generation_;
  if (++arrived_ == size_) {
    arrived_ = 0;
    ++generation_;
    everyone_.notify_all();
    return;
  }
  everyone_.wait(lock, [&] { return generation_ != generation || aborted_; });
  if (generation_ == generation) throw Aborted{};
}

void Seat::enter(const Call& call) {
  ensure(call.size == room_.size(), "a collective's group is its room");
  turn_ ^= 1;
  room_.calls_[turn_][static_cast<size_t>(index_)] = call;
  room_.barrier();
  for (const Call* const other : calls()) {
    if (other->op->kind == call.op->kind && other->op->phase == call.op->phase &&
        other->op->layer == call.op->layer && other->round == call.round)
      continue;
    throw InternalError(fmt::format(
        "position {} of the group is at {} of layer {}, round {}; position {} at {} of layer {}, round {}",
        call.index, program::name(call.op->kind), call.op->layer, call.round, other->index,
        program::name(other->op->kind), other->op->layer, other->round));
  }
}

}  // namespace mop::cpu
