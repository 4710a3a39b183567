#include <gtest/gtest.h>

#include "tests/engine/program.h"

namespace mop::engine {
namespace {

// As text, first stretch first: "rank.task:duration".
std::string text(const Report& report) {
  std::string out;
  for (auto at = report.critical_path.rbegin(); at != report.critical_path.rend(); ++at) {
    const std::string task = at->task == kLaunch ? "launch" : std::to_string(at->task);
    if (!out.empty()) out += ' ';
    out += std::to_string(at->rank) + "." + task + ":" + std::to_string(at->end - at->start);
  }
  return out;
}

TEST(CriticalPath, FollowsTheLongestBranch) {
  Program program;
  const uint32_t root = program.task(0, 5);
  const uint32_t a = program.task(1, 30, {root}), b = program.task(2, 50, {root});
  program.task(0, 7, {a, b});
  EXPECT_EQ(text(run_steps(machine_of({program}), 1)), "0.0:5 0.2:50 0.3:7");
}

TEST(CriticalPath, FollowsStreamOrder) {
  Program program;
  program.task(0, 5);
  program.task(0, 6);
  EXPECT_EQ(text(run(machine_of({program}))), "0.0:5 0.1:6");
}

TEST(CriticalPath, WaitingAtAMeetingIsTheLastToArrive) {
  Program early, late;
  early.task(0, 3, {early.meet(0, 1, 20, {early.task(0, 10)})});
  late.meet(0, 1, 20, {late.task(0, 70)});
  EXPECT_EQ(text(run_steps(machine_of({early, late}), 1)), "1.0:70 0.1:20 0.2:3");
}

TEST(CriticalPath, LaunchBoundTimeIsTheLaunchers) {
  Program program;
  for (int i = 0; i < 4; ++i) program[program.task(0, 3)].launch_ns = 10;
  const Report report = run(machine_of({program}));
  EXPECT_EQ(text(report), "0.launch:37 0.3:3");
  EXPECT_EQ(report.step_time, 40);
}

TEST(CriticalPath, LauncherGoesOnFromTheTaskThatBlockedIt) {
  Program program;
  for (int i = 0; i < 4; ++i) program[program.task(i, 100)].launch_ns = 10;
  program[1].blocks_launch = true;
  program.barrier();
  // Launched at 10, 20; task 1 ends at 120; then 130, 140.
  EXPECT_EQ(text(run_steps(machine_of({program}), 1)), "0.launch:20 0.1:100 0.launch:10 0.2:100 0.3:100");
}

// A small kernel that waits for room behind a large one is not what takes the time.
TEST(CriticalPath, WaitingForRoomIsWhoHasIt) {
  Program program;
  const uint32_t first = program.task(0, 10), large = program.task(1, 100, {first}),
                 before = program.task(2, 15), small = program.task(2, 5, {before});
  program.graph.demands[program[large].demand].takes_room = true;
  program.graph.demands[program[small].demand].needs_room = true;
  program.task(3, 7, {small});
  EXPECT_EQ(text(run_steps(machine_of({program}), 1)), "0.0:10 0.1:100 0.3:5 0.4:7");
}

TEST(CriticalPath, ClipsATaskThatBeganInTheStepBefore) {
  Program program;
  const uint32_t compute = program.task(0, 60);
  program.task(1, 80, {compute});
  const Report report = run(machine_of({program}));
  EXPECT_EQ(text(report), "0.1:80");
  Program longer;
  longer.task(1, 10, {longer.task(0, 60)});
  EXPECT_EQ(text(run(machine_of({longer}))), "0.0:50 0.1:10");
}

TEST(CriticalPath, SlowedTasksCountAsLongAsTheyRan) {
  Program program;
  program.task(0, 100, {}, {{Resource::hbm, kAll}});
  program.task(1, 300, {}, {{Resource::hbm, kAll}});
  program.task(2, 0, {0, 1});
  program.barrier();
  EXPECT_EQ(text(run(machine_of({program}))), "0.1:400");
}

}  // namespace
}  // namespace mop::engine
