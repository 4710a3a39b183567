// Guard zones, numbers that are not finite, and the summary of a step's timeline.
#include "exec/interpreter/checks.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "exec/interpreter/summary.h"
#include "sim/base/error.h"
#include "sim/program/builder.h"
#include "tests/exec/interpreter/hashing.h"
#include "tests/exec/interpreter/random_program.h"

namespace mop::test {
namespace {

using namespace program;
using interpreter::Launch;

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const InternalError& error) {
    return error.what();
  }
  return "";
}

TEST(Guards, LieOutsideOfEverySlotAndOverlapNothingAlive) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    Random random(seed);
    const StepProgram program = random_program(random, 2);
    const interpreter::MemoryPlan plan = interpreter::plan_memory(program, 100);
    EXPECT_EQ(plan.guard, 512);
    interpreter::HostBytes hbm(plan.arenas.hbm.bytes), host(plan.arenas.host.bytes);
    const interpreter::Memory memory(program, plan, hbm.data(), host.data());
    for (BufferId b = 0; b < program.buffers.size(); ++b) {
      const Buffer& buffer = program.buffers[b];
      const Arena& arena = buffer.space == Space::hbm ? plan.arenas.hbm : plan.arenas.host;
      if (arena.offset[b] == kNotHere) continue;
      for (int64_t slot = 0; slot < buffer.slots; ++slot) {
        const int64_t at = memory.at(b, slot) - memory.base(buffer.space);
        EXPECT_EQ(at, arena.offset[b] + 512 + slot * (1024 + buffer.bytes / buffer.slots));
        EXPECT_LE(at + memory.slot_bytes(b) + 512, arena.bytes);
      }
    }
  }
}

// Any operation that writes next to any of its operands is named, on programs that are fine otherwise. On one
// stream: else another user of the buffer may be the first to see it.
TEST(Guards, NameWhoBreaksThem) {
  int broken = 0;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    Random random(seed);
    const int ranks = static_cast<int>(between(random, 1, 3));
    StepProgram program = random_program(random, ranks);
    for (Op& op : program.ops) op.stream = Stream::compute;
    Machine::Options options;
    options.guard = 512;
    Machine machine(program, ranks, options);
    const int rank = static_cast<int>(between(random, 0, ranks - 1));
    const auto id = static_cast<OpId>(between(random, 0, static_cast<int64_t>(program.ops.size()) - 1));
    const Op& op = program.ops[id];
    if (op.use_count == 0) continue;
    const auto u = op.uses + static_cast<uint32_t>(between(random, 0, op.use_count - 1));
    const BufferId b = program.uses[u].buffer;
    const bool before = between(random, 0, 1) == 0;
    const int64_t round =
        op.region == 0 ? 0
                       : between(random, 0, rounds_of(program, program.regions[op.region].plan, rank, 1) - 1);
    const int64_t distance = between(random, 0, 511);
    machine.kernels.interrupt = [&](int r, const Launch& launch) {
      if (r != rank || launch.call.id != id || launch.step.number != 1 || launch.call.round != round) return;
      const interpreter::Memory& memory = machine.memories[static_cast<size_t>(rank)];
      std::byte* const slot = memory.at(b, launch.iteration % program.buffers[b].slots);
      std::byte* const at = before ? slot - 1 - distance : slot + memory.slot_bytes(b) + distance;
      *at ^= std::byte{1};
    };
    machine.step(0);
    const std::string said = message_of([&] { machine.step(1); });
    EXPECT_NE(said.find("operation " + std::to_string(id) + " "), std::string::npos) << said;
    EXPECT_NE(said.find((before ? "bytes before buffer '" : "bytes behind buffer '") +
                        program.buffer_name(b) + "'"),
              std::string::npos)
        << said;
    ++broken;
  }
  EXPECT_GT(broken, 20);
}

// Where the operation that opens a buffer is left out, nobody wrote its guards in this step.
TEST(Guards, OfABufferThatWasNotOpenedAreNotChecked) {
  Builder b;
  const View view{0, 0, 1, 16, 16, 1, 0, Type::i32};
  const BufferId x = b.buffer("x", 64, Holds::staging);
  OpSpec opener{OpKind::add};
  opener.does.deferred = true;
  b.op(opener, {}, {{x, view}});
  b.op({OpKind::add}, {}, {{x, view}});
  StepProgram program = b.finish();
  program.runnable = true;
  Machine::Options options;
  options.guard = 512;
  Machine machine(program, 1, options);
  machine.step(0);
  machine.step(1);
  machine.kernels.interrupt = [&](int, const Launch& launch) {
    if (launch.call.id == 1) launch.call.out[0].data[64] ^= std::byte{1};
  };
  EXPECT_NE(message_of([&] { machine.step(2); }).find("behind buffer 'x'"), std::string::npos);
}

