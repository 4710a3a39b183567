// What holds for every prediction: it is the same each time, adds up, and moves the right way.
#include <gtest/gtest.h>

#include <cmath>

#include "sim/base/error.h"
#include "sim/base/integer.h"
#include "sim/program/arena.h"
#include "sim/program/landing.h"
#include "tests/error_of.h"
#include "tests/predict/support.h"

namespace mop::predict::testing {
namespace {

const std::vector<std::string>& plans() {
  static const std::vector<std::string> all{"fsdp2",
                                            "fsdp2:ep=8",
                                            "fsdp2:cp=4,ep=4",
                                            "fsdp2:offload=on,runtime=compiled",
                                            "fsdp2:ep=8,runtime=native",
                                            "fsdp2:offload=on,cp=4,runtime=native",
                                            "fsdp2:recompute=none,runtime=native",
                                            mop_plan(8, 16, 4, 8),
                                            mop_plan(8, 16, 2, 8, "optimizer=host,checkpoints=host"),
                                            mop_plan(4, 8, 1, 8, "vp-scheme=weights,optimizer=stream")};
  return all;
}

TEST(Predict, IsDeterministic) {
  for (const std::string& plan : plans()) {
    const Scenario s = make("olmoe-1b-7b", "h200", 2, plan, 8192, 1, 1, "zipf:0.7");
    Details a, b;
    const Prediction p = predict(s, {}, &a), q = predict(s, {}, &b);
    EXPECT_EQ(*p.step_time, *q.step_time);
    EXPECT_EQ(p.hbm_peak, q.hbm_peak);
    EXPECT_EQ(p.bound_by, q.bound_by);
    EXPECT_EQ(a.hbm.offset, b.hbm.offset);
    EXPECT_EQ(a.report.step_end, b.report.step_end);
    ASSERT_EQ(p.time_by_kind.size(), q.time_by_kind.size());
    for (size_t i = 0; i < p.time_by_kind.size(); ++i) {
      EXPECT_EQ(p.time_by_kind[i].name, q.time_by_kind[i].name);
      EXPECT_EQ(p.time_by_kind[i].value, q.time_by_kind[i].value);
    }
  }
}

void with_power(cluster::ClusterModel& c) {
  const std::pair<const char*, double> figures[]{{"largest_clock_hz", 2e9},
                                                 {"power_limit_w", 700},
                                                 {"idle_power_w", 120},
                                                 {"memory_bound_power_w", 500},
                                                 {"link_power_w", 250},
                                                 {"mixed_power_w", 700},
                                                 {"mixed_matmul_share", 0.5},
                                                 {"mixed_matmul_clock_hz", 1.7e9},
                                                 {"mixed_memory_bound_clock_hz", 1.7e9}};
  for (const auto& [name, value] : figures) c.figures[name].value = value;
  struct Kind {
    const char* name;
    double row_w, row_hz, among_w;
  };
  for (const Kind& kind : {Kind{"matmul", 700, 1.5e9, 1400},
                           {"deep_matmul", 700, 1.5e9, 1400},
                           {"grouped_matmul", 700, 1.6e9, 1300},
                           {"attention_forward", 690, 1.7e9, 1100},
                           {"attention_backward", 690, 1.7e9, 1100},
                           {"narrow_attention_forward", 690, 1.7e9, 1000},
                           {"narrow_attention_backward", 690, 1.7e9, 1000}}) {
    const std::string name = kind.name;
    c.figures[name + "_power_w"].value = kind.row_w;
    c.figures[name + "_clock_hz"].value = kind.row_hz;
    c.figures[name + "_among_power_w"].value = kind.among_w;
    c.figures[name + "_among_clock_hz"].value = 1.98e9;
    c.figures[name + "_burst_clock_hz"].value = 2e9;
  }
}

// Within less power products are slower, and with them the step; with plenty all is as without a limit.
TEST(Predict, ClockFollowsThePowerLimit) {
  Scenario s = make("olmoe-1b-7b", "h200x4", 1, mop_plan(1, 4, 1, 4), 4096, 8);
  s.cluster.figures.erase("largest_clock_hz");
  const Prediction free = predict(s);
  EXPECT_FALSE(free.clock);
  with_power(s.cluster);
  double before = 0, clock = 3e9;
  for (const double watts : {5000.0, 800.0, 700.0, 600.0, 500.0}) {
    SCOPED_TRACE(watts);
    s.cluster.figures["power_limit_w"].value = watts;
    const Prediction p = predict(s);
    ASSERT_TRUE(p.clock && p.step_time);
    if (watts == 5000) {
      EXPECT_EQ(*p.clock, 2e9);
      EXPECT_EQ(*p.step_time, *free.step_time);
    } else {
      EXPECT_LT(*p.clock, clock);
      EXPECT_GT(*p.step_time, before);
      EXPECT_LT(*p.step_time, *free.step_time * 2e9 / *p.clock);  // not all of it is products
    }
    before = *p.step_time, clock = *p.clock;
  }
  // One GPU that is slower makes the step longer, by less than it is slower.
  s.cluster.figures["power_limit_w"].value = 700;
  const double alike = *predict(s).step_time;
  const std::vector<std::vector<double>> clocks{{1, 1}, {2, 1}, {3, 0.96}, {4, 1.01}};
  s.cluster.tables["gpu_clock"].table = cluster::Table("gpu_clock", 0, 1, clocks);
  Details details;
  const Prediction apart = predict(s, {}, &details);
  EXPECT_GT(*apart.step_time, 1.01 * alike);
  EXPECT_LT(*apart.step_time, alike / 0.96);
  EXPECT_EQ(details.schedules.size(), 3U);
  EXPECT_EQ(*predict(s, {.unfold = true}).step_time, *apart.step_time);
  Scenario torch = make("olmoe-1b-7b", "h200x4", 1, "fsdp2", 4096, 8);
  const double eager = *predict(torch).step_time;
  torch.cluster.figures = s.cluster.figures;
  EXPECT_EQ(*predict(torch).step_time, eager);  // its tables are of a warm GPU
}

// The longer the context, the more of its keys and values forward attention streams from HBM, which takes
// power; those of short ones stay in the L2.
TEST(Predict, LongContextsStreamTheirKeys) {
  double before = 0;
  for (const int64_t context : {int64_t{64} << 10, int64_t{128} << 10, int64_t{256} << 10}) {
    SCOPED_TRACE(context);
    Scenario s = make("olmoe-1b-7b", "h200x4", 1, mop_plan(1, 4, 4, 4), context, 1);
    with_power(s.cluster);
    Details details;
    ASSERT_TRUE(predict(s, {}, &details).fits);
    const Schedule& schedule = details.schedules.front();
    double seconds = 0, flops = 0;
    for (size_t task = 0; task < schedule.op_of_task.size(); ++task) {
      const program::Op& op = details.program(0).ops[schedule.op_of_task[task]];
      if (op.kind != program::OpKind::attention_fwd) continue;
      const engine::TaskGraph& graph = schedule.graph;
      seconds += 1e-9 * static_cast<double>(graph.demands[graph.tasks[task].demand].duration);
      flops += program::flops(op.kind, details.program(0).shape(op));
    }
    if (before > 0) EXPECT_LT(flops / seconds, 0.97 * before);
    before = flops / seconds;
  }
}

// Forward waits for states from a slow host: its clock rises. Backward has nothing to wait for, and is none
// the faster.
TEST(Predict, WaitsGiveTheirOwnStagePower) {
  Scenario s = make("olmoe-1b-7b", "h200x4", 1, mop_plan(1, 4, 1, 4, "optimizer=stream"), 4096, 8);
  with_power(s.cluster);
  struct Of {
    double step, clock, backward;
  };
  const auto of = [&](double host_bw) {
    for (const char* name : {"root_up_bw", "root_down_bw", "root_both_bw"})
      s.cluster.figures[name].value = host_bw;
    Details d;
    const Prediction p = predict(s, {}, &d);
    EXPECT_TRUE(d.clock_settled);
    engine::Time backward = 0;
    for (size_t task = 0; task < d.schedules[0].op_of_task.size(); ++task)
      if (d.program(0).ops[d.schedules[0].op_of_task[task]].kind == program::OpKind::attention_bwd)
        backward += d.report.ranks[0].spans[task].busy;
    return Of{*p.step_time, *p.clock, 1e-9 * static_cast<double>(backward)};
  };
  const Of fast = of(1e12), slow = of(3e10);
  EXPECT_GT(slow.step, 2 * fast.step);
  EXPECT_GT(slow.clock, 1.03 * fast.clock);
  EXPECT_NEAR(slow.backward, fast.backward, 0.01 * fast.backward);
}

TEST(Predict, AddsUp) {
  for (const std::string& plan : plans()) {
    SCOPED_TRACE(plan);
    const Scenario s = make("olmoe-1b-7b", "h200", 2, plan, 8192, 2, 2);
    const Prediction p = predict(s);
    ASSERT_TRUE(p.fits) << p.why_not;
    EXPECT_TRUE(p.steady);
    EXPECT_NEAR(sum(p.time), *p.step_time, 1e-6 * *p.step_time);
    EXPECT_NEAR(sum(p.time_by_kind), *p.step_time, 1e-6 * *p.step_time);
    EXPECT_NEAR(sum(p.memory), static_cast<double>(p.hbm_peak), 1e-3 * static_cast<double>(p.hbm_peak));
    EXPECT_GE(p.hbm_peak, p.hbm_allocated);
    EXPECT_LE(p.exposed_communication + p.compute_busy, *p.step_time * (1 + 1e-9));
    EXPECT_GE(p.mfu, 0);
    EXPECT_LE(p.mfu, 1);
    EXPECT_NEAR(p.tokens_per_s_per_gpu, static_cast<double>(p.tokens_per_step) / *p.step_time / 16,
                1e-6 * p.tokens_per_s_per_gpu);
    EXPECT_FALSE(p.bound_by.empty());
    EXPECT_GT(p.estimate, 0);
    EXPECT_LE(p.estimate, *p.step_time * 1.001);  // work over rate, all else hidden
    EXPECT_GT(p.operations, p.program_operations);
    for (const Named& busy : p.busy) EXPECT_LE(busy.value, 1 + 1e-6) << busy.name;
  }
}

TEST(Predict, TokensOfAStep) {
  // 16 GPUs: each its own sequences; groups of four share them; accumulation repeats.
  EXPECT_EQ(predict(make("olmoe-1b-7b", "h200", 2, "fsdp2", 4096)).tokens_per_step, 16 * 4096);
  EXPECT_EQ(predict(make("olmoe-1b-7b", "h200", 2, "fsdp2:cp=4", 4096)).tokens_per_step, 4 * 4096);
  EXPECT_EQ(predict(make("olmoe-1b-7b", "h200", 2, mop_plan(8, 16, 4, 8), 4096, 3, 2)).tokens_per_step,
            4 * 4096 * 3 * 2);
}

TEST(Predict, MoreContextIsMoreMemoryAndTime) {
  for (const std::string& plan : plans()) {
    SCOPED_TRACE(plan);
    double time = 0;
    int64_t peak = 0;
    for (const int64_t context : {8192, 16384, 32768, 65536}) {
      const Prediction p = predict(make("olmoe-1b-7b", "h200", 2, plan, context));
      EXPECT_GT(p.hbm_allocated, peak) << context;
      peak = p.hbm_allocated;
      if (!p.fits) break;
      EXPECT_GT(*p.step_time, time) << context;
      time = *p.step_time;
    }
  }
}

TEST(Predict, MoreSequencesAndMicroBatches) {
  for (const std::string& plan : plans()) {
    SCOPED_TRACE(plan);
    const Prediction one = predict(make("olmoe-1b-7b", "h200", 2, plan, 8192)),
                     two = predict(make("olmoe-1b-7b", "h200", 2, plan, 8192, 2)),
                     twice = predict(make("olmoe-1b-7b", "h200", 2, plan, 8192, 1, 2)),
                     four = predict(make("olmoe-1b-7b", "h200", 2, plan, 8192, 1, 4));
    EXPECT_EQ(two.tokens_per_step, 2 * one.tokens_per_step);
    EXPECT_EQ(twice.tokens_per_step, 2 * one.tokens_per_step);
    EXPECT_GT(two.hbm_allocated, one.hbm_allocated);
    EXPECT_GT(*two.step_time, *one.step_time);
    EXPECT_LT(*two.step_time, 2 * *one.step_time);  // weights are gathered once for both
    EXPECT_GT(*twice.step_time, *one.step_time);
    // Micro-batches take no activations of their own, but ours hold the ids of all: the loss is divided by
    // the number of targets of the whole step. Ids, targets, positions and document starts, 4 bytes each.
    const Scenario s = make("olmoe-1b-7b", "h200", 2, plan, 8192);
    const int64_t tokens = program::tokens_per_rank(plan::layout(s.plan, 16), s.workload),
                  batch = ceil_div(4 * (3 * tokens + 8192), program::kAlignment) * program::kAlignment;
    EXPECT_EQ(four.hbm_allocated - twice.hbm_allocated, s.plan.native() ? 2 * batch : 0);
    // A further pair of micro-batches costs what the one before did, less what an update hides.
    const double second = *twice.step_time - *one.step_time, next = (*four.step_time - *twice.step_time) / 2;
    EXPECT_NEAR(next / second, 1, 0.25);
  }
}

TEST(Predict, MoreBandwidthIsNotSlower) {
  for (const std::string& plan : plans()) {
    SCOPED_TRACE(plan);
    const auto time = [&](const char* figure, double factor) {
      Scenario s = make("olmoe-1b-7b", "h200", 2, plan, 16384);
      s.cluster.figures.at(figure).value *= factor;
      return *predict(s).step_time;
    };
    const double now = time("nic_bw", 1);
    for (const char* figure :
         {"nic_bw", "pcie_up_bw", "pcie_down_bw", "dram_bw", "root_up_bw", "root_down_bw"}) {
      EXPECT_LE(time(figure, 2), now * 1.01) << figure;  // 1 %: what overlaps changes
      EXPECT_GE(time(figure, 0.5), now * 0.99) << figure;
    }
    EXPECT_GT(time("nic_bw", 0.02), now);
  }
}

TEST(Predict, ImbalanceCostsTime) {
  const auto time = [](const char* plan, const char* routing) {
    return *predict(make("qwen3-30b-a3b", "h200", 2, plan, 4096, 1, 1, routing)).step_time;
  };
  EXPECT_GT(time("fsdp2:ep=8", "zipf:1.0"), time("fsdp2:ep=8", "balanced"));
  const std::string off = mop_plan(8, 16, 2, 8, "least-loaded=off"), on = mop_plan(8, 16, 2, 8);
  const auto mop_time = [](const std::string& plan, const char* routing) {
    return *predict(make("qwen3-30b-a3b", "h200", 2, plan, 65536, 1, 1, routing)).step_time;
  };
  EXPECT_GT(mop_time(off, "zipf:1.0"), mop_time(off, "balanced"));
  EXPECT_LT(mop_time(on, "zipf:1.0"), mop_time(off, "zipf:1.0"));
  EXPECT_NEAR(mop_time(on, "balanced") / mop_time(off, "balanced"), 1,
              0.01);  // nothing spills, but reducing waits for the (empty) return of gradients
}

TEST(Predict, ImbalanceDoesNotOverflowMop) {
  const auto peak = [](const std::string& plan, const char* routing) {
    return predict(make("qwen3-30b-a3b", "h200", 2, plan, 8192, 1, 1, routing), {.only_memory = true})
        .hbm_peak;
  };
  EXPECT_EQ(peak(mop_plan(8, 16, 2, 8), "balanced"), peak(mop_plan(8, 16, 2, 8), "hot:0.9@8"));
  EXPECT_GT(peak("fsdp2:ep=8", "hot:0.9@8"), peak("fsdp2:ep=8", "balanced"));
}

TEST(Predict, AWrongFitNamesBytesAndBuffers) {
  const Prediction p = predict(make("kimi-k2", "h200", 1, "fsdp2", 8192));
  EXPECT_FALSE(p.fits);
  EXPECT_FALSE(p.step_time.has_value());
  EXPECT_GT(p.hbm_peak, p.hbm_capacity);
  EXPECT_EQ(p.bound_by, "HBM capacity");
  EXPECT_NE(p.why_not.find("HBM needs "), std::string::npos) << p.why_not;
  EXPECT_NE(p.why_not.find(" too much (largest buffers: "), std::string::npos) << p.why_not;
  EXPECT_NE(p.why_not.find("adam_moments"), std::string::npos) << p.why_not;
  EXPECT_NEAR(sum(p.memory), static_cast<double>(p.hbm_peak), 1e-3 * static_cast<double>(p.hbm_peak));
  EXPECT_GT(p.tokens_per_step, 0);
  EXPECT_GT(p.model_flops_per_token, 0);

  const Prediction host = predict(make("qwen3-235b-a22b", "h200x4", 1, "fsdp2:offload=on", 1024));
  EXPECT_FALSE(host.fits);
  EXPECT_GT(host.host_peak, host.host_capacity);
  EXPECT_NE(host.why_not.find("host memory needs "), std::string::npos) << host.why_not;
  EXPECT_FALSE(host.step_time.has_value());
}

TEST(Predict, HostMemoryIsOfTheWholeNode) {
  const Scenario s = make("qwen3-30b-a3b", "h200x4", 1, "fsdp2:offload=on", 1024);
  const double parameters = static_cast<double>(model::count_parameters(s.model).total);
  EXPECT_NEAR(static_cast<double>(predict(s, {.only_memory = true}).host_peak) / (16 * parameters), 1, 0.01);
}

TEST(Predict, OnlyMemoryIsTheSameMemory) {
  for (const std::string& plan : plans()) {
    const Scenario s = make("olmoe-1b-7b", "h200", 2, plan, 8192);
    const Prediction memory = predict(s, {.only_memory = true}), whole = predict(s);
    EXPECT_FALSE(memory.step_time.has_value());
    EXPECT_EQ(memory.hbm_peak, whole.hbm_peak);
    EXPECT_EQ(memory.host_peak, whole.host_peak);
    EXPECT_EQ(memory.fits, whole.fits);
  }
}

// Ours reduces gradients by copy engines where a group is within a node, which takes a landing zone.
TEST(Predict, LandingZoneWhereGradientsAreReducedWithinANode) {
  const auto zone = [](const Scenario& s) {
    for (const Named& row : predict(s, {.only_memory = true}).memory)
      if (row.name == "landing_zone") return static_cast<int64_t>(row.value);
    return int64_t{0};
  };
  EXPECT_EQ(zone(make("olmoe-1b-7b", "h200", 1, mop_plan(8, 8, 1, 8), 8192)), program::kLandingBytes);
  EXPECT_EQ(zone(make("olmoe-1b-7b", "h200", 1, "fsdp2:runtime=native", 8192)), program::kLandingBytes);
  EXPECT_EQ(zone(make("olmoe-1b-7b", "h200", 1, "fsdp2", 8192)), 0) << "PyTorch's is NCCL's";
  EXPECT_EQ(zone(make("olmoe-1b-7b", "h200", 2, "fsdp2:runtime=native", 8192)), 0) << "groups of both nodes";
}

TEST(Predict, CalibrationsDiffer) {
  Scenario s = make("olmoe-1b-7b", "h200", 2, mop_plan(8, 16, 4, 8), 65536);
  const double measured = *predict(s).step_time;
  s.calibration = cost::Calibration::paper;
  EXPECT_NE(*predict(s).step_time, measured);
}

TEST(Predict, RefusesWhatIsOutOfRange) {
  const auto error_of = [](const Scenario& s) -> std::string {
    try {
      predict(s);
    } catch (const UserError& error) {
      return error.what();
    }
    return "";
  };
  Scenario s = make("tiny-qwen3-moe", "h200x4", 0, "fsdp2", 1024);
  EXPECT_EQ(error_of(s), "nodes is 0: it must be 1 to 65536");
  s.nodes = 1, s.gpus_per_node = 5;
  EXPECT_EQ(error_of(s), "gpus-per-node is 5: a node of h200x4 has 4");
  s.gpus_per_node = 0, s.workload.context = 0;
  EXPECT_EQ(error_of(s), "context is 0: it must be 1 to 1073741824");
  s.workload.context = 1 << 30, s.workload.sequences = 1 << 20;
  EXPECT_NE(error_of(s).find("is more than 2^36 tokens"), std::string::npos);
  s.workload.context = 1024, s.workload.sequences = 1, s.workload.accumulate = 5000;
  EXPECT_EQ(error_of(s), "accumulate is 5000: it must be 1 to 4096");
}

// FSDP2's sharding by our executor: the same shards as PyTorch's (but the gradients' are never freed) and
// faster kernels; skew never costs memory. Within a rank it makes fewer, larger products; between ranks it
// costs time.
TEST(Predict, NativeFsdp2) {
  for (const char* settings : {"", "ep=8,"}) {
    SCOPED_TRACE(settings);
    const auto of = [&](const char* runtime, const char* routing, int64_t context) {
      return predict(make("qwen3-30b-a3b", "h200", 2, std::string("fsdp2:") + settings + "runtime=" + runtime,
                          context, 1, 1, routing));
    };
    const Prediction eager = of("eager", "balanced", 8192), native = of("native", "balanced", 8192),
                     skewed = of("native", "zipf:1.0", 8192);
    ASSERT_TRUE(native.fits) << native.why_not;
    EXPECT_TRUE(native.warnings.empty() || native.warnings[0].find("nearly full") == std::string::npos);
    EXPECT_EQ(native.tokens_per_step, eager.tokens_per_step);
    EXPECT_LT(*native.step_time, *eager.step_time);
    EXPECT_GT(*native.step_time, native.model_flops_per_token * 8192 / 990e12);
    for (const char* held : {"weights", "optimizer_states"})
      EXPECT_NEAR(row(native.memory, held) / row(eager.memory, held), 1, 1e-3) << held;
    EXPECT_EQ(row(native.memory, "gradients"), row(native.memory, "weights"));
    EXPECT_EQ(skewed.hbm_peak, native.hbm_peak);
    if (*settings != '\0') {  // without expert parallelism no rank has more rows than another
      EXPECT_GT(*skewed.step_time, *native.step_time);
    }
    EXPECT_LT(*skewed.step_time, 1.5 * *native.step_time);
  }
  // Offloading brings weights, gradients and states to the host: two layers' worth stays.
  const Prediction held = predict(make("qwen3-30b-a3b", "h200", 2, "fsdp2:runtime=native", 8192)),
                   offloaded =
                       predict(make("qwen3-30b-a3b", "h200", 2, "fsdp2:runtime=native,offload=on", 8192));
  const double shard =
      static_cast<double>(model::count_parameters(model::read_config("qwen3-30b-a3b")).total) / 16;
  EXPECT_LT(static_cast<double>(offloaded.hbm_peak), static_cast<double>(held.hbm_peak) - 14 * shard);
  EXPECT_NEAR(static_cast<double>(offloaded.host_peak) / (8 * 16 * shard), 1, 0.01);
  EXPECT_GT(*offloaded.step_time, *held.step_time);
}

TEST(Predict, Fp32IsOurs) {
  Scenario s = make("tiny-qwen3-moe", "h200x4", 1, "fsdp2", 1024);
  s.workload.precision = plan::Precision::fp32;
  EXPECT_EQ(error_of([&] { predict(s); }),
            "precision is fp32, but PyTorch's FSDP2 is predicted in bf16 only; use bf16, or plan setting "
            "runtime=native");
  for (const std::string& plan : {std::string("fsdp2:runtime=native"), mop_plan(4, 4, 2, 4)}) {
    SCOPED_TRACE(plan);
    s.plan = plan::parse_plan(plan);
    s.workload.precision = plan::Precision::bf16;
    const Prediction narrow = predict(s);
    s.workload.precision = plan::Precision::fp32;
    const Prediction wide = predict(s);
    ASSERT_TRUE(wide.fits);
    EXPECT_GT(wide.hbm_allocated, narrow.hbm_allocated);
    EXPECT_LT(wide.hbm_allocated, 2 * narrow.hbm_allocated);
    ASSERT_EQ(wide.warnings.size(), narrow.warnings.size() + 1);
  }
}

TEST(Predict, TheBalanceLossCostsLittle) {
  Scenario s = make("olmoe-1b-7b", "h200", 2, mop_plan(8, 16, 2, 8), 8192);
  const Prediction without = predict(s);
  s.workload.balance_loss = true;
  const Prediction with = predict(s);
  EXPECT_GT(with.program_operations, without.program_operations);
  EXPECT_GE(*with.step_time, *without.step_time);
  EXPECT_LT(*with.step_time, 1.01 * *without.step_time);
}

TEST(Predict, UsesFewerGpusOfANodeWhenAsked) {
  Scenario s = make("olmoe-1b-7b", "h200", 1, "fsdp2", 4096);
  s.gpus_per_node = 4;
  EXPECT_EQ(s.gpus(), 4);
  const Prediction four = predict(s);
  s.gpus_per_node = 8;
  EXPECT_GT(four.hbm_allocated, predict(s).hbm_allocated);
}

// Half of the GPUs of two nodes are no node.
TEST(Predict, UsedGpusOfANodeDecideWhatCrosses) {
  Scenario whole = make("olmoe-1b-7b", "h200", 1, mop_plan(1, 8, 8, 8), 32768), halves = whole;
  halves.nodes = 2, halves.gpus_per_node = 4;
  EXPECT_GT(*predict(halves).step_time, 1.1 * *predict(whole).step_time);
}

}  // namespace
}  // namespace mop::predict::testing
