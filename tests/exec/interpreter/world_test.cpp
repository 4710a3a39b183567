// Random programs on the CPU backend's queues against the same programs in issue order on one thread, and
// what happens when something fails.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "exec/interpreter/summary.h"
#include "sim/base/error.h"
#include "sim/program/builder.h"
#include "tests/exec/interpreter/hashing.h"
#include "tests/exec/interpreter/random_program.h"
#include "tests/exec/support/allocations.h"

namespace mop::test {
namespace {

using namespace program;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void expect_same(const Machine& machine, const Reference& reference, int ranks) {
  const StepProgram& program = machine.program;
  for (int r = 0; r < ranks; ++r) {
    for (OpId id = 0; id < program.ops.size(); ++id)
      ASSERT_EQ(machine.kernels.digests(r)[id], reference.digests(r)[id])
          << "rank " << r << " operation " << id;
    for (BufferId b = 0; b < program.buffers.size(); ++b)
      if (program.buffers[b].persistent) {
        ASSERT_EQ(
            std::memcmp(machine.data(r, b), reference.buffer(r, b).data(), reference.buffer(r, b).size()), 0)
            << "rank " << r << " buffer " << b;
      }
  }
}

class RandomPrograms : public testing::TestWithParam<int> {};

TEST_P(RandomPrograms, EveryOperationSeesWhatItShould) {
  for (int n = 0; n < 8; ++n) {
    const int seed = GetParam() * 8 + n;
    SCOPED_TRACE(seed);
    Random random(static_cast<uint64_t>(seed));
    const int ranks = static_cast<int>(between(random, 1, 8));
    const StepProgram program = random_program(random, ranks);
    Machine::Options options;
    options.guard = between(random, 0, 2) == 0 ? 64 : 0;
    options.commands = std::vector<size_t>{1, 2, 7, 64, 1024}[static_cast<size_t>(between(random, 0, 4))];
    Machine machine(program, ranks, options);
    Reference reference(program, ranks);
    // Several steps and flushes are issued before the host waits.
    for (int64_t step = 0, bursts = between(random, 1, 3); bursts > 0; --bursts) {
      struct Pass {
        int64_t step;
        bool flush;
      };
      std::vector<Pass> passes;
      for (int64_t i = between(random, 1, 3); i > 0; --i)
        passes.push_back({step++, between(random, 0, 3) == 0});
      machine.world->run([&](int rank) {
        interpreter::Interpreter& interpreter = *machine.interpreters[static_cast<size_t>(rank)];
        for (const Pass& pass : passes)
          pass.flush ? interpreter.flush(machine.settings(pass.step))
                     : interpreter.run(machine.settings(pass.step));
        machine.world->backend(rank).synchronize();
      });
      for (const Pass& pass : passes) pass.flush ? reference.flush(pass.step) : reference.run(pass.step);
    }
    expect_same(machine, reference, ranks);
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, RandomPrograms, testing::Range(0, 12));

// The check above can fail: with a dependency less, some program goes wrong.
TEST(World, AMissingDependencyIsSeen) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "races on purpose";
#endif
  for (int seed = 0; seed < 200; ++seed) {
    Random random(static_cast<uint64_t>(seed));
    StepProgram program = random_program(random, 2);
    if (program.dependencies.empty()) continue;
    program.dependencies.clear();
    Machine machine(program, 2, {});
    Reference reference(program, 2);
    for (int64_t step = 0; step < 3; ++step) {
      machine.step(step);
      reference.run(step);
    }
    for (int r = 0; r < 2; ++r)
      if (machine.kernels.digests(r) != reference.digests(r)) return;
  }
  FAIL() << "streams without waits computed the same";
}

class Failures : public testing::TestWithParam<int> {};

TEST_P(Failures, EndTheRunOnAllRanksAtOnce) {
  for (int n = 0; n < 5; ++n) {
    const int seed = 1000 + GetParam() * 5 + n;
    SCOPED_TRACE(seed);
    Random random(static_cast<uint64_t>(seed));
    const int ranks = static_cast<int>(between(random, 1, 8));
    const StepProgram program = random_program(random, ranks);
    Machine::Options options;
    options.commands = static_cast<size_t>(between(random, 1, 9));
    Machine machine(program, ranks, options);
    const int bad_rank = static_cast<int>(between(random, 0, ranks - 1));
    OpId bad = 0;
    do bad = static_cast<OpId>(between(random, 0, static_cast<int64_t>(program.ops.size()) - 1));
    while (program.ops[bad].does.deferred);
    const bool user = between(random, 0, 1) == 0;
    std::atomic<int> running = 0;
    machine.kernels.interrupt = [&](int rank, const interpreter::Launch& launch) {
      if (rank != bad_rank || launch.call.id != bad || launch.step.number != 1) return;
      if (user) throw UserError("the data is bad");
      throw std::runtime_error("the kernel is bad");
    };
    machine.step(0);
    const auto start = Clock::now();
    std::string said;
    try {
      machine.world->run([&](int rank) {
        ++running;
        for (int64_t step = 1; step < 50; ++step)
          machine.interpreters[static_cast<size_t>(rank)]->run(machine.settings(step));
        machine.world->backend(rank).synchronize();
      });
    } catch (const UserError& error) {
      EXPECT_TRUE(user);
      said = error.what();
    } catch (const InternalError& error) {
      EXPECT_FALSE(user);
      said = error.what();
    }
    EXPECT_LT(seconds_since(start), 2);
    EXPECT_EQ(running, ranks);
    EXPECT_EQ(said, "rank " + std::to_string(bad_rank) + ", " + program.op_name(bad) +
                        (user ? ": the data is bad" : ": the kernel is bad"));
    // Unusable, and says why.
    EXPECT_ANY_THROW(machine.step(2));
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, Failures, testing::Range(0, 8));

StepProgram collective_chain(int ranks) {
  Builder b;
  const uint16_t world = b.group(Axis::world, ranks, 1);
  const BufferId x = b.persistent("x", 64, Holds::weights);
  const View view{0, 0, 1, 16, 16, 1, 0, Type::i32};
  OpSpec spec{OpKind::all_gather, Stream::gather};
  spec.group = world;
  b.op(spec, {{x, view}}, {{x, view}});
  b.op({OpKind::add, Stream::compute}, {{x, view}}, {{x, view}});
  b.op(spec, {{x, view}}, {{x, view}});
  StepProgram program = b.finish();
  program.runnable = true;
  return program;
}

TEST(World, AFailingBodyFreesTheOthers) {
  const StepProgram program = collective_chain(4);
  Machine machine(program, 4, {});
  const auto start = Clock::now();
  try {
    machine.world->run([&](int rank) {
      if (rank == 2) throw InternalError("no step today");
      machine.interpreters[static_cast<size_t>(rank)]->run(machine.settings(0));
      machine.world->backend(rank).synchronize();
    });
    FAIL();
  } catch (const InternalError& error) {
    EXPECT_STREQ(error.what(), "rank 2: no step today");
  }
  EXPECT_LT(seconds_since(start), 2);
}

TEST(World, TheFirstOfSeveralFailuresIsThrown) {
  const StepProgram program = collective_chain(3);
  Machine machine(program, 3, {});
  std::atomic<int> arrived = 0, failed = 0;
  machine.kernels.interrupt = [&](int rank, const interpreter::Launch& launch) {
    if (launch.call.id != 1) return;
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
    if (rank != 1) {
      while (failed == 0) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    ++failed;
    throw UserError("failure");
  };
  try {
    machine.step(0);
    FAIL();
  } catch (const UserError& error) {
    EXPECT_EQ(std::string(error.what()), "rank 1, " + program.op_name(1) + ": failure");
    EXPECT_EQ(failed, 3) << "nothing runs any more";
  }
}

TEST(World, AFailureAfterTheRunIsThrownByTheNext) {
  const StepProgram program = collective_chain(2);
  Machine machine(program, 2, {});
  machine.kernels.interrupt = [](int rank, const interpreter::Launch& launch) {
    if (rank == 1 && launch.call.id == 1) throw UserError("late");
  };
  const auto issue = [&](int rank) {
    machine.interpreters[static_cast<size_t>(rank)]->run(machine.settings(0));
  };
  try {
    machine.world->run(issue);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    machine.world->run(issue);
    FAIL();
  } catch (const UserError& error) {
    EXPECT_EQ(std::string(error.what()), "rank 1, " + program.op_name(1) + ": late");
  }
}

TEST(World, IsDestroyedInTheMiddle) {
  const StepProgram program = collective_chain(3);
  Machine machine(program, 3, {});
  // Rank 2 does not come: the others' streams wait in the collective.
  machine.world->run([&](int rank) {
    if (rank != 2) machine.interpreters[static_cast<size_t>(rank)]->run(machine.settings(0));
  });
  const auto start = Clock::now();
  machine.world.reset();
  EXPECT_LT(seconds_since(start), 2);
}

TEST(World, RanksAtDifferentCollectivesAreToldApart) {
  Builder b;
  const uint16_t world = b.group(Axis::world, 2, 1);
  const BufferId x = b.persistent("x", 64, Holds::weights);
  const View view{0, 0, 1, 16, 16, 1, 0, Type::i32};
  OpSpec spec{OpKind::all_gather, Stream::gather};
  spec.group = world;
  b.op(spec, {{x, view}}, {{x, view}});
  StepProgram one = b.finish(), two = one;
  one.runnable = two.runnable = true;
  two.ops[0].kind = OpKind::all_reduce;
  HashKernels kernels({&one, &two}, false);
  const interpreter::MemoryPlan plan = interpreter::plan_memory(one);
  interpreter::HostBytes bytes(plan.arenas.hbm.bytes), more(plan.arenas.hbm.bytes);
  cpu::World ranks({&one, &two}, kernels.kernels());
  interpreter::Interpreter a(one, {one, plan, bytes.data(), nullptr}, ranks.backend(0), 0),
      c(two, {two, plan, more.data(), nullptr}, ranks.backend(1), 1);
  try {
    ranks.run([&](int rank) {
      (rank == 0 ? a : c).run({});
      ranks.backend(rank).synchronize();
    });
    FAIL();
  } catch (const InternalError& error) {
    const std::string said = error.what();
    EXPECT_NE(said.find("all_gather"), std::string::npos) << said;
    EXPECT_NE(said.find("all_reduce"), std::string::npos) << said;
  }
}

TEST(World, AStepAllocatesNothing) {
  if (!Allocations::counted()) GTEST_SKIP() << "sanitizers bring their own malloc";
  for (uint64_t seed = 0; seed < 5; ++seed) {
    Random random(seed);
    const StepProgram program = random_program(random, 4);
    Machine::Options options;
    options.guard = 64;
    options.trace_spans = 1000;
    Machine machine(program, 4, options);
    machine.step(0);
    int64_t step = 1;
    const std::function<void(int)> body = [&](int rank) {
      interpreter::Interpreter& interpreter = *machine.interpreters[static_cast<size_t>(rank)];
      interpreter.run(machine.settings(step));
      interpreter.flush(machine.settings(step));
      machine.world->backend(rank).synchronize();
    };
    machine.world->run(body);
    const Allocations allocations;
    for (step = 2; step < 5; ++step) machine.world->run(body);
    EXPECT_EQ(allocations.count(), 0);
  }
}

TEST(World, AllocationsAreCounted) {
  if (!Allocations::counted()) GTEST_SKIP() << "sanitizers bring their own malloc";
  const Allocations allocations;
  std::thread([] { delete new volatile int(3); }).join();
  EXPECT_GE(allocations.count(), 1);
}

TEST(World, TracesWhatRan) {
  Random random(3);
  const StepProgram program = random_program(random, 3);
  Machine::Options options;
  options.trace_spans = 1000;
  Machine machine(program, 3, options);
  machine.step(0);
  machine.world->clear_trace();
  const int64_t before = Clock::now().time_since_epoch().count();
  machine.step(1);
  const int64_t after = Clock::now().time_since_epoch().count();
  EXPECT_EQ(machine.world->untraced(), 0);

  std::vector<RankTimeline> timelines;
  size_t events = 0;
  for (int r = 0; r < 3; ++r) {
    std::vector<int64_t> executions(program.ops.size());
    timelines.push_back({"rank " + std::to_string(r), &program, machine.world->trace(r)});
    std::array<int64_t, kStreams> end{};
    for (const OpSpan& span : timelines.back().spans) {
      ++executions[span.op];
      EXPECT_GE(span.start, before);
      EXPECT_LE(span.start, span.end);
      EXPECT_EQ(span.busy, span.end - span.start);
      EXPECT_LE(span.end, after);
      int64_t& stream_end = end[static_cast<size_t>(program.ops[span.op].stream)];
      EXPECT_GE(span.start, stream_end) << "a stream runs one at a time";
      stream_end = span.end;
    }
    events += timelines.back().spans.size();
    for (OpId id = 0; id < program.ops.size(); ++id) {
      const uint32_t region = program.ops[id].region;
      EXPECT_EQ(executions[id], region == 0 ? 1 : rounds_of(program, program.regions[region].plan, r, 1));
    }
  }
  const std::string path = testing::TempDir() + "world_trace.json";
  write_timeline(path, timelines);
  std::ifstream file(path);
  size_t read = 0;
  const nlohmann::json trace = nlohmann::json::parse(file);
  for (const auto& event : trace.at("traceEvents")) {
    if (event.at("ph") != "X") continue;
    ++read;
    EXPECT_GE(event.at("ts").get<double>(), 0);
  }
  EXPECT_EQ(read, events);
}

TEST(World, ATraceThatIsFullCounts) {
  const StepProgram program = collective_chain(2);
  Machine::Options options;
  options.trace_spans = 3;
  Machine machine(program, 2, options);
  for (int64_t step = 0; step < 4; ++step) machine.step(step);
  EXPECT_EQ(machine.world->trace(0).size(), 3u + 3u);
  EXPECT_EQ(machine.world->untraced(), 2 * (5 + 1));
}

}  // namespace
}  // namespace mop::test
