// Communicators: who waits for whom, and for how long.
#include <gtest/gtest.h>

#include "tests/engine/program.h"

namespace mop::engine {
namespace {

Program arrives_at(Time time, Time takes, std::initializer_list<Use> uses = {}) {
  Program program;
  const uint32_t before = program.task(0, time);
  const uint32_t all = program.meet(0, 1, takes, {before}, uses);
  program.task(0, 5, {all});
  program.barrier();
  return program;
}

TEST(Meeting, StartsAtTheLastArrivalAndEndsWithTheSlowest) {
  const Report report = run(machine_of({arrives_at(10, 20), arrives_at(70, 30), arrives_at(40, 25)}));
  for (const RankReport& rank : report.ranks) {
    EXPECT_EQ(rank.spans[1].start - report.step_end[0], 70);
    EXPECT_EQ(rank.spans[1].end - report.step_end[0], 100);
  }
  EXPECT_EQ(report.step_time, 105);
  EXPECT_EQ(report.ranks[0].exposed_communication, 30);  // waiting is not communication
}

TEST(Meeting, FinishedParticipantsReleaseTheirResourcesButHoldTheirStream) {
  const std::initializer_list<Use> link = {{Resource::nvlink_out, kAll}};
  Program quick, slow;
  quick.meet(0, 1, 10, {}, link);
  quick.task(2, 30, {}, link);  // shares the link for 20, then has it
  quick.task(1, 1);
  slow.meet(0, 1, 100, {}, link);
  const Report report = run_steps(machine_of({quick, slow}), 1);
  EXPECT_EQ(report.ranks[0].spans[0].end, 100);
  EXPECT_EQ(report.ranks[0].spans[1].end, 40);
  EXPECT_EQ(report.ranks[0].spans[2].start, 100);
}

TEST(Meeting, SlowedParticipantDelaysAll) {
  const std::initializer_list<Use> link = {{Resource::nic_out, kAll}};
  Program busy = arrives_at(0, 100, link);
  busy.task(3, 1000, {}, link);
  const Report report = run_steps(machine_of({arrives_at(0, 100, link), busy}), 1);
  EXPECT_EQ(report.ranks[0].spans[1].end, 200);
}

TEST(Meeting, UnlaunchedTaskHasNotArrived) {
  Program late = arrives_at(0, 10);
  late[1].launch_ns = 60;
  EXPECT_EQ(run_steps(machine_of({arrives_at(0, 10), late}), 1).ranks[0].spans[1].start, 60);
}

TEST(Meeting, RepeatedTasksOnOneCommunicatorStayInStep) {
  Program a, b;
  for (int i = 0; i < 5; ++i) {
    a.meet(0, 1, 10, {a.task(0, 7)});
    b.meet(0, 1, 4, {b.task(0, i % 2 ? 30 : 1)});
  }
  const Report report = run_steps(machine_of({a, b}), 1);
  for (uint32_t i = 0; i < 5; ++i) {
    EXPECT_EQ(report.ranks[0].spans[2 * i + 1].start, report.ranks[1].spans[2 * i + 1].start);
    EXPECT_EQ(report.ranks[0].spans[2 * i + 1].end, report.ranks[1].spans[2 * i + 1].end);
  }
}

TEST(Meeting, WithoutWorkItIsABarrier) {
  const Report report = run_steps(machine_of({arrives_at(10, 0), arrives_at(90, 0)}), 1);
  EXPECT_EQ(report.ranks[0].spans[1].end, 90);
  EXPECT_EQ(report.step_end[0], 95);
}

TEST(Meeting, GroupsDoNotWaitForOneAnother) {
  Machine machine = machine_of({arrives_at(10, 10), arrives_at(50, 10)});
  machine.meeting_size = {2, 2};
  machine.ranks.push_back(machine.ranks[0]);
  machine.ranks.push_back(machine.ranks[0]);
  machine.ranks[2].meeting = machine.ranks[3].meeting = {1};
  const Report report = run_steps(machine, 1);
  EXPECT_EQ(report.ranks[0].spans[1].end, 60);
  EXPECT_EQ(report.ranks[2].spans[1].end, 20);
}

}  // namespace
}  // namespace mop::engine
