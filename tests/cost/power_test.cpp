#include "sim/cost/power.h"

#include <gmock/gmock.h>

#include <cmath>

#include "tests/error_of.h"

namespace mop::cost {
namespace {

// A GPU of 2 GHz at most that draws 100 W when idle and is kept at 690. Tensor work has 0.9 of the clock that
// is set, 1.6 GHz at most; products draw 900 W above idle at that, attention 700 forward, 1100 where it is
// streamed, and 500 backward, with the clock's power 2.5; memory-bound kernels 400 at 2 GHz, with its
// power 2.
constexpr double kMost = 0.8, kSag = 0.9, kAmong = 0.76;
double tensor_watts(double of_most, double clock) {
  return of_most * std::pow(clock / kMost, 2.5);
}
double memory_watts(double clock) {
  return 400 * clock * clock;
}
double alone(double of_most) {  // the clock in a row
  return std::min(kMost, kMost * std::pow(590 / of_most, 1 / 2.5));
}

cluster::ClusterModel cluster() {
  double set = 1;
  const double share = 0.75;
  while (share * tensor_watts(900, std::min(kMost, kSag * set)) + (1 - share) * memory_watts(set) > 590)
    set -= 1e-5;
  cluster::ClusterModel c;
  const std::pair<const char*, double> figures[]{{"power_limit_w", 690},
                                                 {"largest_clock_hz", 2e9},
                                                 {"idle_power_w", 100},
                                                 {"memory_bound_power_w", 500},
                                                 {"link_power_w", 250},
                                                 {"gpus_per_node", 2},
                                                 {"mixed_power_w", 690},
                                                 {"mixed_matmul_share", share},
                                                 {"mixed_matmul_clock_hz", 2e9 * kSag * set},
                                                 {"mixed_memory_bound_clock_hz", 2e9 * set}};
  for (const auto& [name, value] : figures) c.figures[name].value = value;
  for (const auto& [name, watts] :
       {std::pair{"matmul", 900.0}, std::pair{"deep_matmul", 900.0}, std::pair{"grouped_matmul", 900.0},
        std::pair{"attention_forward", 700.0}, std::pair{"attention_backward", 500.0},
        std::pair{"narrow_attention_forward", 600.0}, std::pair{"narrow_attention_backward", 450.0}}) {
    const std::string kind = name;
    c.figures[kind + "_clock_hz"].value = 2e9 * alone(watts);
    c.figures[kind + "_power_w"].value = 100 + tensor_watts(watts, alone(watts));
    c.figures[kind + "_burst_clock_hz"].value = 2e9 * kMost;
    c.figures[kind + "_among_clock_hz"].value = 2e9 * kAmong;  // the limit holds it down a little
    c.figures[kind + "_among_power_w"].value = 100 + tensor_watts(watts, kAmong);
  }
  return c;
}

Work work(double matmul, double grouped, double attention, double memory) {
  return {{matmul / 2, matmul / 2, grouped, 0, attention, 0, 0, memory}};
}
constexpr auto kMatmul = static_cast<size_t>(Draws::matmul),
               kAttention = static_cast<size_t>(Draws::attention_backward);

TEST(Power, NothingWithoutFigures) {
  EXPECT_FALSE(Power::of({}));
  cluster::ClusterModel c = cluster();
  c.figures.erase("mixed_matmul_share");
  EXPECT_THAT(error_of([&] { Power::of(c); }), ::testing::HasSubstr("no mixed_matmul_share"));
}

TEST(Power, WhatWasMeasuredAloneComesBack) {
  const auto power = Power::of(cluster());
  ASSERT_TRUE(power);
  const Work products = work(1, 0, 0, 0);
  const Clocks row = power->clocks(products, products.lasts({}), {});
  EXPECT_NEAR(row.tensor[kMatmul], alone(900), 1e-4);
  EXPECT_NEAR(row.set, alone(900) / kSag, 1e-4);
  EXPECT_NEAR(power->mean_clock(products, products.lasts(row), row), alone(900), 1e-4);
  const Clocks attention = power->clocks(work(0, 0, 1, 0), 1, {});
  EXPECT_EQ(attention.set, 1);  // 600 W
  EXPECT_NEAR(attention.tensor[kAttention], kMost, 1e-9);
  EXPECT_EQ(power->clocks(work(0, 0, 0, 1), 1, {}).set, 1);
  const Clocks seldom = power->clocks(products, 10, {});  // waits most of the time
  EXPECT_EQ(seldom.set, 1);
  EXPECT_NEAR(seldom.tensor[kMatmul], kMost, 1e-9);
}

// What memory-bound kernels draw at a lower clock is what the mixture leaves for them: less, or, where that
// is more than they draw at the largest, as much.
TEST(Power, MemoryBoundKernelsDrawTheRestOfTheMixture) {
  cluster::ClusterModel c = cluster();
  c.figures["power_limit_w"].value = 450;
  const Work norms = work(0, 0, 0, 1);
  EXPECT_NEAR(Power::of(c)->clocks(norms, 1, {}).set, std::sqrt(350.0 / 400), 1e-3);
  c.figures["mixed_power_w"].value = 800;
  const double least = Power::of(c)->clocks(norms, 1, {}).set;  // no clock is low enough
  EXPECT_LT(least, 0.31);
  c.figures["power_limit_w"].value = 501;
  EXPECT_EQ(Power::of(c)->clocks(norms, 1, {}).set, 1);
}

// Half as much with power to spare, half as much within the limit; none at all, none.
TEST(Power, KindsSagByThemselves) {
  cluster::ClusterModel c = cluster();
  const Work all = work(1, 0, 1, 1);
  const auto clocks_with = [&](double burst) {
    c.figures["attention_backward_burst_clock_hz"].value = 2e9 * burst;
    return Power::of(c)->clocks(all, all.lasts({}), {});
  };
  const Clocks half = clocks_with((1 + kMost) / 2), none = clocks_with(1);
  ASSERT_LT(half.set, 0.99);  // the limit holds it down
  EXPECT_NEAR(half.tensor[kMatmul], kSag * half.set, 1e-9);
  EXPECT_NEAR(half.tensor[kAttention], (1 + kSag) / 2 * half.set, 1e-9);
  EXPECT_NEAR(none.tensor[kAttention], none.set, 1e-9);
  // Where the deep products do not sag, there is nothing to tell it by; no clock is absurd.
  c.figures["deep_matmul_burst_clock_hz"].value = 2e9;
  const Clocks odd = clocks_with(kMost);
  EXPECT_GE(odd.tensor[kAttention], 0.3 * odd.set);
  EXPECT_LE(odd.tensor[kAttention], odd.set);
}

// A file that has one figure for all attention has it for each kind.
TEST(Power, AttentionByDirectionAndWidth) {
  cluster::ClusterModel c = cluster();
  const std::pair<Draws, double> kinds[]{{draws_of_attention(256, true), 700},
                                         {draws_of_attention(320, false), 500},
                                         {draws_of_attention(128, true), 600},
                                         {draws_of_attention(128, false), 450}};
  const auto row = [&](const Power& power, Draws kind) {
    Work all = work(0, 0, 0, 0);
    all.seconds[static_cast<size_t>(kind)] = 1;
    return power.clocks(all, all.lasts({}), {}).tensor[static_cast<size_t>(kind)];
  };
  for (const auto& [kind, watts] : kinds) EXPECT_NEAR(row(*Power::of(c), kind), alone(watts), 1e-4);
  for (const char* of : {"_clock_hz", "_power_w", "_burst_clock_hz", "_among_clock_hz", "_among_power_w"}) {
    c.figures["attention" + std::string(of)] = c.figures["attention_forward" + std::string(of)];
    for (const char* kind :
         {"attention_forward", "attention_backward", "narrow_attention_forward", "narrow_attention_backward"})
      c.figures.erase(kind + std::string(of));
  }
  for (const auto& [kind, watts] : kinds) EXPECT_NEAR(row(*Power::of(c), kind), alone(700), 1e-4);
}

// Of two GPUs the one with the lower clock under products alone has it in a step, too.
TEST(Power, GpusDiffer) {
  cluster::ClusterModel c = cluster();
  c.figures["gpus_per_node"].value = 2;
  c.tables["gpu_clock"].table =
      cluster::Table("gpu_clock", 0, 1, std::vector<std::vector<double>>{{1, 0.95}, {2, 1.02}});
  const auto power = Power::of(c);
  ASSERT_TRUE(power);
  EXPECT_NEAR(power->over_median(0), 0.95, 1e-12);
  EXPECT_NEAR(power->over_median(1), 1.02, 1e-12);
  const Work products = work(1, 0, 0, 0);
  EXPECT_NEAR(power->clocks(products, products.lasts({}), {}, 0.95).tensor[kMatmul], 0.95 * alone(900), 1e-4);
  c.figures["gpus_per_node"].value = 8;  // a file that has those of a smaller host as its base
  EXPECT_EQ(Power::of(c)->over_median(0), 1);
}

// Where nothing reaches the limit only the sag is left.
TEST(Power, PlentyOfIt) {
  cluster::ClusterModel c = cluster();
  c.figures["power_limit_w"].value = 2000;
  for (const char* kind : {"matmul", "deep_matmul", "grouped_matmul"}) {
    c.figures[std::string(kind) + "_clock_hz"].value = 2e9 * kMost;
    c.figures[std::string(kind) + "_power_w"].value = 1000;
  }
  const auto power = Power::of(c);
  ASSERT_TRUE(power);
  const Clocks clocks = power->clocks(work(1, 1, 1, 1), 4, {});
  EXPECT_EQ(clocks.set, 1);
  EXPECT_NEAR(clocks.tensor[kMatmul], kMost, 1e-9);
}

// The mean power is what it is kept at, at any clock below the largest.
TEST(Power, StaysWithinTheLimit) {
  const auto power = Power::of(cluster());
  ASSERT_TRUE(power);
  for (const double idle : {0.0, 0.05, 0.2})
    for (const double memory : {0.0, 0.1, 0.3})
      for (const double attention : {0.0, 0.4})
        for (const double beside : {0.0, 0.1}) {
          Work all = work(0.5, 0.4, attention, memory);
          all.hbm = beside;
          all.links = 2 * beside;
          Clocks now;
          now.tensor.fill(0.7);
          const double seconds = all.lasts(now) + idle;
          const Clocks c = power->clocks(all, seconds, now);
          const double lasts = all.lasts(c) + idle;
          double joules = (memory + beside) * memory_watts(c.set) + 2 * beside * 150;
          for (size_t k = 0; k < kTensorDraws; ++k)
            joules += all.seconds[k] / c.tensor[k] * tensor_watts(k == kAttention ? 500 : 900, c.tensor[k]);
          if (c.set < 1)
            EXPECT_NEAR(100 + joules / lasts, 690, 0.5);
          else
            EXPECT_LE(100 + joules / lasts, 690.5);
        }
}

}  // namespace
}  // namespace mop::cost
