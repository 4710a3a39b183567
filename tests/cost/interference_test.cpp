// Prices run through the engine: what was measured side by side comes out side by side.
#include <gtest/gtest.h>

#include <utility>

#include "tests/cost/support.h"

namespace mop::cost::testing {
namespace {

using engine::Time;

struct Streams {
  engine::TaskGraph graph;
  void add(int stream, const Price& price, int times) {
    graph.demands.push_back(price.demand);
    for (int i = 0; i < times; ++i) {
      engine::Task task;
      task.demand = static_cast<uint32_t>(graph.demands.size() - 1);
      task.stream = static_cast<uint8_t>(stream);
      graph.tasks.push_back(task);
    }
  }
};

// Runs `ranks` alike ranks of one node for one step; the spans of the first one.
std::vector<engine::Span> run_once(const engine::TaskGraph& graph, uint32_t ranks) {
  engine::Machine machine;
  machine.graphs.push_back(graph);
  machine.nodes = 1;
  for (uint32_t r = 0; r < ranks; ++r) machine.ranks.push_back({0, 0, 1, {}});
  return engine::run(machine, {.max_steps = 1, .tolerance = -1}).ranks[0].spans;
}

double length(const engine::Span& s) {
  return static_cast<double>(s.end - s.start);
}

// A matmul and a collective that both run throughout: how much slower each is than alone.
void expect_slowdowns(OpKind kind, const char* matmul_figure, const char* collective_figure) {
  const Machine m("h200x4");
  const Price matmul = m.price(OpKind::gemm, {{8192, 8192, 8192}});
  const Price collective = m.collective(kind, int64_t{1} << 30, {Axis::world, 4, 1});
  Streams s;
  s.add(0, matmul, 40);
  s.add(1, collective, 20);
  const auto spans = run_once(s.graph, 1);
  // The second of each runs wholly beside the other.
  EXPECT_NEAR(length(spans[1]) / static_cast<double>(matmul.demand.duration), m.cluster[matmul_figure], 0.01)
      << program::name(kind);
  EXPECT_NEAR(length(spans[41]) / static_cast<double>(collective.demand.duration),
              m.cluster[collective_figure], 0.01)
      << program::name(kind);
}

TEST(Interference, MatmulsAndCollectivesSlowOneAnotherAsMeasured) {
  expect_slowdowns(OpKind::all_gather, "all_gather_matmul_slowdown", "all_gather_slowdown");
  expect_slowdowns(OpKind::reduce_scatter, "reduce_scatter_matmul_slowdown", "reduce_scatter_slowdown");
  expect_slowdowns(OpKind::all_to_all, "all_to_all_matmul_slowdown", "all_to_all_slowdown");
}

TEST(Interference, TheMeasuredOnesAreAsInTheNotes) {
  const Machine m("h200x4");
  EXPECT_NEAR(m.cluster["all_gather_matmul_slowdown"], 1.22, 0.03);
  EXPECT_NEAR(m.cluster["all_gather_slowdown"], 1.50, 0.10);
}

TEST(Interference, ACollectiveAloneIsNotSlowed) {
  const Machine m("h200x4");
  const Price gather = m.collective(OpKind::all_gather, int64_t{1} << 30, {Axis::world, 4, 1});
  Streams s;
  s.add(1, gather, 2);
  const auto spans = run_once(s.graph, 1);
  EXPECT_EQ(spans[1].end - spans[1].start, gather.demand.duration);
}

TEST(Interference, MatmulsHideBehindTheNetwork) {
  // A collective that the network holds back leaves the SMs nearly free.
  const Machine m("h200", "mop", 64);
  const Price matmul = m.price(OpKind::gemm, {{8192, 8192, 8192}});
  const Price gather = m.collective(OpKind::all_gather, int64_t{1} << 32, {Axis::world, 8, 8});
  Streams s;
  s.add(0, matmul, 20);
  s.add(1, gather, 2);
  const auto spans = run_once(s.graph, 1);
  const double slow = length(spans[1]) / static_cast<double>(matmul.demand.duration);
  EXPECT_GE(slow, 1);
  EXPECT_LT(slow, 1.1);
}

// Bytes a second of each of `ranks` GPUs, in the middle of long copies.
std::pair<double, double> copy_rates(const Machine& m, bool up, bool down, uint32_t ranks) {
  const int64_t bytes = int64_t{1} << 30;
  Streams s;
  if (up) s.add(6, m.price(OpKind::copy_h2d, {{bytes}}), 8);
  if (down) s.add(7, m.price(OpKind::copy_d2h, {{bytes}}), 8);
  const auto spans = run_once(s.graph, ranks);
  const double first = up ? static_cast<double>(bytes) / length(spans[2]) : 0;
  const double second = down ? static_cast<double>(bytes) / length(spans[up ? 10 : 2]) : 0;
  return {first, second};  // GB/s: bytes over nanoseconds
}

TEST(HostSharing, OneGpu) {
  const Machine m("h200x4");
  EXPECT_NEAR(copy_rates(m, true, false, 1).first, m.cluster["pcie_up_bw"] / 1e9, 0.2);
  EXPECT_NEAR(copy_rates(m, false, true, 1).second, m.cluster["pcie_down_bw"] / 1e9, 0.2);
  const auto both = copy_rates(m, true, true, 1);
  EXPECT_NEAR(both.first + both.second, m.cluster["pcie_both_bw"] / 1e9, 1);
}

TEST(HostSharing, FourGpusReachTheHostsCaps) {
  const Machine m("h200x4");
  const double up = 4 * copy_rates(m, true, false, 4).first, down = 4 * copy_rates(m, false, true, 4).second;
  const double most = m.cluster["root_both_bw"];
  EXPECT_NEAR(up / (std::min(m.cluster["root_up_bw"], most) / 1e9), 1, 0.01);
  EXPECT_NEAR(down / (std::min(m.cluster["root_down_bw"], most) / 1e9), 1, 0.01);
  const auto both = copy_rates(m, true, true, 4);
  EXPECT_NEAR(4 * (both.first + both.second) / (most / 1e9), 1, 0.01);
  EXPECT_NEAR(both.first, both.second, 0.1);  // as fast either way: it has no share
}

// Two equal flows have half of a link each; the longer one then has it alone.
TEST(HostSharing, FlowsOnOneLink) {
  const Machine m("h200x4");
  const int64_t bytes = int64_t{1} << 30;
  Streams s;
  s.add(6, m.price(OpKind::copy_h2d, {{bytes}}), 1);
  s.add(7, m.price(OpKind::copy_h2d, {{2 * bytes}}), 1);
  for (const uint32_t from : {0u, 1u})  // the next step waits for this one
    for (const uint32_t to : {0u, 1u}) s.graph.edges.push_back({from, to, 1});
  const auto spans = run_once(s.graph, 1);
  const double alone = static_cast<double>(bytes) / m.cluster["pcie_up_bw"] * 1e9;
  EXPECT_NEAR(length(spans[0]), 2 * alone, 0.01 * alone);
  EXPECT_NEAR(length(spans[1]), 3 * alone, 0.01 * alone);
}

TEST(HostSharing, CpuAdamOfFourRanksReachesTheDramRate) {
  const Machine m("h200x4");
  const int64_t n = 500000000;
  Streams s;
  s.add(8, m.price(OpKind::adam_host, {{n, 28 * n}}), 2);
  const double alone = static_cast<double>(n) / length(run_once(s.graph, 1)[1]) * 1e9;
  EXPECT_NEAR(alone, m.cluster["host_adam_rate_alone"], 1e-3 * alone);
  const double together = 4 * static_cast<double>(n) / length(run_once(s.graph, 4)[1]) * 1e9;
  EXPECT_NEAR(together, m.cluster["dram_bw"] / 28, 0.01 * together);
  EXPECT_NEAR(together, 7.6e9, 0.03 * 7.6e9);
}

// Where one process alone could do more than the DRAM has.
TEST(HostSharing, CpuAdamStaysWithinTheDram) {
  cluster::ClusterModel cluster = Machine("h200x4").cluster;
  cluster.figures.at("dram_bw").value = 14 * cluster.figures.at("host_adam_rate_alone").value;
  const Machine m(cluster);
  const int64_t n = 500000000;
  const double least = 28 * static_cast<double>(n) / m.cluster["dram_bw"] * 1e9;
  for (const uint32_t ranks : {1u, 4u}) {
    Streams s;
    s.add(8, m.price(OpKind::adam_host, {{n, 28 * n}}), 2);
    EXPECT_NEAR(length(run_once(s.graph, ranks)[1]) / (ranks * least), 1, 0.01);
  }
}

TEST(HostSharing, PyTorchsAdamRunsAtItsMeasuredRate) {
  const Machine m("h200x4", "fsdp2:offload=on");
  const int64_t n = 500000000;
  Streams s;
  s.add(8, m.price(OpKind::adam_host, {{n, 28 * n}}), 2);
  // Measured with four processes at once.
  const double each = static_cast<double>(n) / length(run_once(s.graph, 4)[1]) * 1e9;
  EXPECT_NEAR(each, m.cluster["torch_adam_rate"], 0.01 * each);
}

// GB/s of AdamW's and of copies up, of four ranks that all do both.
std::pair<double, double> adam_and_copy_rates(const Machine& m, uint32_t copies) {
  const int64_t n = 500000000, bytes = int64_t{1} << 30;
  Streams s;
  s.add(8, m.price(OpKind::adam_host, {{n, 28 * n}}), 6);
  s.add(6, m.price(OpKind::copy_h2d, {{bytes}}), copies);
  const auto spans = run_once(s.graph, 4);
  return {4 * 28 * static_cast<double>(n) / length(spans[0]),
          4 * static_cast<double>(bytes) / length(spans[8])};
}

TEST(HostSharing, AdamAndCopiesShareTheDram) {
  const Machine m("h200x4");
  const auto [adam, copies] = adam_and_copy_rates(m, 12);
  EXPECT_LE(adam + copies, m.cluster["dram_bw"] / 1e9 * 1.001);
  EXPECT_GE(adam + copies, m.cluster["dram_bw"] / 1e9 * 0.98);
}

// What mop calibrate measured of both together: AdamW keeps that part of its rate, copies have theirs.
TEST(HostSharing, AdamAndCopiesBesideEachOtherAsMeasured) {
  for (const double down_share : {0.5, 0.6}) {
    cluster::ClusterModel cluster = Machine("h200x4").cluster;
    const double kept = 0.65, copied = 0.8;
    cluster.figures["adam_beside_copies"] = {kept, cluster::Source::measured, "made up"};
    cluster.figures["copies_beside_adam"] = {copied, cluster::Source::measured, "made up"};
    cluster.figures["root_down_share"] = {down_share, cluster::Source::measured, "made up"};
    const Machine m(cluster);
    const auto [adam, copies] = adam_and_copy_rates(m, 40);
    EXPECT_NEAR(adam / (kept * m.cluster["dram_bw"] / 1e9), 1, 0.01);
    EXPECT_NEAR(copies / (copied * adam), 1, 0.01);
  }
}

}  // namespace
}  // namespace mop::cost::testing
