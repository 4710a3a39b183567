// What the interpreter enqueues, command by command.
#include "exec/interpreter/interpreter.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <deque>
#include <map>

#include "exec/interpreter/memory.h"
#include "sim/base/error.h"
#include "sim/program/builder.h"

namespace mop::interpreter {
namespace {

using namespace program;

constexpr Stream kA = Stream::compute, kB = Stream::gather, kC = Stream::h2d;

// Writes down launches as "op/iteration" and waits as "<op/iteration", the execution recorded last.
class Log final : public Backend {
 public:
  void reserve(uint32_t events) override { recorded_.assign(events, "nothing"); }
  void launch(Stream stream, const Launch& launch) override {
    const std::string name = fmt::format("{}/{}", launch.call.id, launch.iteration);
    last_[stream] = name;
    lines.push_back(name);
    launches.push_back(launch);
  }
  void record(Stream stream, uint32_t event) override { recorded_[event] = last_[stream]; }
  void wait(Stream, uint32_t event) override { lines.push_back("<" + recorded_[event]); }
  int64_t rounds(uint32_t event, const Call& plan) override {
    lines.push_back("rounds of " + recorded_[event]);
    EXPECT_EQ(plan.op->kind, OpKind::plan_routing);
    const int64_t next = trips.front();
    trips.pop_front();
    return next;
  }
  void synchronize() override {}

  std::vector<std::string> take() { return std::exchange(lines, {}); }
  std::vector<std::string> lines;
  std::vector<Launch> launches;
  std::deque<int64_t> trips;