// compute: 0 -> 1 -> 2, floats.
StepProgram chain(Type type) {
  Builder b;
  const View view{0, 0, 2, 3, 4, 2, 8, type};
  const int64_t bytes = interpreter::extent(view);
  const BufferId x = b.persistent("x", bytes, Holds::weights),
                 y = b.buffer("y", bytes, Holds::other_activations),
                 z = b.persistent("z", bytes, Holds::weights);
  b.op({OpKind::add}, {{x, view}}, {{y, view}});
  b.op({OpKind::add, Stream::gather}, {{y, view}}, {{z, view}});
  b.op({OpKind::add}, {{z, view}}, {{x, view}});
  StepProgram program = b.finish();
  program.runnable = true;
  return program;
}

template <typename T>
void expect_found(Type type, T bad, T good) {
  const StepProgram program = chain(type);
  const interpreter::MemoryPlan plan = interpreter::plan_memory(program);
  interpreter::HostBytes bytes(plan.arenas.hbm.bytes);
  const interpreter::Memory memory(program, plan, bytes.data(), nullptr);
  interpreter::Checks checks(program, memory, 5, true);
  const View view = program.uses[1].view;
  interpreter::Operand out{memory.at(program.uses[1].buffer, 0), view};
  Launch launch;
  launch.call.op = &program.ops[0];
  launch.call.out = std::span(&out, 1);
  for (int64_t at = 0; at < 16; ++at) {
    for (int64_t i = 0; i < interpreter::extent(view) / size_of(type); ++i)
      std::memcpy(out.data + i * size_of(type), i == at ? &bad : &good, sizeof bad);
    interpreter::Checks fresh(program, memory, 5, true);
    fresh.before(launch);
    fresh.after(launch);
    const bool inside = at % 4 < 3 && at < 15;
    EXPECT_EQ(fresh.first_not_finite().has_value(), inside) << at;
  }
  // The earliest issued stays, whatever is found first.
  std::memcpy(out.data, &bad, sizeof bad);
  launch.issue = 10;
  checks.after(launch);
  launch.issue = 4;
  checks.after(launch);
  launch.issue = 7;
  checks.after(launch);
  ASSERT_TRUE(checks.first_not_finite());
  EXPECT_EQ(checks.first_not_finite()->issue, 4);
  EXPECT_EQ(checks.first_not_finite()->what,
            "rank 5: output 0 of operation 0 (forward other add), round 0, is not finite");
}

TEST(NotFinite, IsFoundWhereverTheViewReaches) {
  expect_found<float>(Type::f32, std::numeric_limits<float>::quiet_NaN(), 1e38f);
  expect_found<float>(Type::f32, -std::numeric_limits<float>::infinity(), -0.f);
  expect_found<double>(Type::f64, std::numeric_limits<double>::infinity(), 1e308);
  expect_found<uint16_t>(Type::bf16, 0x7f80, 0x7f7f);
  expect_found<uint16_t>(Type::bf16, 0xffc1, 0xff7f);
}

TEST(NotFinite, IntegersAlwaysAre) {
  Random random(4);
  const StepProgram program = random_program(random, 2);
  Machine::Options options;
  options.finite = true;
  Machine machine(program, 2, options);
  for (int64_t step = 0; step < 5; ++step) machine.step(step);
  for (const auto& checks : machine.checks) EXPECT_FALSE(checks->first_not_finite());
}

TEST(Summary, CountsEveryNanosecondOnce) {
  Builder b;
  const BufferId x = b.persistent("x", 64, Holds::weights);
  for (int s = 0; s < kStreams; ++s) b.op({OpKind::add, static_cast<Stream>(s)}, {x}, {});
  const StepProgram program = b.finish();
  Random random(11);
  for (int n = 0; n < 50; ++n) {
    constexpr int64_t kEnd = 300;
    std::vector<OpSpan> spans;
    std::array<std::array<bool, kEnd>, kStreams> works{};
    for (size_t s = 0; s < kStreams; ++s)
      for (int64_t at = between(random, 0, 100); at < kEnd; at += between(random, 0, 120)) {
        const int64_t end = std::min(kEnd, at + between(random, 0, 60));
        spans.push_back({static_cast<OpId>(s), 1000 + at, 1000 + end});
        for (; at < end; ++at) works[s][static_cast<size_t>(at)] = true;
      }
    std::shuffle(spans.begin(), spans.end(), random);
    const interpreter::StepSummary summary = interpreter::summarize(program, spans);
    int64_t busy = 0, exposed = 0;
    std::array<int64_t, kStreams> by_stream{}, exposed_by_stream{};
    for (size_t t = 0; t < kEnd; ++t) {
      bool communicates = false;
      for (size_t s = 0; s < kStreams; ++s) {
        by_stream[s] += works[s][t];
        exposed_by_stream[s] += works[s][t] && !works[0][t];
        communicates |= s != 0 && s != static_cast<size_t>(Stream::host) && works[s][t];
      }
      busy += works[0][t];
      exposed += communicates && !works[0][t];
    }
    EXPECT_EQ(summary.compute_busy, busy);
    EXPECT_EQ(summary.exposed_communication, exposed);
    EXPECT_EQ(summary.busy, by_stream);
    EXPECT_EQ(summary.exposed, exposed_by_stream);
  }
}

}  // namespace
}  // namespace mop::test
