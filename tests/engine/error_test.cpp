// Whatever is wrong with a machine is said, with the numbers needed to find it.
#include "sim/base/error.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/engine/program.h"

namespace mop::engine {
namespace {

using testing::HasSubstr;

std::string error(const Machine& machine) {
  try {
    run(machine);
  } catch (const InternalError& error) {
    return error.what();
  }
  return "no error";
}

Machine one_task() {
  Program program;
  program.task(0, 10, {}, {{Resource::sm, kAll}});
  return machine_of({program});
}

TEST(Error, DeadlockNamesWhoWaitsForWhat) {
  // Two communicators, used in opposite orders.
  Program a, b;
  a.meet(0, 1, 10);
  a.meet(1, 1, 10);
  b.meet(1, 2, 10);
  b.meet(0, 2, 10);
  const std::string said = error(machine_of({a, b}));
  EXPECT_THAT(said, HasSubstr("deadlock at 0 ns after 0 tasks"));
  EXPECT_THAT(said, HasSubstr("rank 0 stream 1 task 0 of step 0 waits for 1 of 2 ranks at meeting point 0"));
  EXPECT_THAT(said, HasSubstr("rank 1 stream 2 task 0 of step 0 waits for 1 of 2 ranks at meeting point 1"));
}

TEST(Error, DeadlockBehindABlockingTask) {
  Program a, b;
  a[a.meet(0, 1, 10)].blocks_launch = true;
  a.meet(1, 2, 10);
  b[b.meet(1, 2, 10)].blocks_launch = true;
  b.meet(0, 1, 10);
  EXPECT_THAT(error(machine_of({a, b})), HasSubstr("waits to be launched after task 0"));
}

TEST(Error, Indices) {
  Machine machine = one_task();
  machine.graphs[0].tasks[0].demand = 3;
  EXPECT_THAT(error(machine), HasSubstr("task graph 0: task 0 has demand 3 of 1"));
  machine = one_task();
  machine.graphs[0].tasks[0].stream = 16;
  EXPECT_THAT(error(machine), HasSubstr("task 0 is on stream 16 of 16"));
  machine = one_task();
  machine.graphs[0].edges.push_back({0, 1, 0});
  EXPECT_THAT(error(machine), HasSubstr("edge 0 -> 1 leaves the 1 tasks"));
  machine = one_task();
  machine.graphs[0].edges.push_back({0, 0, 2});
  EXPECT_THAT(error(machine), HasSubstr("spans 2 steps"));
  machine = one_task();
  machine.ranks[0].graph = 1;
  EXPECT_THAT(error(machine), HasSubstr("rank 0 runs task graph 1 of 1"));
  machine = one_task();
  machine.ranks[0].node = 1;
  EXPECT_THAT(error(machine), HasSubstr("rank 0 is on node 1 of 1"));
  machine = one_task();
  machine.ranks[0].multiplicity = 0;
  EXPECT_THAT(error(machine), HasSubstr("multiplicity 0"));
  machine = one_task();
  machine.ranks[0].multiplicity = 5000;
  EXPECT_THAT(error(machine), HasSubstr("more than 4096 ranks"));
}

TEST(Error, NothingToRun) {
  Machine machine = one_task();
  machine.graphs[0].tasks.clear();
  EXPECT_THAT(error(machine), HasSubstr("task graph 0: it has no tasks"));
  EXPECT_THAT(error({}), HasSubstr("no ranks"));
  EXPECT_THROW(run(one_task(), {.max_steps = 0}), InternalError);
}

TEST(Error, EdgesThatGoBackAreCycles) {
  Program program;
  program.task(0, 1);
  program.task(1, 1);
  program.graph.edges.push_back({1, 0, 0});
  EXPECT_THAT(error(machine_of({program})), HasSubstr("edge 1 -> 0 goes backwards: a cycle"));
  program.graph.edges = {{1, 1, 0}};
  EXPECT_THAT(error(machine_of({program})), HasSubstr("cycle"));
}

TEST(Error, Demands) {
  const auto with = [](auto change) {
    Machine machine = one_task();
    change(machine.graphs[0].demands[0]);
    return error(machine);
  };
  EXPECT_THAT(with([](Demand& d) { d.duration = -1; }), HasSubstr("demand 0 lasts -1 ns"));
  EXPECT_THAT(with([](Demand& d) { d.duration = Time{1} << 43; }), HasSubstr("not 0 to 2^42"));
  EXPECT_THAT(with([](Demand& d) { d.weight = 0; }), HasSubstr("weight 0"));
  EXPECT_THAT(with([](Demand& d) { d.use[0].share = kAll + 1; }), HasSubstr("more than all of it"));
  EXPECT_THAT(with([](Demand& d) { d.uses = 9; }), HasSubstr("9 uses"));
  EXPECT_THAT(with([](Demand& d) { d.use[0].resource = static_cast<Resource>(kResources); }),
              HasSubstr(fmt::format("resource {0} of {0}", kResources)));
  EXPECT_THAT(with([](Demand& d) { d.add(Resource::sm, 1); }), HasSubstr("names sm twice"));
}

TEST(Error, Meetings) {
  Program program, other;
  program.meet(0, 1, 10);
  other.meet(0, 1, 10);
  other.meet(0, 1, 10);
  EXPECT_THAT(error(machine_of({program, other})),
              HasSubstr("rank 1 has 2 tasks a step at meeting point 0, rank 0 has 1"));
  Machine machine = machine_of({program});
  machine.meeting_size = {2};
  EXPECT_THAT(error(machine), HasSubstr("1 ranks use meeting point 0, which is for 2"));
  machine = machine_of({program});
  machine.ranks[0].meeting = {4};
  EXPECT_THAT(error(machine), HasSubstr("meeting point 4 of 1"));
  machine.ranks[0].meeting.clear();
  EXPECT_THAT(error(machine), HasSubstr("uses communicator 0 but has meeting points for 0"));
  program.meet(1, 2, 10);
  machine = machine_of({program});
  machine.ranks[0].meeting = {0, 0};
  EXPECT_THAT(error(machine), HasSubstr("rank 0 meets itself"));
  program.meet(0, 2, 10);
  EXPECT_THAT(error(machine_of({program})),
              HasSubstr("task 2 uses communicator 0 from stream 2, earlier tasks from stream 1"));
}

}  // namespace
}  // namespace mop::engine