 private:
  std::map<Stream, std::string> last_;
  std::vector<std::string> recorded_;
};

constexpr View kView{0, 0, 1, 4, 4, 1, 0, Type::f32};

struct Program : Builder {
  OpId on(Stream stream, std::initializer_list<program::Operand> reads,
          std::initializer_list<program::Operand> writes, bool deferred = false) {
    OpSpec spec{OpKind::add, stream};
    spec.does.deferred = deferred;
    return op(spec, reads, writes);
  }
  BufferId keep(const char* label = "kept") { return persistent(label, 16, Holds::weights); }
  BufferId make(const char* label = "value") { return buffer(label, 16, Holds::staging); }
  StepProgram done(OpId plan = kNoOp) {
    StepProgram program = finish();
    for (size_t r = 1; r < program.regions.size(); ++r) program.regions[r].plan = plan;
    program.runnable = true;
    return program;
  }
};

struct Running {
  explicit Running(StepProgram p, int64_t rank = 0)
      : program(std::move(p)),
        plan(plan_memory(program)),
        hbm(plan.arenas.hbm.bytes),
        host(plan.arenas.host.bytes),
        interpreter(program, {program, plan, hbm.data(), host.data()}, log, rank) {}
  StepProgram program;
  MemoryPlan plan;
  HostBytes hbm, host;
  Log log;
  Interpreter interpreter;
};

using Lines = std::vector<std::string>;

TEST(Interpreter, WaitsForTheStepBeforeFromTheSecondStepOn) {
  Program p;
  const BufferId x = p.keep();
  p.on(kA, {{x, kView}}, {});
  p.on(kB, {}, {{x, kView}});
  Running run(p.done());
  run.interpreter.run({});
  EXPECT_EQ(run.log.take(), (Lines{"0/0", "<0/0", "1/0"}));
  run.interpreter.run({});
  EXPECT_EQ(run.log.take(), (Lines{"<1/0", "0/1", "<0/1", "1/1"}));
}

StepProgram rounds_program() {
  Program p;
  const BufferId counts = p.keep(), sum = p.keep();
  const BufferId rounds = p.make("rounds");
  const OpId plan = p.op({OpKind::plan_routing, kA}, {{counts, kView}}, {{rounds, kView}});
  p.begin_repeat(0);
  const BufferId sent = p.make("sent");
  p.on(kB, {}, {{sent, kView}});                               // 1: two rounds ahead of 2 at most
  p.on(kA, {{sent, kView}, {rounds, kView}}, {{sum, kView}});  // 2
  p.end_repeat();
  p.on(kC, {{sum, kView}}, {});  // 3
  return p.done(plan);
}

TEST(Interpreter, RoundsWaitForTheirSlotAndNoLonger) {
  Running run(rounds_program());
  run.log.trips = {3, 1, 2};
  run.interpreter.run({});
  EXPECT_EQ(run.log.take(), (Lines{"0/0", "rounds of 0/0",        //
                                   "1/0", "<1/0", "2/0",          //
                                   "1/1", "<1/1", "2/1",          //
                                   "<2/0", "1/2", "<1/2", "2/2",  //
                                   "<2/2", "3/0"}));
  // Rounds count on: the fourth one uses slot 1, which the second one left. Operation 3 read the sum of the
  // step before.
  run.interpreter.run({});
  EXPECT_EQ(run.log.take(),
            (Lines{"0/1", "rounds of 0/1", "<2/1", "1/3", "<1/3", "<3/0", "2/3", "<2/3", "3/1"}));
  run.interpreter.run({});
  EXPECT_EQ(run.log.take(), (Lines{"0/2", "rounds of 0/2", "<2/2", "1/4", "<1/4", "<3/1", "2/4",  //
                                   "<2/3", "1/5", "<1/5", "2/5", "<2/5", "3/2"}));
  // Slots follow the iterations.
  const std::byte* slots[2] = {};
  for (const Launch& launch : run.log.launches) {
    if (launch.call.id != 1) continue;
    const std::byte*& slot = slots[launch.iteration % 2];
    if (slot != nullptr) {
      EXPECT_EQ(launch.call.out[0].data, slot);
    }
    slot = launch.call.out[0].data;
  }
  EXPECT_EQ(std::abs(slots[1] - slots[0]), 16);
  // call.round counts from the step's first.
  EXPECT_EQ(run.log.launches.back().call.id, 3u);
  EXPECT_EQ(run.log.launches[run.log.launches.size() - 2].call.round, 1);
}

TEST(Interpreter, DeferredOperationsActFromTheSecondStepAndInAFlush) {
  Program p;
  const BufferId w = p.keep(), g = p.keep();
  p.on(kB, {{g, kView}}, {{w, kView}}, true);
  p.on(kA, {{w, kView}}, {{g, kView}});
  Running run(p.done());
  Step step;
  step.number = 7;
  run.interpreter.flush(step);  // nothing is pending
  EXPECT_TRUE(run.log.take().empty());
  run.interpreter.run(step);
  Lines lines = run.log.take();
  EXPECT_EQ(lines.back(), "1/0");
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "0/0"), 0);
  run.interpreter.run(step);
  EXPECT_EQ(run.log.take(), (Lines{"<1/0", "0/1", "<0/1", "1/1"}));
  step.number = 9;
  run.interpreter.flush(step);
  lines = run.log.take();
  ASSERT_GE(lines.size(), 2u);
  EXPECT_EQ(lines[0], "<1/1");
  EXPECT_EQ(lines[1], "0/2");
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "1/2"), 0);
  EXPECT_EQ(run.log.launches.back().step.number, 9);
  EXPECT_EQ(run.log.launches.back().pass, 2);
  run.interpreter.flush(step);
  EXPECT_TRUE(run.log.take().empty());
  run.interpreter.run(step);
  EXPECT_EQ(run.log.take().back(), "1/3");
}

TEST(Interpreter, AFlushKeepsARegionsCount) {
  Program p;
  const BufferId w = p.keep();
  p.on(kC, {{w, kView}}, {{w, kView}}, true);
  const BufferId rounds = p.make("rounds");
  const OpId plan = p.op({OpKind::plan_routing, kA}, {{w, kView}}, {{rounds, kView}});
  p.begin_repeat(0);
  const BufferId sent = p.make("sent");
  const OpId send = p.on(kB, {{rounds, kView}}, {{sent, kView}});
  p.on(kA, {{sent, kView}}, {});
  p.end_repeat();
  Running run(p.done(plan));
  run.log.trips = {1, 1};
  run.interpreter.run({});
  run.interpreter.flush({});
  run.interpreter.run({});
  EXPECT_TRUE(run.log.trips.empty()) << "a flush asks for no rounds";
  std::vector<int64_t> iterations;
  for (const Launch& launch : run.log.launches)
    if (launch.call.id == send) iterations.push_back(launch.iteration);
  EXPECT_EQ(iterations, (std::vector<int64_t>{0, 2}));
}

