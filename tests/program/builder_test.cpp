// The hazards that the builder must see, on programs made by hand.
#include "sim/program/builder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "sim/base/error.h"

namespace mop::program {
namespace {

using Edge = std::tuple<OpId, OpId, int>;

constexpr Stream kA = Stream::compute, kB = Stream::gather, kC = Stream::h2d;

struct Program : Builder {
  BufferId make(int64_t bytes = 512) { return buffer("b", bytes, Holds::staging); }
  BufferId keep() { return persistent("p", 512, Holds::weights); }
  OpId on(Stream stream, std::initializer_list<Operand> reads, std::initializer_list<Operand> writes) {
    return op({OpKind::add, stream}, reads, writes);
  }
};

std::vector<Edge> edges(const StepProgram& program) {
  std::vector<Edge> all;
  for (const Dependency& d : program.dependencies) all.emplace_back(d.from, d.to, d.distance);
  std::sort(all.begin(), all.end());
  return all;
}

std::vector<Edge> within_step(const StepProgram& program) {
  std::vector<Edge> all = edges(program);
  std::erase_if(all, [](const Edge& e) { return std::get<2>(e) != 0; });
  return all;
}

bool contains(const std::vector<Edge>& all, std::initializer_list<Edge> some) {
  return std::all_of(some.begin(), some.end(),
                     [&](const Edge& e) { return std::find(all.begin(), all.end(), e) != all.end(); });
}

TEST(Builder, ReadAfterWrite) {
  Program p;
  const BufferId x = p.make();
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  EXPECT_EQ(within_step(p.finish()), (std::vector<Edge>{{0, 1, 0}}));
}

TEST(Builder, WriteAfterRead) {
  Program p;
  const BufferId x = p.make();
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  p.on(kC, {}, {x});
  EXPECT_TRUE(contains(within_step(p.finish()), {{0, 1, 0}, {1, 2, 0}}));
}

TEST(Builder, WriteAfterEveryReader) {
  Program p;
  const BufferId x = p.make();
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  p.on(kC, {x}, {});
  p.on(Stream::d2h, {}, {x});
  EXPECT_TRUE(contains(within_step(p.finish()), {{1, 3, 0}, {2, 3, 0}}));
}

TEST(Builder, WriteAfterWrite) {
  Program p;
  const BufferId x = p.make();
  p.on(kA, {}, {x});
  p.on(kB, {}, {x});
  EXPECT_EQ(within_step(p.finish()), (std::vector<Edge>{{0, 1, 0}}));
}

TEST(Builder, ReadersOfOneWriterAreFree) {
  Program p;
  const BufferId x = p.make();
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  p.on(kC, {x}, {});
  EXPECT_EQ(within_step(p.finish()), (std::vector<Edge>{{0, 1, 0}, {0, 2, 0}}));
}

TEST(Builder, AStreamIsFirstInFirstOut) {
  Program p;
  const BufferId x = p.make(), y = p.make();
  p.on(kA, {}, {x});
  p.on(kA, {x}, {y});
  p.on(kA, {y}, {x});
  EXPECT_TRUE(within_step(p.finish()).empty());
}

TEST(Builder, ImpliedEdgesAreLeftOut) {
  Program p;
  const BufferId x = p.make(), y = p.make();
  p.on(kA, {}, {x});  // 0
  p.on(kA, {}, {y});  // 1
  p.on(kB, {y}, {});  // 2 after 1, and so after 0
  p.on(kB, {x}, {});  // 3: same stream as 2
  p.on(kC, {x}, {});  // 4: nothing known yet
  EXPECT_EQ(within_step(p.finish()), (std::vector<Edge>{{0, 4, 0}, {1, 2, 0}}));
}

TEST(Builder, ReadAndWriteInOneOperation) {
  Program p;
  const BufferId x = p.make();
  p.on(kA, {}, {x});
  p.on(kB, {x}, {x});
  p.on(kC, {x}, {});
  EXPECT_EQ(within_step(p.finish()), (std::vector<Edge>{{0, 1, 0}, {1, 2, 0}}));
}

TEST(Builder, TheNextStepReadsWhatThisOneLeft) {
  Program p;
  const BufferId w = p.keep();
  p.on(kA, {w}, {});
  p.on(kB, {}, {w});
  const std::vector<Edge> all = edges(p.finish());
  EXPECT_EQ(all, (std::vector<Edge>{{0, 1, 0}, {1, 0, 1}}));
}

TEST(Builder, TheNextStepOverwritesAfterTheReaders) {
  Program p;
  const BufferId x = p.keep();
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  const std::vector<Edge> all = edges(p.finish());
  EXPECT_EQ(all, (std::vector<Edge>{{0, 1, 0}, {1, 0, 1}}));
}

TEST(Builder, OnlyTheFirstAccessesOfTheNextStepWait) {
  Program p;
  const BufferId x = p.keep();
  p.on(kA, {}, {x});  // 0
  p.on(kB, {x}, {});  // 1
  p.on(kC, {}, {x});  // 2
  std::vector<Edge> all = edges(p.finish());
  EXPECT_TRUE(contains(all, {{0, 1, 0}, {1, 2, 0}, {2, 0, 1}}));
  std::erase_if(all, [](const Edge& e) { return std::get<2>(e) == 0; });
  EXPECT_EQ(all.size(), 1u);
}

TEST(Builder, ABufferNeverWrittenCarriesNothing) {
  Program p;
  const BufferId w = p.keep();
  p.on(kA, {w}, {});
  p.on(kB, {w}, {});
  EXPECT_TRUE(edges(p.finish()).empty());
}

// Rounds: a writer and its reader on another stream.
TEST(Builder, RoundsWithTwoSlotsAreTwoApart) {
  Program p;
  p.begin_repeat(0);
  const BufferId x = p.make(100);
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  p.end_repeat();
  const StepProgram program = p.finish();
  EXPECT_EQ(program.buffers[x].slots, 2);
  EXPECT_EQ(program.buffers[x].bytes, 200);
  EXPECT_EQ(edges(program), (std::vector<Edge>{{0, 1, 0}, {1, 0, 2}}));
}

TEST(Builder, RoundsWithOneSlotAreOneApart) {
  Program p;
  p.begin_repeat(0);
  const BufferId x = p.scratch("x", 100, Holds::staging);
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  p.end_repeat();
  const StepProgram program = p.finish();
  EXPECT_EQ(program.buffers[x].slots, 1);
  EXPECT_EQ(program.buffers[x].bytes, 100);
  EXPECT_EQ(edges(program), (std::vector<Edge>{{0, 1, 0}, {1, 0, 1}}));
}

TEST(Builder, BuffersFromOutsideASingleCopyForAllRounds) {
  Program p;
  const BufferId sum = p.make();
  p.on(kA, {}, {sum});  // 0: cleared
  p.begin_repeat(0);
  p.on(kB, {}, {sum});     // 1: first in a round, after the last of the round before
  p.on(kC, {sum}, {sum});  // 2
  p.end_repeat();
  p.on(kA, {sum}, {});  // 3
  EXPECT_TRUE(contains(edges(p.finish()), {{0, 1, 0}, {1, 2, 0}, {2, 1, 1}, {2, 3, 0}}));
}

TEST(Builder, BuffersOfABodyLiveAsLongAsTheRegion) {
  Program p;
  const BufferId before = p.make();
  p.on(kA, {}, {before});
  p.begin_repeat(3);
  const BufferId x = p.make();
  p.on(kA, {before}, {});
  p.on(kA, {}, {x});
  p.on(kB, {x}, {});
  p.on(kA, {}, {});
  p.end_repeat();
  p.on(kA, {}, {});
  const StepProgram program = p.finish();
  ASSERT_EQ(program.regions.size(), 2u);
  EXPECT_EQ(program.regions[1].first, 1u);
  EXPECT_EQ(program.regions[1].last, 5u);
  EXPECT_EQ(program.regions[1].layer, 3);
  EXPECT_EQ(program.buffers[x].first, 1u);
  EXPECT_EQ(program.buffers[x].last, 4u);
  EXPECT_EQ(program.buffers[before].first, 0u);
  EXPECT_EQ(program.buffers[before].last, 4u);  // later rounds read it too
}

TEST(Builder, TouchKeepsABufferAlive) {
  Program p;
  const BufferId x = p.make();
  p.on(kA, {}, {x});
  p.on(kA, {}, {});
  p.on(kA, {}, {});
  p.touch(x);
  const StepProgram program = p.finish();
  EXPECT_EQ(program.buffers[x].first, 0u);
  EXPECT_EQ(program.buffers[x].last, 2u);
}

TEST(Builder, EqualShapesAreStoredOnce) {
  Builder b;
  b.op({OpKind::gemm, kA, Component::dense, {{1, 2, 3}}}, {}, {});
  b.op({OpKind::gemm, kA, Component::dense, {{3, 2, 1}}}, {}, {});
  b.op({OpKind::gemm, kB, Component::dense, {{1, 2, 3}}}, {}, {});
  const StepProgram program = b.finish();
  EXPECT_EQ(program.shapes.size(), 2u);
  EXPECT_EQ(program.ops[0].shape, program.ops[2].shape);
  EXPECT_EQ(program.shape(program.ops[1]).v[0], 3);
}

TEST(Builder, PhaseAndLayerAreThoseOfTheMoment) {
  Builder b;
  b.at(Phase::backward, 12);
  b.op({OpKind::grouped_gemm, kA, Component::experts}, {}, {});
  b.at(Phase::optimizer, -1);
  b.op({OpKind::adam, kA, Component::optimizer}, {}, {});
  const BufferId x = b.buffer("checkpoint", 1, Holds::checkpoints, 12);
  const BufferId y = b.buffer("moments", 1, Holds::optimizer_states);
  const StepProgram program = b.finish();
  EXPECT_EQ(program.op_name(0), "L12 backward experts grouped_gemm");
  EXPECT_EQ(program.op_name(1), "optimizer optimizer adam");
  EXPECT_EQ(program.buffer_name(x), "checkpoint[12]");
  EXPECT_EQ(program.buffer_name(y), "moments");
}

TEST(Builder, RefusesMisuse) {
  Program p;
  EXPECT_THROW(p.make(-1), InternalError);
  EXPECT_THROW(p.end_repeat(), InternalError);
  p.begin_repeat(0);
  EXPECT_THROW(p.begin_repeat(1), InternalError);
  EXPECT_THROW(p.keep(), InternalError);
  EXPECT_THROW(p.finish(), InternalError);
  p.end_repeat();
  EXPECT_NO_THROW(p.finish());
}

}  // namespace
}  // namespace mop::program
