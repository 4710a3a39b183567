#include "sim/validate/bounds.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/error_of.h"
#include "tests/validate/support.h"

namespace mop::validate {
namespace {

using ::testing::HasSubstr;

// A run of 10 s; errors as given.
Comparison run(int64_t id, double step_error, bool held_out = false) {
  static const predict::Scenario scenario = small_scenario();
  Comparison c;
  c.scenario = scenario;
  c.measured.id = id;
  c.measured.model = "m";
  c.measured.plan_family = "mop";
  c.measured.plan = "mop:ep=" + std::to_string(id);
  c.measured.context = 512 * id;  // questions of their own
  c.scenario.workload.context = c.measured.context;
  c.measured.step_time_s = 10;
  c.step_s = 10 * (1 + step_error);
  c.measured.hbm_peak_bytes = c.hbm_bytes = 1000;
  c.measured.host_peak_bytes = c.host_bytes = 1000;
  c.held_out = held_out;
  return c;
}

// A plan of one question for all.
Comparison plan_of(int64_t id, const char* family, double measured, double predicted) {
  Comparison c = run(id, 0);
  c.scenario.workload.context = c.measured.context = 512;
  c.measured.plan_family = family;
  c.measured.step_time_s = measured;
  c.step_s = predicted;
  return c;
}

const Verdict& verdict(const std::vector<Verdict>& all, const std::string& name) {
  for (const Verdict& one : all)
    if (one.name == name) return one;
  ADD_FAILURE() << "no " << name;
  return all.front();
}

TEST(Bounds, ReadAndWritten) {
  EXPECT_EQ(describe(Bounds{}), "hbm=1%,host=2%,step-mean=5%,step-worst=12%,ratio=5%,ranking=2%,op=10%");
  const Bounds bounds = parse_bounds("step-mean=7.5,hbm=0%");
  EXPECT_DOUBLE_EQ(bounds.step_mean, 0.075);
  EXPECT_EQ(bounds.hbm, 0);
  EXPECT_EQ(bounds.ratio, Bounds{}.ratio);
  EXPECT_EQ(describe(parse_bounds(describe(bounds))), describe(bounds));
  EXPECT_THAT(error_of([] { parse_bounds("hmb=1"); }), HasSubstr("did you mean 'hbm'"));
  for (const char* bad : {"hbm", "hbm=", "hbm=-1", "hbm=nan", "hbm=1%%"})
    EXPECT_THAT(error_of([&] { parse_bounds(bad); }), HasSubstr("no percentage")) << bad;
}

TEST(Bounds, StepTimesAreJudgedOnHeldOutRunsOnly) {
  std::vector<Comparison> runs{run(1, 0.5), run(2, -0.06, true), run(3, 0.03, true), run(4, 0.01, true)};
  runs.push_back(run(5, 0.9, true));
  runs.back().on_gpus = false;  // the CPU backend's times do not count
  const std::vector<Verdict> all = judge(runs, {});
  const Verdict &mean = verdict(all, "step-mean"), &worst = verdict(all, "step-worst");
  EXPECT_NEAR(mean.value, 0.1 / 3, 1e-12);
  EXPECT_EQ(mean.count, 3U);
  EXPECT_TRUE(mean.holds());
  EXPECT_NEAR(worst.value, 0.06, 1e-12);
  EXPECT_THAT(worst.of, HasSubstr("#2"));
  EXPECT_FALSE(verdict(judge(runs, parse_bounds("step-worst=5")), "step-worst").holds());
  EXPECT_NEAR(step_errors(runs, false).mean, 0.6 / 4, 1e-12);
}

TEST(Bounds, WithoutHeldOutRunsStepTimesOfAllAreJudged) {
  const std::vector<Comparison> runs{run(1, 0.13), run(2, 0.01)};
  const std::vector<Verdict> all = judge(runs, {});
  EXPECT_NEAR(verdict(all, "step-mean").value, 0.07, 1e-12);
  EXPECT_THAT(verdict(all, "step-mean").of, HasSubstr("none held out"));
  EXPECT_FALSE(verdict(all, "step-worst").holds());
}

TEST(Bounds, MemoryIsJudgedByTheWorstRun) {
  std::vector<Comparison> runs{run(1, 0), run(2, 0)};
  runs[1].hbm_bytes = 989;
  runs[0].host_bytes = 1021;
  const std::vector<Verdict> all = judge(runs, {});
  EXPECT_NEAR(verdict(all, "hbm").value, 0.011, 1e-12);
  EXPECT_FALSE(verdict(all, "hbm").holds());
  EXPECT_NEAR(verdict(all, "host").value, 0.021, 1e-12);
  EXPECT_FALSE(verdict(all, "host").holds());
  runs[1].hbm_bytes = 990;
  runs[0].host_bytes = 1020;
  EXPECT_TRUE(verdict(judge(runs, parse_bounds("hbm=1.001,host=2.001")), "hbm").holds());
}

TEST(Bounds, WhatWasNotPredictedBreaksOne) {
  std::vector<Comparison> runs{run(1, 0), run(2, 0)};
  EXPECT_TRUE(verdict(judge(runs, {}), "predicted").holds());
  runs[0].why_not = "the model is gone";
  runs[0].step_s.reset();
  EXPECT_FALSE(verdict(judge(runs, {}), "predicted").holds());
}

TEST(Bounds, RatioIsOfTheFastestPlanOfEachFamily) {
  // Measured 8 : 10, predicted 9 : 10.
  const std::vector<Comparison> runs{plan_of(1, "mop", 8, 9), plan_of(2, "mop", 12, 5),
                                     plan_of(3, "fsdp2", 10, 10)};
  const Verdict& ratio = verdict(judge(runs, {}), "ratio");
  EXPECT_EQ(ratio.count, 1U);
  EXPECT_NEAR(ratio.value, 0.125, 1e-12);
}

TEST(Bounds, RankingIsTheTimeThatThePredictionsChoiceLoses) {
  std::vector<Comparison> runs{plan_of(1, "mop", 10, 9), plan_of(2, "mop", 10.1, 8),
                               plan_of(3, "mop", 20, 30)};
  EXPECT_NEAR(verdict(judge(runs, {}), "ranking").value, 0.01, 1e-12);
  EXPECT_TRUE(verdict(judge(runs, {}), "ranking").holds());
  runs[2].step_s = 7;
  EXPECT_NEAR(verdict(judge(runs, {}), "ranking").value, 1, 1e-12);
  EXPECT_EQ(verdict(judge(runs, {}), "ratio").count, 0U);
  EXPECT_TRUE(verdict(judge(runs, {}), "ratio").holds());  // nothing to test
}

TEST(Bounds, PlansOfOtherQuestionsAreNotCompared) {
  EXPECT_TRUE(plan_sets(std::vector{run(1, 0), run(2, 0)}).empty());
  std::vector<Comparison> same{plan_of(1, "mop", 10, 9), plan_of(2, "fsdp2", 11, 9)};
  ASSERT_EQ(plan_sets(same).size(), 1U);
  same[1].measured.tokens_per_step = 5;
  EXPECT_TRUE(plan_sets(same).empty());
  same[1] = same[0];  // the same plan twice is no choice
  EXPECT_TRUE(plan_sets(same).empty());
}

TEST(Bounds, OperationsAreJudgedByTheWorstKindsMedianOverRuns) {
  std::vector<Comparison> runs{run(1, 0), run(2, 0), run(3, 0)};
  const double errors[] = {0.05, 0.30, 0.20};
  for (size_t i = 0; i < 3; ++i) {
    runs[i].measured_step_s = 10;
    runs[i].operations = {
        {"attention gemm", "compute", 2, 2 * (1 + errors[i])},  // two components of one kind
        {"dense gemm", "compute", 2, 2 * (1 + errors[i])},
        {"router topk", "compute", 0.19, 5},  // below 2 % of the step
        {"dense all_gather", "gather", 1, 0.91},
        {kIdle, "", 5, 50}};
  }
  const std::vector<KindErrors> kinds = kind_errors(runs);
  ASSERT_EQ(kinds.size(), 2U);
  EXPECT_EQ(kinds[0].kind, "gemm");
  EXPECT_NEAR(kinds[0].median(), 0.20, 1e-12);
  EXPECT_NEAR(kinds[1].median(), 0.09, 1e-12);
  const Verdict& op = verdict(judge(runs, {}), "op");
  EXPECT_NEAR(op.value, 0.20, 1e-12);
  EXPECT_THAT(op.of, HasSubstr("gemm (median of 3)"));
  EXPECT_FALSE(op.holds());
}

}  // namespace
}  // namespace mop::validate