TEST(Interpreter, OperandsAreWhereTheViewSays) {
  Program p;
  const uint16_t group = p.group(Axis::shard, 3, 2);
  const BufferId x = p.persistent("x", 4096, Holds::weights),
                 y = p.persistent("y", 512, Holds::weights, -1, Space::host);
  OpSpec spec{OpKind::all_gather, kA};
  spec.group = group;
  p.op(spec, {{x, {64, 32, 2, 3, 100, 1, 0, Type::bf16}}, {}}, {{y, kView}});
  for (int64_t rank = 0; rank < 12; ++rank) {
    StepProgram program = Program(p).done();
    program.uses[1].buffer = kNoBuffer;
    Running run(program, rank);
    run.interpreter.run({});
    const Call& call = run.log.launches[0].call;
    const int64_t index = rank / 2 % 3;
    EXPECT_EQ(call.index, index);
    EXPECT_EQ(call.size, 3);
    ASSERT_EQ(call.in.size(), 2u);
    ASSERT_EQ(call.out.size(), 1u);
    EXPECT_EQ(call.in[0].data, run.hbm.data() + run.plan.arenas.hbm.offset[x] + 64 + 32 * index);
    EXPECT_FALSE(call.in[1]);
    EXPECT_EQ(call.out[0].data, run.host.data() + run.plan.arenas.host.offset[y]);
    EXPECT_EQ(run.interpreter.highest_byte(Space::hbm),
              run.plan.arenas.hbm.offset[x] + 64 + 32 * index + 2 * (100 + 3));
    EXPECT_EQ(run.interpreter.highest_byte(Space::host), run.plan.arenas.host.offset[y] + 16);
  }
}

template <typename Change>
std::string refused(Change change) {
  StepProgram program = rounds_program();
  change(program);
  try {
    Running run(std::move(program));
  } catch (const InternalError& error) {
    return error.what();
  }
  ADD_FAILURE() << "not refused";
  return "";
}

TEST(Interpreter, RefusesWhatItCannotRun) {
  EXPECT_NE(refused([](StepProgram& p) { p.uses[0].view.rows = 2; }).find("'kept'"), std::string::npos);
  EXPECT_NE(refused([](StepProgram& p) { p.uses[0].view.offset = -2; }).find("plan_routing"),
            std::string::npos);
  EXPECT_NE(refused([](StepProgram& p) { p.uses[0].view.offset = 1; }).find("[1, 17)"), std::string::npos);
  // One round's slot, not the whole buffer.
  EXPECT_NE(refused([](StepProgram& p) { p.uses[2].view.cols = 5; }).find("which has 16"), std::string::npos);
  EXPECT_NE(refused([](StepProgram& p) { p.regions[1].plan = kNoOp; }).find("no plan"), std::string::npos);
  EXPECT_NE(refused([](StepProgram& p) {
              p.dependencies.push_back({3, 0, 0});
            }).find("issued later"),
            std::string::npos);
  EXPECT_NE(refused([](StepProgram& p) {
              p.dependencies.push_back({3, 0, 2});
            }).find("long over"),
            std::string::npos);
  EXPECT_NE(refused([](StepProgram& p) { p.runnable = false; }).find("views"), std::string::npos);
  // The sum is used behind the rounds as well: it can have no slot a round.
  EXPECT_NE(refused([](StepProgram& p) { p.buffers[1].slots = 2; }).find("outside of rounds"),
            std::string::npos);
  EXPECT_NE(refused([](StepProgram& p) { p.buffers[2].last = 0; }).find("gone when the host asks"),
            std::string::npos);
}

}  // namespace
}  // namespace mop::interpreter
