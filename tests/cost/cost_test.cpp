// Closed forms of prices: where a group lies, kernels, copies, collectives, the host, and the paper's
// constants.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "sim/base/error.h"
#include "tests/cost/support.h"

namespace mop::cost::testing {
namespace {

TEST(Calibrations, ByName) {
  EXPECT_EQ(parse_calibration("measured"), Calibration::measured);
  EXPECT_EQ(parse_calibration("paper"), Calibration::paper);
  EXPECT_STREQ(name(Calibration::paper), "paper");
  try {
    parse_calibration("papr");
    FAIL();
  } catch (const UserError& error) {
    EXPECT_STREQ(error.what(), "unknown calibration 'papr'; did you mean 'paper'?; known: measured, paper");
  }
}

TEST(Place, InsideAndAcross) {
  const auto at = [](int64_t size, int64_t stride, int64_t node, int64_t gpus) {
    const Placement p = place({Axis::world, size, stride}, node, gpus);
    EXPECT_EQ(p.ranks, size);
    return std::pair{p.local(), p.nodes};
  };
  EXPECT_EQ(at(8, 1, 8, 96), (std::pair<double, int64_t>{8, 1}));
  EXPECT_EQ(at(4, 1, 8, 96), (std::pair<double, int64_t>{4, 1}));
  EXPECT_EQ(at(96, 1, 8, 96), (std::pair<double, int64_t>{8, 12}));
  EXPECT_EQ(at(12, 8, 8, 96), (std::pair<double, int64_t>{1, 12}));
  EXPECT_EQ(at(24, 4, 8, 96), (std::pair<double, int64_t>{2, 12}));
  EXPECT_EQ(at(2, 4, 8, 8), (std::pair<double, int64_t>{2, 1}));
  EXPECT_EQ(at(6, 16, 8, 96), (std::pair<double, int64_t>{1, 6}));
  EXPECT_EQ(at(4, 1, 4, 4), (std::pair<double, int64_t>{4, 1}));
  EXPECT_EQ(at(2, 1, 8, 2), (std::pair<double, int64_t>{2, 1}));
  // Groups that do not align with the nodes: the one that touches most of them.
  EXPECT_EQ(at(12, 1, 8, 96), (std::pair<double, int64_t>{6, 2}));
  EXPECT_EQ(at(6, 1, 8, 96), (std::pair<double, int64_t>{3, 2}));
  EXPECT_EQ(at(3, 1, 8, 96), (std::pair<double, int64_t>{1.5, 2}));
  EXPECT_EQ(at(8, 12, 8, 96), (std::pair<double, int64_t>{1, 8}));
}

// Against the ranks counted one by one, for groups that lie alike on every node they touch.
TEST(Place, CountsRanksOfEachNode) {
  for (const int64_t node : {4, 8})
    for (const int64_t gpus : {node, 2 * node, 4 * node, 16 * node})
      for (int64_t stride = 1; stride <= gpus; stride *= 2)
        for (int64_t size = 1; size * stride <= gpus; size *= 2) {
          std::set<int64_t> nodes;
          for (int64_t i = 0; i < size; ++i) nodes.insert(i * stride / node);
          const Placement p = place({Axis::world, size, stride}, node, gpus);
          EXPECT_EQ(p.nodes, static_cast<int64_t>(nodes.size())) << size << " " << stride << " " << node;
          EXPECT_EQ(p.ranks, size) << size << " " << stride << " " << node;
        }
}

TEST(Measured, MatmulsTakeTheirTablesRate) {
  const Machine m("h200x4");
  for (const auto& [a, b, c] : {std::array<int64_t, 3>{8192, 8192, 8192},
                                {16384, 5120, 2048},
                                {65536, 4096, 2048},
                                {8192, 18432, 7168}}) {
    const double rate = m.cluster.table("matmul").at({double(a), double(b), double(c)}).value;
    EXPECT_NEAR(m.seconds(OpKind::gemm, {{a, b, c}}), 2.0 * double(a) * double(b) * double(c) / rate, 2e-9);
    EXPECT_FALSE(m.price(OpKind::gemm, {{a, b, c}}).outside);
  }
  const double rate = m.cluster.table("grouped_matmul").at({2048, 1536, 32, 2048}).value;
  EXPECT_NEAR(m.seconds(OpKind::grouped_gemm, {{65536, 1536, 2048, 32}}), 2.0 * 65536 * 1536 * 2048 / rate,
              2e-9);
}

TEST(Measured, AttentionTakesItsTablesRate) {
  const Machine m("h200x4");
  const program::AttentionShape a{1, 16384, 16384, 32, 4, 128, 128, 1, 0};
  const double flops = 4.0 * 128 * 32 * 16384.0 * 16385 / 2;
  // The length that a causal query sees on average, twice: S + 1.
  EXPECT_NEAR(m.seconds(OpKind::attention_fwd, a.shape()),
              flops / m.cluster.table("attention_forward").at({128, 128, 32, 16385}).value, 1e-8);
  EXPECT_NEAR(m.seconds(OpKind::attention_bwd, a.shape()),
              2.5 * flops / m.cluster.table("attention_backward").at({128, 128, 32, 16385}).value, 1e-8);
}

TEST(Measured, NoKernelIsFasterThanTheHardware) {
  const Machine m("h200x4");
  for (const int64_t n : {1, 64, 1024, 65536}) {
    EXPECT_GE(m.seconds(OpKind::gemm, {{n, 1024, 1024}}), 1e-9 * (m.cluster["kernel_ns"] - 1));
    EXPECT_GE(m.seconds(OpKind::gemm, {{n, 4096, 4096}}),
              2.0 * double(n) * 4096 * 4096 / m.cluster["peak_flops"]);
    EXPECT_GE(m.seconds(OpKind::rms_norm, {{n, n, n}}), 1e-9 * (m.cluster["kernel_ns"] - 1));
  }
  const int64_t big = int64_t{1} << 34;
  EXPECT_GE(m.seconds(OpKind::add, {{big, big, big}}), 2.0 * double(big) / m.cluster["hbm_peak_bw"]);
  // A matmul as thin as a vector is bound by memory.
  EXPECT_GE(m.seconds(OpKind::gemm, {{1, 65536, 65536}}), 2.0 * 65536 * 65536 / m.cluster["hbm_peak_bw"]);
}

TEST(Measured, FlagsShapesBeyondTheTables) {
  const Machine m("h200x4");
  EXPECT_TRUE(m.price(OpKind::gemm, {{8, 8, 8}}).outside);
  EXPECT_FALSE(m.price(OpKind::gemm, {{8192, 8192, 8192}}).outside);
  EXPECT_TRUE(m.collective(OpKind::all_gather, int64_t{1} << 40, {Axis::world, 4, 1}).outside);
  EXPECT_FALSE(m.collective(OpKind::all_gather, int64_t{1} << 30, {Axis::world, 4, 1}).outside);
}

TEST(Measured, WorkWithoutKernelsIsFree) {
  const Machine m("h200x4");
  program::Op op = make_op(OpKind::copy);
  op.kernels = 0;
  const Price p = m.price(op, {});
  EXPECT_EQ(p.demand.duration, 0);
  EXPECT_EQ(p.launch_ns, 0);
}

TEST(Measured, MoreIsNeverFaster) {
  const Machine m("h200x4"), wide("h200", "mop", 64);
  const Group inside{Axis::world, 4, 1}, across{Axis::world, 64, 1}, rails{Axis::world, 8, 8};
  for (const OpKind kind : {OpKind::all_gather, OpKind::reduce_scatter, OpKind::all_reduce,
                            OpKind::all_to_all, OpKind::send_recv}) {
    int64_t last[3] = {0, 0, 0};
    for (int64_t bytes = 256; bytes <= int64_t{1} << 36; bytes += bytes / 3) {
      const int64_t now[3] = {m.collective(kind, bytes, inside).demand.duration,
                              wide.collective(kind, bytes, across).demand.duration,
                              wide.collective(kind, bytes, rails).demand.duration};
      for (int i = 0; i < 3; ++i) {
        EXPECT_GE(now[i], last[i] - 1) << program::name(kind) << " " << bytes << " placement " << i;
        last[i] = now[i];
      }
    }
  }
  for (const OpKind kind : {OpKind::copy_h2d, OpKind::copy_d2h, OpKind::rms_norm}) {
    int64_t last = 0;
    for (int64_t bytes = 256; bytes <= int64_t{1} << 36; bytes += bytes / 3) {
      const int64_t now = m.price(kind, {{bytes, bytes, bytes}}).demand.duration;
      EXPECT_GE(now, last - 1) << program::name(kind) << " " << bytes;
      last = now;
    }
  }
}

// Inside a node: bus bandwidth is what crosses a rank's links over the time, (n - 1) / n of the buffer.
TEST(Collectives, InsideANode) {
  const Machine m("h200x4");
  const Group all{Axis::world, 4, 1}, pair{Axis::world, 2, 1};
  const int64_t bytes = int64_t{1} << 30;
  const double gib = double(bytes);
  const auto bus = [&](const char* table, double ranks) {
    return m.cluster.table(table).at({ranks, gib}).value;
  };
  EXPECT_NEAR(seconds(m.collective(OpKind::all_gather, bytes, all)), gib * 3 / 4 / bus("all_gather", 4),
              1e-8);
  EXPECT_NEAR(seconds(m.collective(OpKind::reduce_scatter, bytes, all)),
              gib * 3 / 4 / bus("reduce_scatter", 4), 1e-8);
  EXPECT_NEAR(seconds(m.collective(OpKind::all_reduce, bytes, all)), 2 * gib * 3 / 4 / bus("all_reduce", 4),
              1e-8);
  EXPECT_NEAR(seconds(m.collective(OpKind::all_to_all, bytes, all)), gib * 3 / 4 / bus("all_to_all", 4),
              1e-8);
  EXPECT_NEAR(seconds(m.collective(OpKind::all_gather, bytes, pair)), gib / 2 / bus("all_gather", 2), 1e-8);
  // No network, and no more of a link than its bandwidth.
  const Demand d = m.collective(OpKind::all_gather, bytes, all).demand;
  EXPECT_EQ(share(d, Resource::nic_out), 0);
  EXPECT_EQ(share(d, Resource::nic_in), 0);
  EXPECT_NEAR(share(d, Resource::nvlink_out), bus("all_gather", 4) / m.cluster["nvlink_bw"], 1e-5);
  EXPECT_LE(share(d, Resource::nvlink_in), 1);
}

// Across nodes: each NIC of a node carries its part of what leaves the node.
TEST(Collectives, AcrossNodes) {
  const Machine m("h200", "mop", 96);
  const int64_t bytes = int64_t{3} << 32;
  const double b = double(bytes), nic = m.cluster["nic_bw"], latency = 1e-9 * m.cluster["nic_latency_ns"];
  // One rank a node: no NVLink.
  const Group rails{Axis::world, 12, 8};
  EXPECT_NEAR(seconds(m.collective(OpKind::all_gather, bytes, rails)),
              b * 11 / 12 / nic + latency * (1 + std::log2(12)), 1e-8);
  EXPECT_NEAR(seconds(m.collective(OpKind::all_reduce, bytes, rails)),
              2 * b * 11 / 12 / nic + latency * (1 + std::log2(12)), 1e-8);
  EXPECT_EQ(share(m.collective(OpKind::all_gather, bytes, rails).demand, Resource::nvlink_out), 0);
  EXPECT_NEAR(seconds(m.collective(OpKind::all_to_all, bytes, rails)),
              b * 11 / 12 / nic + latency * (1 + std::log2(12)), 1e-8);
  // All ranks: eight NICs a node share what crosses; all-to-all sends most of its bytes to other nodes.
  const Group world{Axis::world, 96, 1};
  const double nvlink = b * 95 / 96 / m.cluster.table("all_gather").at({8, b}).value;
  EXPECT_NEAR(seconds(m.collective(OpKind::all_gather, bytes, world)),
              std::max(nvlink, b * 11 / 12 / 8 / nic + latency * (1 + std::log2(12))), 1e-8);
  // Two nodes with few NICs: rings pass nearly all of the buffer between them, not just the other node's
  // half.
  const Machine slow("h200-half-network", "mop", 16);
  EXPECT_NEAR(seconds(slow.collective(OpKind::all_gather, bytes, {Axis::world, 16, 1})),
              b * 15 / 16 / 8 / slow.cluster["nic_bw"] + 2e-9 * slow.cluster["nic_latency_ns"], 1e-8);
  EXPECT_NEAR(seconds(m.collective(OpKind::all_to_all, bytes, world)),
              b * 88 / 96 / nic + latency * (1 + std::log2(12)), 1e-8);
  EXPECT_NEAR(share(m.collective(OpKind::all_to_all, bytes, world).demand, Resource::nic_out), 1, 1e-3);
  // An uneven exchange takes as long as its larger side.
  EXPECT_EQ(m.collective(OpKind::all_to_all, bytes, world, bytes / 2).demand.duration,
            m.collective(OpKind::all_to_all, bytes / 2, world, bytes).demand.duration);
  EXPECT_EQ(m.collective(OpKind::all_to_all, bytes, world, bytes / 2).demand.duration,
            m.collective(OpKind::all_to_all, bytes, world, bytes).demand.duration);
}

TEST(Collectives, SmallMessagesHaveALatency) {
  const Machine m("h200", "mop", 96);
  const Group rails{Axis::world, 12, 8};
  EXPECT_GE(m.collective(OpKind::all_reduce, 256, rails).demand.duration,
            static_cast<int64_t>(m.cluster["nic_latency_ns"]));
  const Machine one("h200x4");
  EXPECT_GE(one.collective(OpKind::all_reduce, 256, {Axis::world, 4, 1}).demand.duration,
            static_cast<int64_t>(one.cluster["kernel_ns"]));
}

TEST(Collectives, ABetterNetworkIsNotSlower) {
  const Machine ib("h200", "mop", 64), efa("h200-efa", "mop", 64), half("h200-half-network", "mop", 64);
  for (const Group& group : {Group{Axis::world, 64, 1}, Group{Axis::world, 8, 8}, Group{Axis::world, 8, 1},
                             Group{Axis::world, 16, 1}})
    for (const OpKind kind : {OpKind::all_gather, OpKind::all_reduce, OpKind::all_to_all, OpKind::send_recv})
      for (const int64_t bytes : {int64_t{4096}, int64_t{1} << 24, int64_t{1} << 32}) {
        const auto best = ib.collective(kind, bytes, group).demand.duration;
        EXPECT_LE(best, efa.collective(kind, bytes, group).demand.duration);
        EXPECT_LE(best, half.collective(kind, bytes, group).demand.duration);
        const bool inside = group.size == 8 && group.stride == 1;
        if (inside) {
          EXPECT_EQ(best, half.collective(kind, bytes, group).demand.duration);
        }
      }
}

TEST(Host, CopiesTakePcieAndALatency) {
  const Machine m("h200x4");
  const double bytes = 1 << 30, latency = 1e-9 * m.cluster["copy_latency_ns"];
  EXPECT_NEAR(m.seconds(OpKind::copy_h2d, {{1 << 30}}), latency + bytes / m.cluster["pcie_up_bw"], 2e-9);
  EXPECT_NEAR(m.seconds(OpKind::copy_d2h, {{1 << 30}}), latency + bytes / m.cluster["pcie_down_bw"], 2e-9);
  const Demand up = m.price(OpKind::copy_h2d, {{1 << 30}}).demand;
  EXPECT_GT(share(up, Resource::pcie_up), 0.99);
  EXPECT_EQ(share(up, Resource::pcie_down), 0);
  EXPECT_EQ(share(up, Resource::root_down), 0);
  EXPECT_GT(share(up, Resource::dram), 0);
  EXPECT_EQ(share(up, Resource::sm), 0);  // copy engines
}

TEST(Host, AdamOfOneRankRunsAtItsRateAlone) {
  const Machine mine("h200x4"), torch("h200x4", "fsdp2:offload=on");
  const int64_t n = 1000000000;
  EXPECT_NEAR(mine.seconds(OpKind::adam_host, {{n, 28 * n}}),
              double(n) / mine.cluster["host_adam_rate_alone"], 1e-8);
  EXPECT_NEAR(torch.seconds(OpKind::adam_host, {{n, 28 * n}}), double(n) / torch.cluster["torch_adam_rate"],
              1e-8);
  EXPECT_NEAR(torch.seconds(OpKind::norm_host, {{n, 4 * n}}),
              4.0 * double(n) / torch.cluster["torch_norm_bw"], 1e-8);
  EXPECT_NEAR(torch.seconds(OpKind::scale_host, {{n, 8 * n}}),
              8.0 * double(n) / torch.cluster["torch_scale_bw"], 1e-8);
}

TEST(Launch, DependsOnTheRuntime) {
  const Machine native("h200x4"), eager("h200x4", "fsdp2"), compiled("h200x4", "fsdp2:runtime=compiled");
  program::Op op = make_op(OpKind::gemm);
  op.kernels = 3;
  const Shape shape{{1024, 1024, 1024}};
  EXPECT_EQ(native.price(op, shape).launch_ns, static_cast<int64_t>(3 * native.cluster["native_launch_ns"]));
  EXPECT_EQ(eager.price(op, shape).launch_ns, static_cast<int64_t>(3 * eager.cluster["eager_launch_ns"]));
  EXPECT_EQ(compiled.price(op, shape).launch_ns,
            static_cast<int64_t>(3 * eager.cluster["compiled_launch_ns"]));
  op.phase = program::Phase::backward;
  EXPECT_EQ(eager.price(op, shape).launch_ns,
            static_cast<int64_t>(3 * eager.cluster["eager_backward_launch_ns"]));
  op.phase = program::Phase::recompute;
  EXPECT_EQ(eager.price(op, shape).launch_ns,
            static_cast<int64_t>(3 * eager.cluster["eager_recompute_launch_ns"]));
  op.component = program::Component::vocabulary;  // outside of the blocks nothing is compiled
  EXPECT_EQ(compiled.price(op, shape).launch_ns,
            static_cast<int64_t>(3 * eager.cluster["eager_recompute_launch_ns"]));
}

// The fit of mop.md section 7.
TEST(Paper, Constants) {
  const Machine mop("h200", "mop", 96, Calibration::paper), fsdp("h200", "fsdp2", 96, Calibration::paper);
  const program::AttentionShape wide{1, 65536, 65536, 8, 8, 192, 128, 1, 0},
      narrow{1, 65536, 65536, 8, 8, 64, 64, 1, 0};
  const double wide_flops = 2.0 * 8 * 320 * 65536.0 * 65537 / 2,
               narrow_flops = 2.0 * 8 * 128 * 65536.0 * 65537 / 2;
  EXPECT_NEAR(mop.seconds(OpKind::attention_fwd, wide.shape()), wide_flops / 530e12, 1e-8);
  EXPECT_NEAR(mop.seconds(OpKind::attention_fwd, narrow.shape()), narrow_flops / 285e12, 1e-8);
  // 3.5 x forward in all, not run again: 2.5 of them backward. The baseline: 4.5 at 38 TFLOP/s.
  EXPECT_NEAR(mop.seconds(OpKind::attention_bwd, wide.shape()), 2.5 * wide_flops / 530e12, 1e-8);
  EXPECT_NEAR(2 * fsdp.seconds(OpKind::attention_fwd, wide.shape()) +
                  fsdp.seconds(OpKind::attention_bwd, wide.shape()),
              4.5 * wide_flops / 38e12, 1e-7);
  EXPECT_NEAR(fsdp.seconds(OpKind::gemm, {{8192, 8192, 8192}}), 2 * std::pow(8192.0, 3) / 250e12, 1e-8);
  EXPECT_EQ(mop.seconds(OpKind::gemm, {{8192, 8192, 8192}}), 0);
  // Adam: 8 ms a million parameters, and 12 bytes a parameter over 50 GB/s.
  EXPECT_NEAR(fsdp.seconds(OpKind::adam_host, {{1000000, 28000000}}), 8e-3 + 12e6 / 50e9, 1e-8);
  EXPECT_EQ(mop.seconds(OpKind::adam_host, {{1000000, 28000000}}), 0);
  // The routed all-to-all: 7 GB/s a GPU.
  program::Op exchange = make_op(OpKind::all_to_all, Stream::dispatch);
  exchange.component = program::Component::experts;
  exchange.routed = program::Routed::dispatch;
  const Group group{Axis::expert, 8, 1};
  EXPECT_NEAR(seconds(mop.price(exchange, {{7000000000, 3500000000}}, &group)), 1, 1e-8);
  EXPECT_EQ(seconds(fsdp.price(exchange, {{7000000000, 7000000000}}, &group)), 0);
  exchange.routed = program::Routed::spill;
  EXPECT_EQ(seconds(mop.price(exchange, {{7000000000, 7000000000}}, &group)), 0);
}

}  // namespace
}  // namespace mop::cost::testing
