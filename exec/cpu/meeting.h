// Where the ranks of one communicator meet for its collectives, one after the other.
#pragma once
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "exec/cpu/kernels.h"

namespace mop::cpu {

// Thrown out of every wait of a world that was aborted.
struct Aborted {};

class Room {
 public:
  // aborted: of the world; wake() after it was set.
  Room(int size, const std::atomic<bool>& aborted);
  int size() const { return size_; }
  void wake();

 private:
  friend class Seat;
  void barrier();

  const int size_;
  const std::atomic<bool>& aborted_;
  std::mutex mutex_;
  std::condition_variable everyone_;
  int arrived_ = 0;
  uint64_t generation_ = 0;
  // By turn: who is quick may be at the next collective while others still read this one's calls.
  std::array<std::vector<Call>, 2> calls_;
  std::array<std::vector<const Call*>, 2> pointers_;
};

// One rank's place in a room. Used by one thread at a time.
class Seat final : public Meeting {
 public:
  Seat(Room& room, int index) : room_(room), index_(index) {}
  // Waits for the others' calls. Errors: InternalError when they call for something else; Aborted.
  void enter(const Call& call);
  std::span<const Call* const> calls() const override { return room_.pointers_[turn_]; }
  void barrier() override { room_.barrier(); }

 private:
  Room& room_;
  int index_;
  size_t turn_ = 0;
};

}  // namespace mop::cpu
