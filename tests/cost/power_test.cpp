#include "sim/cost/power.h"

#include <gmock/gmock.h>

#include <cmath>

#include "tests/error_of.h"

namespace mop::cost {
namespace {

// Tensor work draws 800 W above idle at the largest clock, attention 500, with the clock to the power 1.5.
cluster::ClusterModel cluster() {
  const auto clock_of = [](double watts) { return std::pow(600 / watts, 1 / 1.5); };
  const double mixed = std::pow((700 - 0.5 * 400 - 0.5 * 100) / (0.5 * 800), 1 / 1.5);
  cluster::ClusterModel c;
  const std::pair<const char*, double> figures[]{
      {"power_limit_w", 700},          {"largest_clock_hz", 2e9},
      {"idle_power_w", 100},           {"memory_bound_power_w", 400},
      {"matmul_power_w", 700},         {"matmul_clock_hz", 2e9 * clock_of(800)},
      {"grouped_matmul_power_w", 700}, {"grouped_matmul_clock_hz", 2e9 * clock_of(800)},
      {"attention_power_w", 600},      {"attention_clock_hz", 2e9},
      {"mixed_power_w", 700},          {"mixed_clock_hz", 2e9 * mixed},
      {"mixed_matmul_share", 0.5}};
  for (const auto& [name, value] : figures) c.figures[name].value = value;
  return c;
}

TEST(Power, NothingWithoutFigures) {
  EXPECT_FALSE(Power::of({}));
  cluster::ClusterModel c = cluster();
  c.figures.erase("mixed_matmul_share");
  EXPECT_THAT(error_of([&] { Power::of(c); }), ::testing::HasSubstr("no mixed_matmul_share"));
}

TEST(Power, WhatWasMeasuredAloneComesBack) {
  const auto power = Power::of(cluster());
  ASSERT_TRUE(power);
  const double alone = std::pow(600.0 / 800, 1 / 1.5);
  EXPECT_NEAR(power->clock({1, 0, 0, 0}, 1, 1), alone, 1e-6);
  EXPECT_NEAR(power->clock({0, 3, 0, 0}, 3 / 0.8, 0.8), alone, 1e-6);
  EXPECT_EQ(power->clock({0, 0, 1, 0}, 1, 1), 1);  // 600 W
  EXPECT_EQ(power->clock({0, 0, 0, 1}, 1, 1), 1);
  EXPECT_EQ(power->clock({1, 0, 0, 0}, 10, 1), 1);  // waits most of the time
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
  const double alone = std::pow(600.0 / 800, 1 / 1.5);
  EXPECT_NEAR(power->clock({1, 0, 0, 0}, 1, 1, 0.95), 0.95 * alone, 1e-6);
  c.figures["gpus_per_node"].value = 8;  // a file that has those of a smaller host as its base
  EXPECT_EQ(Power::of(c)->over_median(0), 1);
}

// Where nothing reaches the limit the clock is the largest.
TEST(Power, PlentyOfIt) {
  cluster::ClusterModel c = cluster();
  c.figures["power_limit_w"].value = 2000;
  for (const char* kind : {"matmul", "grouped_matmul", "mixed"})
    c.figures[std::string(kind) + "_clock_hz"].value = 2e9;
  const auto power = Power::of(c);
  ASSERT_TRUE(power);
  EXPECT_EQ(power->clock({1, 1, 1, 1}, 4, 1), 1);
}

// The mean power is the limit's at any clock below the largest.
TEST(Power, StaysWithinTheLimit) {
  const auto power = Power::of(cluster());
  ASSERT_TRUE(power);
  for (const double idle : {0.0, 0.05, 0.2})
    for (const double memory : {0.0, 0.1, 0.3})
      for (const double attention : {0.0, 0.4}) {
        const Work work{0.5, 0.4, attention, memory};
        const double tensor = 0.9 + attention, at = 0.85, seconds = tensor / at + memory + idle,
                     clock = power->clock(work, seconds, at), lasts = tensor / clock + memory + idle;
        const double watts = 100 + (0.9 / clock * 800 * std::pow(clock, 1.5) +
                                    attention / clock * 500 * std::pow(clock, 1.5) + memory * 300) /
                                       lasts;
        if (clock < 1)
          EXPECT_NEAR(watts, 700, 0.01);
        else
          EXPECT_LE(watts, 700);
      }
}

}  // namespace
}  // namespace mop::cost
