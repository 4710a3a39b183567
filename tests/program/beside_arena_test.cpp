// What a rank has in HBM beside its arena: communicators and workspaces, of lowered models.
#include <gmock/gmock.h>

#include <set>
#include <tuple>

#include "sim/program/landing.h"
#include "sim/program/meetings.h"
#include "sim/program/workspace.h"
#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

// On one node, and on as many as there are ranks.
auto on_a_node(const Lowered& l) {
  return [&](const Op& op) { return by_copy_engines(l.program, op); };
}
bool nowhere(const Op&) {
  return false;
}

TEST(Meetings, OneForEachStreamAndSetOfRanks) {
  const Lowered l = lower_model("olmoe-1b-7b", mop_plan(4, 8, 1, 8), 8, 4096);
  const std::vector<Meeting> all = meetings(l.program, nowhere);
  std::set<std::tuple<Stream, int64_t, int64_t>> seen;
  for (const Meeting& m : all) {
    EXPECT_TRUE(seen.insert({m.stream, m.span.size, m.span.stride}).second);
    EXPECT_GT(m.span.size, 1);
    const bool exchanges =
        m.stream == Stream::dispatch || m.stream == Stream::combine || m.stream == Stream::spill;
    EXPECT_TRUE(m.everyone || !exchanges) << name(m.stream);
  }
  for (const Op& op : l.program.ops)
    if (is_collective(op.kind)) {
      const plan::Span span = l.program.groups[op.group].span();
      EXPECT_TRUE(seen.contains({op.stream, span.size, span.stride})) << name(op.kind);
    }
}

// The vocabulary's weights go round a ring, where each rank has two neighbours.
TEST(Meetings, RingsAreOfNeighbours) {
  const Lowered l = lower_model("olmoe-1b-7b", mop_plan(1, 4, 1, 4, "vp-scheme=weights"), 4, 4096);
  int rings = 0;
  for (const Meeting& m : meetings(l.program, nowhere)) {
    bool sends = false, exchanges = false;
    for (const Op& op : l.program.ops) {
      const bool here = is_collective(op.kind) && op.stream == m.stream &&
                        l.program.groups[op.group].size == m.span.size &&
                        l.program.groups[op.group].stride == m.span.stride;
      sends |= here && op.kind == OpKind::send_recv;
      exchanges |= here && op.kind == OpKind::all_to_all;
    }
    EXPECT_EQ(m.neighbours, sends) << name(m.stream);
    EXPECT_EQ(m.everyone, exchanges) << name(m.stream);
    rings += m.neighbours;
  }
  EXPECT_GT(rings, 0);
}

TEST(Meetings, NoneForWhatCopyEnginesDo) {
  for (const std::string& plan : {std::string("fsdp2:runtime=native"), mop_plan(1, 4, 1, 4)}) {
    const Lowered l = lower_model("olmoe-1b-7b", plan, 4, 4096);
    for (const Meeting& m : meetings(l.program, on_a_node(l))) {
      bool needed = false;
      for (const Op& op : l.program.ops)
        needed |= is_collective(op.kind) && op.stream == m.stream && !by_copy_engines(l.program, op) &&
                  l.program.groups[op.group].size == m.span.size &&
                  l.program.groups[op.group].stride == m.span.stride;
      EXPECT_TRUE(needed) << plan << ": " << name(m.stream);
    }
    EXPECT_LE(meetings(l.program, on_a_node(l)).size(), meetings(l.program, nowhere).size());
  }
}

TEST(Workspace, ExchangesPackOneSide) {
  // 4 of 8 ranks share a sequence: heads travel; experts over 4.
  const Lowered l = lower_model("olmoe-1b-7b", mop_plan(4, 8, 4, 8), 8, 8192);
  int columns = 0, rows = 0;
  for (const Op& op : l.program.ops) {
    if (op.kind != OpKind::all_to_all) continue;
    const Shape& shape = l.program.shape(op);
    const int64_t bytes = exchange_workspace(l.program, op);
    if (packs(op.does.exchange)) {
      // Each matrix once, and no more than is sent or received.
      EXPECT_GE(bytes, std::min(shape.v[0], shape.v[1]))
          << l.program.op_name(static_cast<OpId>(&op - l.program.ops.data()));
      EXPECT_LE(bytes, std::max(shape.v[0], shape.v[1]) + 8 * 256);
      (op.does.exchange == Exchange::dispatch || op.does.exchange == Exchange::combine ? rows : columns) += 1;
    } else {
      EXPECT_EQ(bytes, 0);
    }
  }
  EXPECT_GT(columns, 0);
  EXPECT_GT(rows, 0);
}

TEST(Workspace, SumsThatNcclLeavesAreConverted) {
  // fp32 shards of bf16 gradients, across nodes.
  const Lowered l = lower_model("olmoe-1b-7b", "fsdp2:runtime=native", 8, 4096);
  int64_t most = 0;
  for (const Op& op : l.program.ops)
    if (op.kind == OpKind::reduce_scatter) {
      most = std::max(most, reduction_workspace(l.program, op));
      EXPECT_THAT(reduction_workspace(l.program, op), ::testing::AnyOf(0, l.program.shape(op).v[0] / 8));
    }
  EXPECT_EQ(workspace_bytes(l.program, nowhere) - workspace_bytes(l.program, on_a_node(l)), most);
}

TEST(Workspace, OfAttentionsBackward) {
  // 8 x 4096 tokens of a rank, 16 heads of 128: their gradients and a sum a row in fp32.
  const Lowered l = lower_model("olmoe-1b-7b", mop_plan(1, 1, 1, 1), 1, 4096, 8);
  EXPECT_EQ(workspace_bytes(l.program, nowhere), int64_t{4} * 8 * 4096 * 16 * (128 + 1));
  // 32 heads of queries share 4 of keys: these have gradients for each of the 32 first. An H200 took 1028 MiB
  // in this run.
  const Lowered grouped = lower_model("qwen3-30b-a3b", "fsdp2:runtime=native", 4, 4096, 8);
  EXPECT_EQ(workspace_bytes(grouped.program, on_a_node(grouped)) >> 20, 1028);
}

}  // namespace
}  // namespace mop::program::testing
