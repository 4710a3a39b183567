#include "sim/validate/what_if.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "sim/base/paths.h"
#include "tests/error_of.h"
#include "tests/validate/support.h"

namespace mop::validate {
namespace {

using plan::Family;
using ::testing::HasSubstr;

Comparison other(int64_t id, double measured_over_predicted, const char* cluster = "h200x4",
                 Family family = Family::mop) {
  Comparison c;
  c.measured.id = id;
  c.scenario.cluster.name = cluster;
  c.scenario.plan.family = family;
  c.step_s = 2;
  c.measured.step_time_s = 2 * measured_over_predicted;
  return c;
}

TEST(WhatIf, IsTheMeasuredTimeScaledByThePredictions) {
  const predict::Scenario s = small_scenario();
  const Comparison base = compare(measured(s, 1.5), nullptr);
  predict::Scenario longer = s;
  longer.workload.context = 4096;
  const double predicted = *predict::predict(longer).step_time;
  ASSERT_GT(predicted, *base.step_s);
  const WhatIf answer = what_if(base, longer, {});
  EXPECT_DOUBLE_EQ(*answer.changed.step_time, predicted);
  EXPECT_NEAR(*answer.anchored_s, 1.5 * predicted, 1e-12);
  EXPECT_FALSE(answer.error.bar);
  EXPECT_EQ(answer.error.runs, 0U);
}

TEST(WhatIf, WhatDoesNotFitHasNoTime) {
  const predict::Scenario s = small_scenario();
  predict::Scenario tight = s;
  tight.cluster.figures.at("hbm_bytes").value = 1 << 20;
  const WhatIf answer = what_if(compare(measured(s), nullptr), tight, {});
  EXPECT_FALSE(answer.changed.fits);
  EXPECT_FALSE(answer.anchored_s);
  EXPECT_THAT(answer.changed.why_not, HasSubstr("too much"));
}

TEST(ErrorBar, IsTheSpreadOfSimilarRuns) {
  const Comparison base = other(1, 9);
  const std::vector<Comparison> others{base,
                                       other(2, 1.0),
                                       other(3, 1.1),
                                       other(4, 1.2),
                                       other(5, 7, "h200x4", Family::fsdp2),
                                       other(6, 7, "h200")};
  const ErrorBar bar = error_bar(base, Family::mop, others);
  EXPECT_EQ(bar.runs, 3U);
  EXPECT_NEAR(bar.bias, 1.1, 1e-12);
  EXPECT_NEAR(*bar.bar, 0.1 / 1.1, 1e-12);
  EXPECT_EQ(bar.chosen, "plan family mop on cluster h200x4");
}

TEST(ErrorBar, TakesLessSimilarRunsWhereTheseAreTooFew) {
  const Comparison base = other(1, 1);
  std::vector<Comparison> others{other(2, 1), other(3, 1), other(4, 1.3, "h200x4", Family::fsdp2)};
  EXPECT_EQ(error_bar(base, Family::mop, others).chosen, "any plan on cluster h200x4");
  others[2] = other(4, 1.3, "h200");
  const ErrorBar any = error_bar(base, Family::mop, others);
  EXPECT_EQ(any.chosen, "any plan on any cluster");
  EXPECT_TRUE(any.bar);
  others[2].on_gpus = false;
  const ErrorBar none = error_bar(base, Family::mop, others);
  EXPECT_EQ(none.runs, 2U);
  EXPECT_FALSE(none.bar);
}

TEST(LinkSpeed, IsOfEveryCollective) {
  cluster::ClusterModel cluster =
      cluster::read_cluster((data_home() / "scenarios/validation/clusters/h200-2x1.json").string());
  const double before = cluster.table("network_all_to_all").at({1e9}).value;
  set_link_speed(cluster, "x2");
  EXPECT_NEAR(cluster.table("network_all_to_all").at({1e9}).value, 2 * before, 1e-6 * before);
  EXPECT_EQ(cluster.tables.at("network_all_to_all").source, cluster::Source::assumed);
}

TEST(LinkSpeed, IsAFactorOrARate) {
  cluster::ClusterModel cluster = cluster::read_cluster("h200");
  const double speed = cluster["nic_bw"], peak = cluster["nic_peak_bw"];
  set_link_speed(cluster, "x2");
  EXPECT_DOUBLE_EQ(cluster["nic_bw"], 2 * speed);
  EXPECT_DOUBLE_EQ(cluster["nic_peak_bw"], 2 * peak);
  set_link_speed(cluster, "23GB/s");
  EXPECT_DOUBLE_EQ(cluster["nic_bw"], 23e9);
  EXPECT_DOUBLE_EQ(cluster["nic_peak_bw"], peak * 23e9 / speed);
  EXPECT_EQ(cluster.figures.at("nic_bw").source, cluster::Source::assumed);
  for (const char* bad : {"x0", "x", "2", "x-1", "xinf", "fast"})
    EXPECT_THAT(error_of([&] { set_link_speed(cluster, bad); }), HasSubstr("write a factor like x2")) << bad;
}

}  // namespace
}  // namespace mop::validate
