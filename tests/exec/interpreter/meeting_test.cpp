// Ranks in a room: everyone's calls are there until the last one has left.
#include "exec/cpu/meeting.h"

#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <thread>

namespace mop::cpu {
namespace {

program::Op collective(program::OpKind kind) {
  program::Op op{};
  op.kind = kind;
  return op;
}

TEST(Meeting, CallsStayWhileSomebodyIsLate) {
  constexpr int kRanks = 4, kTimes = 3000;
  const std::atomic<bool> aborted = false;
  Room room(kRanks, aborted);
  const program::Op op = collective(program::OpKind::all_gather);
  std::atomic<int> wrong = 0;
  const auto rank = [&](int index) {
    Seat seat(room, index);
    Call call;
    call.op = &op;
    call.index = index;
    call.size = kRanks;
    for (int64_t i = 0; i < kTimes; ++i) {
      call.round = i;
      seat.enter(call);
      seat.barrier();
      if ((i + index) % 3 == 0) std::this_thread::yield();
      for (int other = 0; other < kRanks; ++other) {
        const Call& its = *seat.calls()[static_cast<size_t>(other)];
        wrong += its.round != i || its.index != other;
      }
    }
  };
  std::deque<std::thread> threads;
  for (int i = 0; i < kRanks; ++i) threads.emplace_back(rank, i);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Meeting, AbortingEndsEveryWait) {
  std::atomic<bool> aborted = false;
  Room room(3, aborted);
  const program::Op op = collective(program::OpKind::all_reduce);
  std::atomic<int> left = 0;
  const auto rank = [&](int index) {
    Seat seat(room, index);
    Call call;
    call.op = &op;
    call.size = 3;
    EXPECT_THROW(seat.enter(call), Aborted);
    ++left;
  };
  std::thread a(rank, 0), b(rank, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(left, 0);
  aborted = true;
  room.wake();
  a.join();
  b.join();
  rank(2);  // who comes later does not wait at all
}

}  // namespace
}  // namespace mop::cpu
