#include "exec/calibrate/findings.h"

#include <gtest/gtest.h>

#include "sim/base/error.h"

namespace mop::calibrate {
namespace {

TEST(Reading, IsTheMedianWithWhatLiesAround) {
  const Reading odd = reading_of({4, 2, 3});
  EXPECT_EQ(odd.value, 3);
  EXPECT_DOUBLE_EQ(odd.low, 2.0 / 3);
  EXPECT_DOUBLE_EQ(odd.high, 4.0 / 3);
  EXPECT_EQ(reading_of({1, 2, 3, 10}).value, 2.5);
  const Reading one = reading_of({7});
  EXPECT_EQ(one.value, 7);
  EXPECT_EQ(one.low, 1);
  EXPECT_EQ(one.high, 1);
  EXPECT_EQ(reading_of({0, 0}).high, 1);  // bytes that something does not take
  EXPECT_THROW(reading_of({}), InternalError);
}

TEST(Findings, StepsWaitForTheSlowestRank) {
  const Reading r = slowest({{10, 12, 11}, {9, 8, 20}, {}});
  EXPECT_EQ(r.value, 9);
  EXPECT_DOUBLE_EQ(r.low, 8.0 / 9);
  EXPECT_DOUBLE_EQ(r.high, 20.0 / 9);
  EXPECT_EQ(slowest({{5}}).value, 5);
  EXPECT_THROW(slowest({{}, {}}), InternalError);
}

// 0.6 s of runs: two pieces, and what is left counts in the mean alone.
TEST(Reading, HoldsItsValue) {
  const Reading r = mean_of(rates_of({0.25, 0.25, 0.1}, 10));
  EXPECT_EQ(r.value, 50);
  EXPECT_EQ(r.low, 40.0 / 50);
  EXPECT_EQ(r.high, 1);
}

Findings some() {
  Findings f{"4 x GPU", "driver 13.0",    {"attention"}, {"no kernel for heads of 12"}, {},
             {},        {{"matmul", 4.5}}};
  f.figures["pcie_up_bw"] = {{5.5e10, 0.98, 1.01}, "up"};
  f.tables["native_matmul"] = {"products",
                               {{{8192, 8192, 8192}, {7e14, 0.99, 1.02}}, {{128, 128, 128}, {1e12, 1, 1}}}};
  return f;
}

TEST(Findings, GoThroughJson) {
  const Findings f = some(), g = from_json(to_json(f));
  EXPECT_EQ(g.machine, f.machine);
  EXPECT_EQ(g.libraries, f.libraries);
  EXPECT_EQ(g.cut_short, f.cut_short);
  EXPECT_EQ(g.unsupported, f.unsupported);
  EXPECT_EQ(g.seconds, f.seconds);
  ASSERT_EQ(g.figures.size(), 1U);
  EXPECT_EQ(g.figures.at("pcie_up_bw").what, "up");
  EXPECT_EQ(g.figures.at("pcie_up_bw").reading.value, 5.5e10);
  EXPECT_EQ(g.figures.at("pcie_up_bw").reading.low, 0.98);
  ASSERT_EQ(g.tables.at("native_matmul").points.size(), 2U);
  EXPECT_EQ(g.tables.at("native_matmul").points[0].first, (std::vector<double>{8192, 8192, 8192}));
  EXPECT_EQ(g.tables.at("native_matmul").points[0].second.high, 1.02);
  Findings beside = f;  // as calibrations before 29 November 2026 kept some
  beside.figures["pcie_up_bw"].reading = {5.5e10, 1.0002, 1.0004};
  EXPECT_EQ(from_json(to_json(beside)).figures.at("pcie_up_bw").reading.low, 1);
  EXPECT_THROW(from_json(""), InternalError);
  EXPECT_THROW(from_json("{}"), InternalError);
}

TEST(Findings, OfTwoSetsOfProcessesAreOne) {
  Findings f = some(), more{"another", "", {"network"}, {}, {}, {}, {{"network", 2}}};
  more.figures["pcie_up_bw"] = {{1, 1, 1}, "the first one stays"};
  more.tables["emulated_network_all_gather"] = {"sockets", {{{4, 65536}, {1e9, 1, 1}}}};
  f.add(more);
  EXPECT_EQ(f.machine, "4 x GPU");
  EXPECT_EQ(f.figures.at("pcie_up_bw").reading.value, 5.5e10);
  EXPECT_EQ(f.tables.size(), 2U);
  EXPECT_EQ(f.cut_short, (std::vector<std::string>{"attention", "network"}));
  EXPECT_EQ(f.seconds, (std::map<std::string, double>{{"matmul", 4.5}, {"network", 2}}));
}

}  // namespace
}  // namespace mop::calibrate
