// Cases whose answer follows from a formula: chains, forks, shared links, nodes, launches, steps that
// overlap.
#include "sim/engine/engine.h"

#include <gtest/gtest.h>

#include "tests/engine/program.h"

namespace mop::engine {
namespace {

constexpr Resource kLink = Resource::nic_out, kOther = Resource::nic_in, kShared = Resource::dram;

Time first_step(const Program& program) {
  return run_steps(machine_of({program}), 1).step_end[0];
}

TEST(Engine, ChainAddsUp) {
  Program program;
  uint32_t last = program.task(0, 10);
  for (int i = 1; i < 100; ++i) last = program.task(i % 3, 10 + i, {last});
  const Report report = run(machine_of({program}));
  EXPECT_EQ(report.step_end[0], 100 * 10 + 99 * 100 / 2);
  EXPECT_EQ(report.ranks[0].spans.size(), 100u);
}

TEST(Engine, ForkAndJoinTakeTheLongestBranch) {
  Program program;
  const uint32_t root = program.task(0, 5);
  const uint32_t a = program.task(1, 30, {root}), b = program.task(2, 50, {root}),
                 c = program.task(3, 20, {root});
  program.task(0, 7, {a, b, c});
  EXPECT_EQ(first_step(program), 5 + 50 + 7);
}

TEST(Engine, StreamsAreFirstInFirstOut) {
  Program program;
  const uint32_t slow = program.task(0, 100);
  program.task(1, 1, {slow});
  program.task(1, 1);  // could start at 0 but for the one before
  const Report report = run_steps(machine_of({program}), 1);
  EXPECT_EQ(report.ranks[0].spans[2].start, 101);
}

TEST(Engine, StepsOfAPeriodicProgramAreSteadyAfterTwo) {
  Program program;
  program.task(0, 10);
  const Report report = run(machine_of({program}));
  EXPECT_TRUE(report.steady);
  EXPECT_EQ(report.step_end, (std::vector<Time>{10, 20}));
  EXPECT_EQ(report.step_time, 10);
  EXPECT_EQ(report.tasks, 2u);
  EXPECT_EQ(report.events, 5u);  // the third step has begun
}

TEST(Engine, EqualFlowsShareALinkAndThenHaveItAlone) {
  Program program;
  program.task(0, 100, {}, {{kLink, kAll}});
  program.task(1, 300, {}, {{kLink, kAll}});
  program.task(2, 0, {0, 1});
  program.barrier();
  const Report report = run_steps(machine_of({program}), 1);
  EXPECT_EQ(report.ranks[0].spans[0].end, 200);
  EXPECT_EQ(report.ranks[0].spans[1].end, 400);
  EXPECT_TRUE(report.ranks[0].used[size_t(kLink)] == __int128{400} * kFull);
}

TEST(Engine, WeightedFlowsShareBytesFairly) {
  // At full speed one draws a quarter of the link, the other all: half the link each is double what the first
  // wants.
  Program program;
  program.task(0, 100, {}, {{kLink, kFull / 4}}, 4);
  program.task(1, 100, {}, {{kLink, kAll}}, 1);
  program.task(2, 0, {0, 1});
  program.barrier();
  const Report report = run_steps(machine_of({program}), 1);
  EXPECT_EQ(report.ranks[0].spans[0].end, 100);  // at full speed
  EXPECT_EQ(report.ranks[0].spans[1].end, 125);  // 75 of its work in the first 100, the rest alone
}

TEST(Engine, UnequalWeights) {
  Program program;
  program.task(0, 300, {}, {{kLink, kAll}}, 3);
  program.task(1, 300, {}, {{kLink, kAll}}, 1);
  program.task(2, 0, {0, 1});
  program.barrier();
  const Report report = run_steps(machine_of({program}), 1);
  EXPECT_EQ(report.ranks[0].spans[0].end, 400);
  EXPECT_EQ(report.ranks[0].spans[1].end, 600);
}

// A flow held up elsewhere leaves its part of the link to the others.
TEST(Engine, BottleneckElsewhereFreesALink) {
  Program program;
  program.task(0, 900, {}, {{kLink, kAll}, {kOther, kAll}});
  for (int i = 1; i < 4; ++i) program.task(i, 900, {}, {{kOther, kAll}});  // kOther: a quarter each
  program.task(4, 900, {}, {{kLink, kAll}});                               // kLink: three quarters
  program.task(5, 0, {0, 1, 2, 3, 4});
  program.barrier();
  const Report report = run_steps(machine_of({program}), 1);
  EXPECT_EQ(report.ranks[0].spans[4].end, 1200);
  EXPECT_EQ(report.ranks[0].spans[0].end, 3600);
  EXPECT_EQ(report.ranks[0].spans[3].end, 3600);
}

TEST(Engine, LateArrivalSlowsWhatRuns) {
  Program program;
  program.task(0, 100, {}, {{kLink, kAll}});
  const uint32_t delay = program.task(1, 50);
  program.task(2, 100, {delay}, {{kLink, kAll}});
  program.task(3, 0, {0, 2});
  program.barrier();
  const Report report = run_steps(machine_of({program}), 1);
  EXPECT_EQ(report.ranks[0].spans[0].end, 150);  // 50 alone, then 100 at half speed
  EXPECT_EQ(report.ranks[0].spans[2].end, 200);
}

TEST(Engine, NodeResourceCouplesItsRanksOnly) {
  Program program;
  program.task(0, 100, {}, {{kShared, kHalf}});
  Machine machine = machine_of({program});
  machine.nodes = 2;
  for (int i = 0; i < 3; ++i)
    machine.ranks.push_back(machine.ranks[0]);  // four on node 0: demand is twice the capacity
  machine.ranks.push_back(machine.ranks[0]);
  machine.ranks.back().node = 1;
  const Report report = run_steps(machine, 1);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(report.ranks[size_t(i)].spans[0].end, 200);
  EXPECT_EQ(report.ranks[4].spans[0].end, 100);
  EXPECT_TRUE(report.ranks[2].used[size_t(kShared)] == __int128{200} * kFull);
}

TEST(Engine, MultiplicityCountsOnTheNodeAndNotOnTheGpu) {
  Program program;
  program.task(0, 100, {}, {{kShared, kHalf}, {kLink, kAll}});
  Machine machine = machine_of({program});
  machine.ranks[0].multiplicity = 8;
  const Report report = run_steps(machine, 1);
  EXPECT_EQ(report.step_end[0], 400);
  EXPECT_TRUE(report.ranks[0].used[size_t(kShared)] == __int128{400} * kFull);
  EXPECT_TRUE(report.ranks[0].used[size_t(kLink)] == __int128{100} * kFull);
}

TEST(Engine, ReleasedResourcesSpeedUpTheRest) {
  Program program;
  program.task(0, 1000, {}, {{kLink, kAll}});
  for (int i = 0; i < 10; ++i) program.task(1, 10, {}, {{kLink, kAll}});
  program.task(2, 0, {0, 10});
  program.barrier();
  const Report report = run_steps(machine_of({program}), 1);
  EXPECT_EQ(report.ranks[0].spans[10].end, 200);
  EXPECT_EQ(report.ranks[0].spans[0].end, 1100);
}

TEST(Engine, ZeroDurationTasksTakeNoTime) {
  Program program;
  uint32_t last = program.task(0, 0, {}, {{kLink, kAll}});
  for (int i = 0; i < 50000; ++i)
    last = program.task(i % 5, 0, {last}, {{kLink, kAll}});  // no deep recursion either
  program.task(1, 3, {last});
  EXPECT_EQ(first_step(program), 3);
  Program nothing;
  nothing.task(0, 0);
  const Report report = run(machine_of({nothing}));
  EXPECT_EQ(report.step_time, 0);
  EXPECT_TRUE(report.critical_path.empty());
}

// ---- Launches ----

TEST(Engine, LaunchBoundChainTakesTheLaunches) {
  Program program;
  for (int i = 0; i < 100; ++i) program[program.task(0, 3)].launch_ns = 10;
  const Report report = run(machine_of({program}));
  EXPECT_EQ(report.step_end[0], 100 * 10 + 3);
  EXPECT_EQ(report.step_time, 1000);
  EXPECT_EQ(report.ranks[0].compute_busy, 300);
}

TEST(Engine, LaunchesHideBehindLongTasks) {
  Program program;
  for (int i = 0; i < 100; ++i) program[program.task(0, 30)].launch_ns = 10;
  const Report report = run(machine_of({program}));
  EXPECT_EQ(report.step_end[0], 10 + 100 * 30);
  EXPECT_EQ(report.step_time, 3000);  // the launches of later steps are long done
}

TEST(Engine, BlockingTaskStopsTheLaunches) {
  Program program;
  for (int i = 0; i < 4; ++i) program[program.task(0, 100)].launch_ns = 10;
  program[1].blocks_launch = true;
  const Report report = run_steps(machine_of({program}), 3);
  const std::vector<Span>& spans = report.ranks[0].spans;
  // First step: 10..110..210, launches go on at 210: 220..320..420; the next step's launches end at 240, 250.
  EXPECT_EQ(report.step_end[0], 420);
  EXPECT_EQ(report.step_time, 100 + 100 + 10 + 100 + 100);
  EXPECT_EQ(spans[2].start, spans[1].end + 10);
  EXPECT_EQ(spans[0].start, report.step_end[1]);
}

TEST(Engine, LastTaskThatBlocksDelaysTheNextStep) {
  Program program;
  for (int i = 0; i < 3; ++i) program[program.task(i, 100)].launch_ns = 10;
  program[2].blocks_launch = true;
  const Report report = run(machine_of({program}));
  EXPECT_EQ(report.step_end[0], 130);
  EXPECT_EQ(report.step_time, 130);
}

TEST(Engine, LaunchOrderDelaysAnIdleStream) {
  Program program;
  program[program.task(0, 1)].launch_ns = 500;
  program[program.task(1, 1)].launch_ns = 5;
  EXPECT_EQ(run_steps(machine_of({program}), 1).ranks[0].spans[1].start, 505);
}

// ---- Steps that overlap ----

TEST(Engine, CarriedEdgeAndOverlapGiveThePipelinedPeriod) {
  // Compute 60; then a copy of 80 that the compute of the step after must see. Period: both in turn.
  Program both;
  const uint32_t compute = both.task(0, 60), copy = both.task(1, 80, {compute});
  both.carry(copy, compute);
  EXPECT_EQ(run(machine_of({both})).step_time, 140);

  // Without the edge they overlap and the longer of the two is the period.
  Program overlapped;
  overlapped.task(1, 80, {overlapped.task(0, 60)});
  const Report report = run(machine_of({overlapped}));
  EXPECT_EQ(report.step_end[0], 140);
  EXPECT_EQ(report.step_time, 80);
  EXPECT_TRUE(report.steady);
}

TEST(Engine, NoStreamRunsTwoStepsAhead) {
  Program program;
  program.task(0, 10);
  program.task(1, 100);
  const Report report = run_steps(machine_of({program}), 4);
  EXPECT_EQ(report.ranks[0].spans[0].start,
            report.step_end.back() - 200);  // when the step but one before had ended
  EXPECT_EQ(report.step_time, 100);
}

TEST(Engine, IndependentRanksMayDriftApart) {
  Program fast, slow;
  fast.task(0, 1);
  slow.task(0, 1000);
  const Report report = run_steps(machine_of({fast, slow}), 6);
  EXPECT_EQ(report.step_time, 1000);
  EXPECT_EQ(report.ranks[0].spans[0].end, report.step_end.size());
}

TEST(Engine, GivesUpAtMaxSteps) {
  Program program;
  program.task(1, 80, {program.task(0, 60)});
  const Report report = run(machine_of({program}), {.max_steps = 2});
  EXPECT_FALSE(report.steady);
  EXPECT_EQ(report.step_end.size(), 2u);
  EXPECT_TRUE(run(machine_of({program}), {.max_steps = 2, .tolerance = 0.5}).steady);
}

// ---- What the last step was spent on ----

TEST(Engine, ExposedCommunicationIsWhatComputeDoesNotHide) {
  Program program;
  const uint32_t gather = program.task(1, 100);
  program[gather].communication = true;
  program.task(0, 30);
  program.task(0, 40, {gather});
  program.task(2, 0, {2});
  program.barrier();
  const Report report = run(machine_of({program}));
  EXPECT_EQ(report.step_time, 140);
  EXPECT_EQ(report.ranks[0].exposed_communication, 70);
  EXPECT_EQ(report.ranks[0].compute_busy, 70);
}

TEST(Engine, CommunicationOnStreamZeroIsExposed) {
  Program program;
  program[program.task(0, 100)].communication = true;
  program.task(0, 30);
  const Report report = run(machine_of({program}));
  EXPECT_EQ(report.ranks[0].exposed_communication, 100);
  EXPECT_EQ(report.ranks[0].compute_busy, 30);
}

TEST(Engine, TwoCommunicationsAtOnceCountOnce) {
  Program program;
  for (int stream = 1; stream < 3; ++stream) program[program.task(stream, 50)].communication = true;
  EXPECT_EQ(run(machine_of({program})).ranks[0].exposed_communication, 50);
}

TEST(Engine, UseIsWorkTimesShareHoweverSlow) {
  Program program;
  program.task(0, 777, {}, {{kLink, 700001}, {kShared, 900001}}, 3);
  program.task(1, 555, {}, {{kLink, 800003}, {kShared, 123457}}, 5);
  program.task(2, 0, {0, 1});
  program.barrier();
  Machine machine = machine_of({program});
  machine.ranks[0].multiplicity = 3;
  const Report report = run(machine);
  EXPECT_TRUE(report.ranks[0].used[size_t(kLink)] == __int128{777} * 700001 + __int128{555} * 800003);
  EXPECT_TRUE(report.ranks[0].used[size_t(kShared)] == 3 * (__int128{777} * 900001 + __int128{555} * 123457));
}

TEST(Room, WhatStartsBesideAKernelThatTookItAllWaits) {
  Program p;
  const uint32_t copy = p.task(1, 300), big = p.task(0, 1000), small = p.task(1, 50, {copy}),
                 next = p.task(0, 1000, {big});
  for (const uint32_t t : {big, next}) p.graph.demands[p[t].demand].takes_room = true;
  p.graph.demands[p[small].demand].needs_room = true;
  p.task(2, 1);
  p.barrier();
  const Report report = run_steps(machine_of({p}), 2);
  const std::vector<Span>& spans = report.ranks[0].spans;
  const Time begin = spans[big].start;
  EXPECT_EQ(spans[small].start, begin + 300);      // it has begun, as far as its stream can tell
  EXPECT_EQ(spans[small].end, begin + 1000 + 50);  // and runs before the next kernel fills the place
  EXPECT_EQ(spans[small].busy, 50);
  EXPECT_EQ(spans[next].busy, 1000);
  EXPECT_EQ(spans[next].end, begin + 2000);  // which it does not hold up
}

// Between kernels, not in the midst of one; those that run on lose nothing.
TEST(Room, ThereIsSomeBetweenTheKernelsOfATask) {
  for (const auto& [before, end] : {std::pair{300, 500}, {500, 500}, {501, 750}, {760, 1000}}) {
    SCOPED_TRACE(before);
    Program p;
    const uint32_t copy = p.task(1, before), big = p.task(0, 1000), small = p.task(1, 50, {copy}),
                   other = p.task(2, before + 10), late = p.task(2, 30, {other});
    p.graph.demands[p[big].demand].takes_room = true;
    p.graph.demands[p[big].demand].kernels = 4;
    for (const uint32_t t : {small, late}) p.graph.demands[p[t].demand].needs_room = true;
    p.task(3, 1);
    p.barrier();
    const std::vector<Span> spans = run_steps(machine_of({p}), 2).ranks[0].spans;
    const Time begin = spans[big].start;
    EXPECT_EQ(spans[small].end, begin + end + 50);
    EXPECT_EQ(spans[late].end, begin + (before + 10 > end ? end + 250 : end) + 30);
    EXPECT_EQ(spans[big].end, begin + 1000);
  }
}

TEST(Room, ThereIsSomeForWhatStartsFirstOrAtTheSameTime) {
  for (const Time first : {0, 10}) {
    Program p;
    const uint32_t wait = p.task(0, first), big = p.task(0, 1000, {wait}), small = p.task(1, 50);
    p.graph.demands[p[big].demand].takes_room = true;
    p.graph.demands[p[small].demand].needs_room = true;
    p.barrier();
    const std::vector<Span> spans = run_steps(machine_of({p}), 2).ranks[0].spans;
    EXPECT_EQ(spans[small].end - spans[small].start, 50);
  }
}

TEST(Room, OnlyOnTheSameGpu) {
  Program busy, idle;
  const uint32_t big = busy.task(0, 1000);
  busy.graph.demands[busy[big].demand].takes_room = true;
  Program* const both[] = {&busy, &idle};
  uint32_t met[2] = {};
  for (int i = 0; i < 2; ++i) {
    const uint32_t before = both[i]->task(1, 100);
    met[i] = both[i]->meet(0, 2, 200, {before});
    both[i]->graph.demands[(*both[i])[met[i]].demand].needs_room = true;
    both[i]->task(3, 1);
    both[i]->barrier();
  }
  const Report report = run_steps(machine_of({busy, idle}), 2);
  // Both end together, when the one that waited for room has done its part.
  EXPECT_EQ(report.ranks[0].spans[met[0]].end - report.ranks[0].spans[big].start, 1200);
  EXPECT_EQ(report.ranks[1].spans[met[1]].end, report.ranks[0].spans[met[0]].end);
  EXPECT_EQ(report.ranks[0].spans[met[0]].busy, 200);  // the other stands beside it all the time
  EXPECT_EQ(report.ranks[1].spans[met[1]].busy, 1100);
}

}  // namespace
}  // namespace mop::engine
