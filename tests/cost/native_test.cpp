// What mop calibrate measured of our own kernels and of copy engines prices native plans, where a cluster has
// it; PyTorch's prices never change.
#include <gtest/gtest.h>

#include "sim/program/landing.h"
#include "tests/cost/support.h"

namespace mop::cost::testing {
namespace {

void add_figure(cluster::ClusterModel& c, const std::string& name, double value) {
  c.figures[name] = {value, cluster::Source::measured, "a test"};
}
void add_table(cluster::ClusterModel& c, const std::string& name, size_t kinds,
               std::vector<std::vector<double>> points) {
  const size_t axes = points.front().size() - 1 - kinds;
  c.tables[name] = {cluster::Table(name, kinds, axes, points), cluster::Source::measured, "a test"};
}

// Every table at one rate of its own.
cluster::ClusterModel calibrated() {
  cluster::ClusterModel c = plain("h200x4");
  add_table(c, "native_matmul", 0, {{128, 128, 128, 5e14}});
  add_table(c, "native_matmul_gradient", 0, {{128, 128, 128, 4e14}});
  add_table(c, "native_grouped_matmul", 2, {{2048, 1536, 32, 1024, 3e14}});
  add_table(c, "native_grouped_matmul_gradient", 2, {{2048, 1536, 32, 1024, 2e14}});
  add_table(c, "native_attention_forward", 2, {{128, 128, 32, 4096, 4.5e14}});
  add_table(c, "native_attention_backward", 2, {{128, 128, 32, 4096, 3.5e14}});
  add_table(c, "native_window_attention_forward", 2, {{64, 64, 128, 64, 4096, 1e14}});
  add_table(c, "native_rms_norm", 0, {{1e6, 2e12}, {1e10, 2e12}});
  add_table(c, "native_adam", 0, {{1e6, 2.5e12}});
  add_table(c, "native_adam_low", 0, {{1e6, 2.25e12}});
  add_table(c, "native_all_gather", 0, {{4, 65536, 2e11}});
  add_table(c, "native_reduce_scatter", 0, {{4, 65536, 1.5e11}});
  add_table(c, "native_all_to_all", 0, {{4, 65536, 1.25e11}});
  return c;
}

// Each tile of 128 queries reads what the L2 does not keep of its head's keys and values.
TEST(Native, ForwardAttentionStreamsWhatTheL2DoesNotKeep) {
  const Machine m(calibrated());
  const auto streams = [&](OpKind kind, int64_t context, int64_t width, int64_t window) {
    const program::AttentionShape shape{1, context, context, 8, 1, width, width, 1, window};
    return m.price(kind, shape.shape()).streams;
  };
  const int64_t k = 1024;
  EXPECT_EQ(streams(OpKind::attention_fwd, 64 * k, 128, 0), 0);
  EXPECT_EQ(streams(OpKind::attention_bwd, 256 * k, 128, 0), 0);
  EXPECT_EQ(streams(OpKind::attention_fwd, 256 * k, 64, 128), 0);
  // 2048 tiles of 8 heads read on average half of 134 MB, of which 40 MB stay.
  const double read = 8 * 2048 * (134217728.0 / 2), missed = 1 - 40e6 / 134217728,
               seconds = read * missed / m.cluster.table("memory_bound").at({1e15}).value;
  EXPECT_NEAR(streams(OpKind::attention_fwd, 256 * k, 128, 0), seconds, 1e-3 * seconds);
}

// By whole waves of tiles of 128 x 256 over 132 multiprocessors; of weight gradients by their rows.
TEST(Native, ExpertsThatFillTheGpuHaveAKernelEach) {
  const Machine m(calibrated());
  const auto kernels = [&](int64_t rows, int64_t columns, bool gradient) {
    program::Op op = make_op(OpKind::grouped_gemm);
    op.does.transpose_a = gradient;
    return m.price(op, {{8 * rows, columns, 2048, 8}}).demand.kernels;
  };
  for (const auto& [rows, columns] : {std::pair{2048, 28672}, {768, 5632}, {8192, 2048}})
    EXPECT_EQ(kernels(rows, columns, false), 8) << rows;
  // Too few tiles; 1.7 and 1.03 waves.
  for (const auto& [rows, columns] : {std::pair{2048, 2048}, {1024, 7168}, {1088, 4096 - 256}})
    EXPECT_EQ(kernels(rows, columns, false), 1) << rows;
  EXPECT_EQ(kernels(4096, 2048, true), 8);
  EXPECT_EQ(kernels(4095, 2048, true), 1);
}

TEST(Native, KernelsTakeTheirOwnRates) {
  const Machine m(calibrated());
  const double cube = 2.0 * 8192 * 8192 * 8192;
  program::Op op = make_op(OpKind::gemm);
  EXPECT_NEAR(seconds(m.price(op, {{8192, 8192, 8192}})), cube / 5e14, 2e-9);
  op.does.transpose_a = true;
  EXPECT_NEAR(seconds(m.price(op, {{8192, 8192, 8192}})), cube / 4e14, 2e-9);
  op = make_op(OpKind::grouped_gemm);
  const double experts = 2.0 * 65536 * 1536 * 2048;
  EXPECT_NEAR(seconds(m.price(op, {{65536, 1536, 2048, 32}})), experts / 3e14, 2e-9);
  op.does.transpose_a = true;
  EXPECT_NEAR(seconds(m.price(op, {{65536, 1536, 2048, 32}})), experts / 2e14, 2e-9);
  const program::AttentionShape whole{1, 16384, 16384, 32, 4, 128, 128, 1, 0},
      window{1, 16384, 16384, 64, 8, 64, 64, 1, 128};
  EXPECT_NEAR(m.seconds(OpKind::attention_fwd, whole.shape()),
              program::flops(OpKind::attention_fwd, whole.shape()) / 4.5e14, 2e-9);
  EXPECT_NEAR(m.seconds(OpKind::attention_bwd, whole.shape()),
              program::flops(OpKind::attention_bwd, whole.shape()) / 3.5e14, 2e-9);
  EXPECT_NEAR(m.seconds(OpKind::attention_fwd, window.shape()),
              program::flops(OpKind::attention_fwd, window.shape()) / 1e14, 2e-9);
  const int64_t n = 1 << 28;
  EXPECT_NEAR(m.seconds(OpKind::rms_norm, {{n, 2 * n, 2 * n}}), 4.0 * n / 2e12, 2e-9);
  op = make_op(OpKind::adam);
  EXPECT_NEAR(seconds(m.price(op, {{n, 14 * n, 14 * n}})), 28.0 * n / 2.5e12, 2e-9);
  op.does.b = static_cast<int64_t>(program::Master::low);
  EXPECT_NEAR(seconds(m.price(op, {{n, 14 * n, 12 * n}})), 26.0 * n / 2.25e12, 2e-9);
  cluster::ClusterModel c = calibrated();
  add_table(c, "native_cast", 0, {{1e6, 4e12}, {1e10, 4e12}});
  add_table(c, "native_rope", 1, {{1, 1e9, 3.5e12}, {128, 1e9, 3e12}, {2048, 1e9, 2e12}});
  EXPECT_NEAR(Machine(c).seconds(OpKind::cast, {{n, 2 * n, 4 * n}}), 6.0 * n / 4e12, 2e-9);
  add_table(c, "native_widen", 0, {{1e6, 3.5e12}, {1e10, 3.5e12}});
  const Machine own(c);
  EXPECT_NEAR(own.seconds(OpKind::cast, {{n, 4 * n, 2 * n}}), 6.0 * n / 4e12, 2e-9);
  EXPECT_NEAR(own.seconds(OpKind::cast, {{n, 2 * n, 4 * n}}), 6.0 * n / 3.5e12, 2e-9);
  // By the width of the norm before it.
  for (const auto& [norm, rate] : {std::pair{0, 3.5e12}, {128, 3e12}, {2048, 2e12}})
    EXPECT_NEAR(own.seconds(OpKind::rope, {{n, 2 * n, 2 * n, norm}}), 4.0 * n / rate, 2e-9) << norm;
  // Without a table of its own: as all fused kernels.
  const Machine before(plain("h200x4"));
  EXPECT_EQ(m.price(OpKind::swiglu, {{n, 2 * n, n}}).demand.duration,
            before.price(OpKind::swiglu, {{n, 2 * n, n}}).demand.duration);
}

TEST(Native, PyTorchsPricesStay) {
  cluster::ClusterModel c = calibrated();
  for (const std::string& figure : cluster::optional_figures()) add_figure(c, figure, 1.5);
  add_table(c, "copy_engine_all_gather", 0, {{4, 65536, 1e11}});
  const Machine with(c, "fsdp2"), without("h200x4", "fsdp2");
  const int64_t n = 1 << 26;
  for (const OpKind kind : {OpKind::gemm, OpKind::grouped_gemm, OpKind::rms_norm, OpKind::adam}) {
    program::Op op = make_op(kind);
    for (const bool gradient : {false, true}) {
      op.does.transpose_a = gradient;
      const Shape shape =
          kind < OpKind::attention_fwd ? Shape{{8192, 4096, 2048, 32}} : Shape{{n, 2 * n, 2 * n}};
      EXPECT_EQ(with.price(op, shape).demand.duration, without.price(op, shape).demand.duration)
          << program::name(kind);
      EXPECT_EQ(with.price(op, shape).demand.weight, without.price(op, shape).demand.weight)
          << program::name(kind);
    }
  }
  for (const OpKind kind :
       {OpKind::all_gather, OpKind::reduce_scatter, OpKind::all_reduce, OpKind::all_to_all}) {
    const Price a = with.collective(kind, 1 << 28, {Axis::world, 4, 1}),
                b = without.collective(kind, 1 << 28, {Axis::world, 4, 1});
    EXPECT_EQ(a.demand.duration, b.demand.duration) << program::name(kind);
    EXPECT_EQ(share(a.demand, Resource::sm), share(b.demand, Resource::sm)) << program::name(kind);
  }
}

double bus_seconds(int64_t bytes, int64_t ranks, double rate) {
  return static_cast<double>(bytes) * static_cast<double>(ranks - 1) / static_cast<double>(ranks) / rate;
}

TEST(Native, CollectivesWithinANodeAreByCopyEngines) {
  cluster::ClusterModel c = calibrated();
  const int64_t bytes = 1 << 30;
  const Group world{Axis::world, 4, 1};
  const Machine nccl(c);
  EXPECT_NEAR(seconds(nccl.collective(OpKind::all_gather, bytes, world)), bus_seconds(bytes, 4, 2e11), 2e-9);
  EXPECT_GT(share(nccl.collective(OpKind::all_gather, bytes, world).demand, Resource::sm), 0);

  add_table(c, "copy_engine_all_gather", 0, {{4, 65536, 3e11}});
  add_table(c, "copy_engine_reduce_scatter", 0, {{4, 65536, 2.5e11}});
  const Machine m(c);
  const Price gather = m.collective(OpKind::all_gather, bytes, world);
  EXPECT_NEAR(seconds(gather), bus_seconds(bytes, 4, 3e11), 2e-9);
  EXPECT_EQ(share(gather.demand, Resource::sm), 0);  // no interference was measured
  EXPECT_GT(share(gather.demand, Resource::nvlink_out), 0);
  // On the stream of weights and gradients only.
  for (const Stream stream : {Stream::gather, Stream::sequence}) {
    EXPECT_NEAR(seconds(m.price(make_op(OpKind::all_gather, stream), {{bytes, bytes}}, &world)),
                bus_seconds(bytes, 4, stream == Stream::gather ? 3e11 : 2e11), 2e-9);
    EXPECT_NEAR(seconds(m.price(make_op(OpKind::reduce_scatter, stream), {{bytes, bytes}}, &world)),
                bus_seconds(bytes, 4, stream == Stream::gather ? 2.5e11 : 1.5e11), 2e-9);
  }
  EXPECT_NEAR(seconds(m.collective(OpKind::all_to_all, bytes, world)), bus_seconds(bytes, 4, 1.25e11), 2e-9);
}

TEST(Native, WhatLandsIsAddedUpPieceByPiece) {
  cluster::ClusterModel c = calibrated();
  add_table(c, "copy_engine_reduce_scatter", 0, {{4, 65536, 2.5e11}});
  add_figure(c, "native_all_gather_matmul_slowdown", 1.2);
  const Machine m(c);
  const Group world{Axis::world, 4, 1};
  const Price small = m.collective(OpKind::reduce_scatter, 1 << 24, world),
              large = m.collective(OpKind::reduce_scatter, int64_t{1} << 32, world);
  EXPECT_EQ(small.turns, 1);
  EXPECT_EQ(large.turns, 7);  // a GiB of each of 3 others, 170 MiB at a time
  for (const Price* const p : {&small, &large}) {
    EXPECT_FALSE(p->demand.needs_room);
    EXPECT_TRUE(p->after.needs_room);
    EXPECT_EQ(share(p->after, Resource::nvlink_out), 0);
  }
  // Four parts of a GiB read and one written, at the rate of copies.
  EXPECT_NEAR(7e-9 * static_cast<double>(large.after.duration),
              5.0 * (1 << 30) / m.cluster.table("memory_bound").at({1e9}).value, 1e-4);
  // What is not of a node lands nowhere.
  EXPECT_EQ(
      Machine(c, "mop", 8).collective(OpKind::reduce_scatter, 1 << 24, {Axis::world, 8, 1}).after.duration,
      0);
}

TEST(Native, ProductsLeaveNoRoomToWhatStartsLater) {
  const OpKind products[] = {OpKind::gemm, OpKind::attention_bwd};
  const Group world{Axis::world, 4, 1};
  for (const bool measured : {false, true}) {
    cluster::ClusterModel c = calibrated();
    if (measured) add_figure(c, "native_all_gather_matmul_slowdown", 1.2);
    const Machine m(c), torch(c, "fsdp2");
    for (const OpKind kind : products) {
      EXPECT_EQ(m.price(kind, {{4096, 4096, 4096, 32, 4, 128, 128, 1}}).demand.takes_room, measured);
      EXPECT_FALSE(torch.price(kind, {{4096, 4096, 4096, 32, 4, 128, 128, 1}}).demand.takes_room);
    }
    // Of experts with few rows: with many, each has a kernel, and room is between them.
    const engine::Demand few = m.price(OpKind::grouped_gemm, {{128 * 256, 1536, 2048, 128, 128}}).demand,
                         many = m.price(OpKind::grouped_gemm, {{8 * 16384, 1536, 2048, 8, 8}}).demand;
    EXPECT_EQ(few.takes_room, measured);
    EXPECT_EQ(many.takes_room, measured);
    EXPECT_EQ(few.kernels, 1);
    EXPECT_EQ(many.kernels, 8);
    EXPECT_EQ(m.price(OpKind::rms_norm, {{1 << 20, 1 << 21, 1 << 21}}).demand.needs_room, measured);
    EXPECT_EQ(m.price(make_op(OpKind::all_to_all, Stream::dispatch), {{1 << 20, 1 << 20}}, &world)
                  .demand.needs_room,
              measured);
    EXPECT_FALSE(m.price(OpKind::copy_h2d, {{1 << 20}}).demand.needs_room);
  }
}

// Before it is sent, or behind what is received, on the same stream.
TEST(Native, ExchangesArePacked) {
  const cluster::ClusterModel c = calibrated();
  const Machine m(c), torch(c, "fsdp2");
  const Group world{Axis::world, 4, 1};
  const int64_t bytes = 1 << 28;
  const auto of = [&](const Machine& machine, program::Exchange exchange) {
    program::Op op = make_op(OpKind::all_to_all, Stream::dispatch);
    op.does.exchange = exchange;
    return seconds(machine.price(op, {{bytes, bytes, bytes / 4 * 3, 0}}, &world));  // rows: a quarter stays
  };
  const double sent = of(m, program::Exchange::none),
               packing = 2.0 * bytes / m.cluster.table("memory_bound").at({2.0 * bytes}).value;
  for (const program::Exchange exchange :
       {program::Exchange::dispatch, program::Exchange::combine, program::Exchange::rows_to_columns,
        program::Exchange::columns_to_rows})
    EXPECT_NEAR(of(m, exchange), sent + packing, 2e-9);
  EXPECT_EQ(of(torch, program::Exchange::dispatch), of(torch, program::Exchange::none));

  // Rows by the kernel that permutes them, where that has a price of its own.
  cluster::ClusterModel with = c;
  add_table(with, "native_permute", 0, {{65536, 1e12}});
  const Machine own(with);
  for (const program::Exchange exchange : {program::Exchange::dispatch, program::Exchange::combine})
    EXPECT_NEAR(of(own, exchange), sent + 2.0 * bytes / 1e12, 2e-9);
  EXPECT_EQ(of(own, program::Exchange::rows_to_columns), of(m, program::Exchange::rows_to_columns));
}

TEST(Native, RowsThatStayNeedNoLinks) {
  const Machine m("h200");
  const Group world{Axis::world, 16, 1};
  const int64_t bytes = 1 << 28;
  program::Op op = make_op(OpKind::all_to_all, Stream::dispatch);
  op.does.exchange = program::Exchange::dispatch;
  const auto price = [&](int64_t within, int64_t across) {
    return m.price(op, {{bytes, bytes, within, across}}, &world);
  };
  const double within = seconds(price(bytes / 2, 0)), packing = seconds(price(0, 0));
  EXPECT_NEAR(seconds(price(bytes / 4, 0)) - packing, (within - packing) / 2, 2e-5);
  EXPECT_EQ(share(price(bytes / 2, 0).demand, Resource::nic_out), 0);
  EXPECT_NEAR(seconds(price(bytes / 4, bytes / 4)) - packing,
              bytes / 4.0 / m.cluster["nic_bw"] + 5 * 1e-9 * m.cluster["nic_latency_ns"], 5e-5);
}

TEST(Native, CopyEnginesDoNotReachAcrossNodes) {
  cluster::ClusterModel with = plain("h200");
  add_table(with, "copy_engine_all_gather", 0, {{8, 65536, 1e9}});
  const Machine a(with, "mop", 64), b("h200", "mop", 64);
  for (const Group& group : {Group{Axis::world, 64, 1}, Group{Axis::world, 8, 8}})
    EXPECT_EQ(a.collective(OpKind::all_gather, 1 << 28, group).demand.duration,
              b.collective(OpKind::all_gather, 1 << 28, group).demand.duration);
}

// Runs a kernel and a collective beside one another; how much slower the second kernel is than alone.
double slowdown(const Price& kernel, const Price& collective) {
  engine::TaskGraph graph;
  graph.demands = {kernel.demand, collective.demand};
  const auto add = [&](uint32_t demand, uint8_t stream, int64_t times) {
    for (int64_t i = 0; i < times; ++i) {
      engine::Task task;
      task.demand = demand;
      task.stream = stream;
      graph.tasks.push_back(task);
    }
  };
  add(0, 0, 3);
  add(1, 1, 4 + 8 * kernel.demand.duration / std::max<int64_t>(1, collective.demand.duration));
  engine::Machine machine;
  machine.graphs.push_back(graph);
  machine.nodes = 1;
  machine.ranks.push_back({0, 0, 1, {}});
  const auto spans = engine::run(machine, {.max_steps = 1, .tolerance = -1}).ranks[0].spans;
  return static_cast<double>(spans[1].end - spans[1].start) / static_cast<double>(kernel.demand.duration);
}

TEST(Native, KernelsSlowDownAsMeasured) {
  cluster::ClusterModel c = calibrated();
  add_table(c, "copy_engine_all_gather", 0, {{4, 65536, 3e11}});
  add_figure(c, "native_all_to_all_matmul_slowdown", 1.3);
  add_figure(c, "native_all_to_all_slowdown", 1.5);
  add_figure(c, "native_all_to_all_attention_slowdown", 1.15);
  add_figure(c, "native_all_to_all_memory_bound_slowdown", 1.45);
  add_figure(c, "copy_engine_all_gather_matmul_slowdown", 1.04);
  add_figure(c, "copy_engine_all_gather_slowdown", 1.01);
  const Machine m(c);
  const Price matmul = m.price(OpKind::gemm, {{8192, 8192, 8192}});
  const program::AttentionShape shape{1, 16384, 16384, 32, 4, 128, 128, 1, 0};
  const Price attention = m.price(OpKind::attention_bwd, shape.shape());
  const int64_t n = 1 << 28;
  const Price norm = m.price(OpKind::rms_norm, {{n, 2 * n, 2 * n}});
  const Group world{Axis::world, 4, 1};
  const Price exchange = m.collective(OpKind::all_to_all, 1 << 30, world),
              gather = m.collective(OpKind::all_gather, 1 << 30, world);
  EXPECT_NEAR(slowdown(matmul, exchange), 1.3, 0.01);
  EXPECT_NEAR(slowdown(attention, exchange), 1.15, 0.01);
  EXPECT_NEAR(slowdown(norm, exchange), 1.45, 0.01);
  EXPECT_NEAR(slowdown(matmul, gather), 1.04, 0.005);
}

// A kernel that a collective hardly touches uses the rest of what they share: neither starves.
TEST(Native, CollectivesSlowDownAsMeasured) {
  cluster::ClusterModel c = calibrated();
  add_table(c, "copy_engine_all_gather", 0, {{4, 65536, 3e11}});
  add_figure(c, "copy_engine_all_gather_matmul_slowdown", 1.2);
  add_figure(c, "copy_engine_all_gather_slowdown", 2.4);
  const auto of_gather = [&](const cluster::ClusterModel& model, OpKind kind, const Shape& shape) {
    const Machine m(model);
    const Group world{Axis::world, 4, 1};
    const Price kernel = m.price(kind, shape), gather = m.collective(OpKind::all_gather, 1 << 30, world);
    return std::pair{slowdown(kernel, gather), slowdown(gather, kernel)};
  };
  const Shape attention = program::AttentionShape{8, 16384, 16384, 32, 4, 128, 128, 1, 0}.shape(),
              matmul{{65536, 32768, 8192}};
  const auto [x, y] = of_gather(c, OpKind::gemm, matmul);
  EXPECT_NEAR(x, 1.2, 0.01);
  EXPECT_NEAR(y, 2.4, 0.05);
  // Neither was slower beside the other; then, both a little.
  add_figure(c, "copy_engine_all_gather_attention_slowdown", 0.97);
  const auto [free_x, free_y] = of_gather(c, OpKind::attention_bwd, attention);
  EXPECT_NEAR(free_x, 1, 0.01);
  EXPECT_NEAR(free_y, 1, 0.02);
  add_figure(c, "copy_engine_all_gather_attention_slowdown", 1.1);
  add_figure(c, "copy_engine_all_gather_under_attention_slowdown", 1.5);
  const auto [some_x, some_y] = of_gather(c, OpKind::attention_bwd, attention);
  EXPECT_NEAR(some_x, 1.1, 0.02);
  EXPECT_NEAR(some_y, 1.5, 0.05);
}

// Copies both ways: who gets how much of what both want was measured.
TEST(Native, CopiesShareTheHostAsMeasured) {
  cluster::ClusterModel c = calibrated();
  const int64_t bytes = 1 << 30;
  const auto weight = [&](const cluster::ClusterModel& model, OpKind kind) {
    return static_cast<double>(Machine(model).price(kind, {{bytes}}).demand.weight);
  };
  const double up = weight(c, OpKind::copy_h2d), down = weight(c, OpKind::copy_d2h);
  add_figure(c, "root_down_share", 0.5);
  EXPECT_EQ(weight(c, OpKind::copy_h2d), up);
  EXPECT_EQ(weight(c, OpKind::copy_d2h), down);
  add_figure(c, "root_down_share", 0.6);
  EXPECT_NEAR(weight(c, OpKind::copy_d2h) / weight(c, OpKind::copy_h2d), 1.5 * down / up, 2e-3);
}

// What is spilled has no part that stays: it takes as long as an exchange of which as much crosses.
TEST(Native, SpilledExpertsAllCross) {
  const Machine m(calibrated());
  const Group world{Axis::world, 4, 1};
  const auto seconds_of = [&](program::Exchange exchange, int64_t bytes) {
    program::Op op = make_op(OpKind::all_to_all, Stream::spill);
    op.does.exchange = exchange;
    return seconds(m.price(op, {{bytes, bytes}}, &world));
  };
  const int64_t bytes = 3 << 28;
  for (const auto exchange : {program::Exchange::spill_weights, program::Exchange::spill_gradients})
    EXPECT_NEAR(seconds_of(exchange, bytes), seconds_of(program::Exchange::none, bytes / 3 * 4), 2e-9);
}

// Of what is spilled, only what goes to other nodes takes the network.
TEST(Native, SpilledExpertsTakeTheNetworkWhereTheyLeaveANode) {
  const Machine m("h200", "mop", 16);
  const Group world{Axis::world, 16, 1};
  program::Op op = make_op(OpKind::all_to_all, Stream::spill);
  op.does.exchange = program::Exchange::spill_weights;
  const int64_t bytes = 3 << 28;
  const auto seconds_of = [&](int64_t across) {
    return seconds(m.price(op, {{bytes, bytes, across}}, &world));
  };
  const double latency = 2e-9 * m.cluster["nic_latency_ns"];
  EXPECT_NEAR(seconds_of(bytes), static_cast<double>(bytes) / m.cluster["nic_bw"] + latency, 2e-9);
  EXPECT_NEAR(seconds_of(bytes / 2), static_cast<double>(bytes) / 2 / m.cluster["nic_bw"] + latency, 2e-9);
  EXPECT_LT(seconds_of(0), seconds_of(bytes / 4));
  EXPECT_EQ(share(m.price(op, {{bytes, bytes, 0}}, &world).demand, Resource::nic_out), 0);
}

TEST(Native, EachCollectiveHasItsRateAcrossNodes) {
  cluster::ClusterModel c = calibrated();
  c.figures["gpus_per_node"].value = 1;
  c.figures["nic_bw"].value = 2e9;
  c.figures["nic_latency_ns"].value = 1e4;
  const Group two{Axis::world, 2, 1};
  const int64_t bytes = int64_t{1} << 30;
  const auto of = [&](OpKind kind, int64_t all) {
    const Machine m(c, "mop", 2);
    return seconds(m.collective(kind, all, two));
  };
  const double crossing = static_cast<double>(bytes) / 2;
  EXPECT_NEAR(of(OpKind::all_gather, bytes), crossing / 2e9 + 2e-5, 1e-8);
  add_table(c, "network_all_gather", 0, {{1e6, 5e8}, {1e9, 1e9}});
  EXPECT_NEAR(of(OpKind::all_gather, bytes), crossing / 1e9, 1e-6 * crossing / 1e9);
  EXPECT_NEAR(of(OpKind::all_gather, 64), 2e-5, 1e-9);  // no less than its hops
  EXPECT_NEAR(of(OpKind::reduce_scatter, bytes), crossing / 2e9 + 2e-5, 1e-8);
  // What goes one way, as spilled experts do.
  add_table(c, "network_all_to_all", 0, {{1e9, 1e9}});
  const auto spilled = [&](int64_t in) {
    program::Op op = make_op(OpKind::all_to_all, Stream::spill);
    op.does.exchange = program::Exchange::spill_weights;
    const Machine m(c, "mop", 2);
    return seconds(m.price(op, {{bytes, in, bytes}}, &two));
  };
  const double both = spilled(bytes);
  EXPECT_NEAR(both, static_cast<double>(bytes) / 1e9, 1e-6);
  EXPECT_EQ(spilled(0), both);
  add_table(c, "network_send", 0, {{1e9, 1.6e9}, {4e9, 3e9}});
  EXPECT_NEAR(spilled(0), static_cast<double>(bytes) / 1.6e9, 0.05 * both);
  EXPECT_EQ(spilled(bytes), both);
  // What it takes of a NIC is what it moves.
  const Machine m(c, "mop", 2);
  EXPECT_NEAR(share(m.collective(OpKind::all_gather, bytes, two).demand, Resource::nic_out), 0.5, 1e-3);
}

// Many experts with few rows, beside a few with most of them.
TEST(Native, ExpertsWithFewRowsCostTheirWeights) {
  const Machine m("h200x4");
  const int64_t rows = 131072, n = 2048, k = 2048;
  const double weights = 2.0 * n * k / m.cluster.table("memory_bound").at({1e15}).value;
  const auto with = [&](int64_t touched, bool gradient, bool adds = false) {
    program::Op op = make_op(OpKind::grouped_gemm);
    op.does.transpose_a = gradient, op.does.accumulate = adds;
    return seconds(m.price(op, {{rows, n, k, 8, touched}}));
  };
  EXPECT_NEAR(with(40, false) - with(8, false), 32 * weights, 2e-9);
  EXPECT_NEAR(with(40, true) - with(8, true), 32 * weights, 2e-9);
  EXPECT_NEAR(with(40, true, true) - with(8, true, true), 64 * weights, 2e-9);  // read, too
  EXPECT_EQ(with(0, false), with(8, false));
}

}  // namespace
}  // namespace mop::cost::testing
