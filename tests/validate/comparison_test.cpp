#include "sim/validate/comparison.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/error_of.h"
#include "tests/validate/support.h"

namespace mop::validate {
namespace {

using ::testing::HasSubstr;

TEST(Question, ReadsBackToTheSameScenario) {
  const predict::Scenario s = small_scenario();
  const predict::Scenario back = scenario_of(measured(s), nullptr);
  EXPECT_EQ(back.model.name, s.model.name);
  EXPECT_EQ(back.cluster.name, "h200x4");
  EXPECT_EQ(back.gpus(), 2);
  EXPECT_EQ(back.workload.context, 512);
  EXPECT_EQ(back.workload.sequences, 2);
  EXPECT_EQ(back.workload.precision, plan::Precision::fp32);
  EXPECT_TRUE(back.workload.balance_loss);
  EXPECT_EQ(plan::describe(back.plan), plan::describe(s.plan));
}

TEST(Question, OfAnOlderRecordIsThePredictionsBesideIt) {
  store::RunRecord old = measured(small_scenario());
  old.detail = R"({"backend": "cuda"})";
  EXPECT_THAT(error_of([&] { scenario_of(old, nullptr); }), HasSubstr("no prediction is stored beside it"));
  store::RunRecord prediction;
  prediction.detail =
      R"({"model": "tiny-qwen3-moe", "cluster": "h200x4", "gpus_per_node": 2, "precision": "fp32",
                          "balance_loss": true, "routing": "zipf:1.2", "calibration": "measured"})";
  EXPECT_EQ(plan::describe(scenario_of(old, &prediction).workload.routing), "zipf:1.2");
}

// As of a folder that was made for the run.
TEST(Question, AModelThatIsGoneIsInTheRecord) {
  store::RunRecord record = measured(small_scenario());
  nlohmann::json detail = nlohmann::json::parse(record.detail);
  detail[kQuestion]["model"] = "/nowhere/tiny-qwen3-moe";
  record.detail = detail.dump();
  const predict::Scenario back = scenario_of(record, nullptr);
  EXPECT_EQ(back.model.name, "tiny-qwen3-moe");
  EXPECT_EQ(predict::model_flops(back).total(), predict::model_flops(small_scenario()).total());
  EXPECT_NEAR(compare(record, nullptr).step_error(), 0, 1e-12);
  detail[kQuestion].erase("config");  // a record of before
  record.detail = detail.dump();
  EXPECT_THAT(error_of([&] { scenario_of(record, nullptr); }),
              HasSubstr("/nowhere/tiny-qwen3-moe: no such file"));
}

TEST(Question, AnotherModelOfTheNameIsRefused) {
  store::RunRecord record = measured(small_scenario());
  *record.model_flops_per_token *= 1.001;
  EXPECT_THAT(error_of([&] { scenario_of(record, nullptr); }), HasSubstr("its file has changed"));
}

TEST(Comparison, OfAPerfectMeasurementHasNoErrors) {
  const Comparison c = compare(measured(small_scenario()), nullptr);
  ASSERT_TRUE(c.predicted()) << c.why_not;
  EXPECT_NEAR(c.step_error(), 0, 1e-12);
  EXPECT_EQ(c.hbm_error(), 0);
  EXPECT_EQ(c.host_error(), 0);
  ASSERT_GT(c.operations.size(), 10U);
  for (const OpDifference& op : c.operations) {
    EXPECT_NEAR(op.difference(), 0, 1e-12) << op.name;
    EXPECT_EQ(op.measured_count, op.predicted_count) << op.name;
  }
}

TEST(Comparison, ErrorsAreOfThePredictionOverTheMeasurement) {
  store::RunRecord record = measured(small_scenario(), 1.25);
  *record.hbm_peak_bytes *= 2;
  const Comparison c = compare(record, nullptr);
  EXPECT_NEAR(c.step_error(), -0.2, 1e-12);
  EXPECT_NEAR(c.hbm_error(), -0.5, 1e-9);
  // All operations took what was predicted: what is left is idle time, and it comes first.
  EXPECT_EQ(c.operations.front().name, kIdle);
  EXPECT_NEAR(c.operations.front().difference(), 0.2 * *record.step_time_s, 1e-12);
}

TEST(Comparison, ComputeAndIdleTimeAddUpToTheStep) {
  const store::RunRecord record = measured(small_scenario(), 1.1);
  const Comparison c = compare(record, nullptr);
  double there = 0, said = 0;
  for (const OpDifference& op : c.operations)
    if (op.stream == "compute" || op.name == kIdle) there += op.measured, said += op.predicted;
  EXPECT_NEAR(there, *record.step_time_s, 1e-12);
  EXPECT_NEAR(said, *c.step_s, 1e-12);
}

TEST(Comparison, OfTheCpuBackendIsOfArenas) {
  store::RunRecord record = measured(small_scenario());
  auto detail = nlohmann::json::parse(record.detail);
  detail["backend"] = "cpu";
  record.detail = detail.dump();
  const Comparison c = compare(record, nullptr);
  EXPECT_FALSE(c.on_gpus);
  EXPECT_LT(c.hbm_bytes, *record.hbm_peak_bytes);  // no context, no libraries
  EXPECT_GT(c.hbm_bytes, 0);
}

TEST(Comparison, SaysThatRoutingWasSkewed) {
  store::RunRecord record = measured(small_scenario());
  auto detail = nlohmann::json::parse(record.detail);
  for (const double imbalance : {9.0, 9.0, 3.25, 3.25})  // the later half counts
    detail["steps"].push_back({{"expert_imbalance", imbalance}});
  record.detail = detail.dump();
  const Comparison c = compare(record, nullptr);
  ASSERT_EQ(c.notes.size(), 1U);
  EXPECT_THAT(c.notes[0],
              HasSubstr("the fullest expert had 3.25 times the mean rows; predicted for balanced routing"));
}

// By medians of the later half. Older runs have the clock of process 0 alone.
TEST(Comparison, NamesTheSlowestGpu) {
  const auto note_with = [](const std::vector<nlohmann::json>& steps) {
    store::RunRecord record = measured(small_scenario());
    auto detail = nlohmann::json::parse(record.detail);
    detail["steps"] = steps;
    record.detail = detail.dump();
    const Comparison c = compare(record, nullptr);
    return c.notes.empty() ? "" : c.notes[0];
  };
  const auto step = [](std::vector<double> clocks) {
    return nlohmann::json{{"clock_hz", clocks[0]}, {"clocks_hz", clocks}};
  };
  const nlohmann::json early = step({1e9, 1e9, 1e9, 1e9});
  EXPECT_THAT(
      note_with({early, early, step({1.5e9, 1.45e9, 1.55e9, 1.5e9}), step({1.5e9, 1.43e9, 1.53e9, 1.5e9})}),
      HasSubstr("the clock of the slowest GPU, rank 1, was 1.44 GHz, of the fastest, rank 2, 1.54 "
                "(predicted of the slowest: "));
  EXPECT_THAT(note_with({{{"clock_hz", 1.6e9}}}), HasSubstr("the clock of process 0's GPU was 1.60 GHz"));
  EXPECT_THAT(note_with({step({1.6e9})}), HasSubstr("the GPU's clock was 1.60 GHz"));
  EXPECT_EQ(note_with({step({0, 0, 0, 0})}), "");  // not told
}

// What the routers chose is known only afterwards: it is predicted for that, and says what it was for the
// stated routing.
TEST(Comparison, TakesTheRoutingThatTheRunRecorded) {
  const predict::Scenario s = small_scenario();
  store::RunRecord record = measured(s);
  auto detail = nlohmann::json::parse(record.detail);
  std::vector<int64_t> rows(static_cast<size_t>(s.model.experts), 0);
  rows[0] = rows[1] = 500;
  detail[kExpertRows] = std::vector(static_cast<size_t>(s.model.moe_layers()), rows);
  record.detail = detail.dump();
  const Comparison c = compare(record, nullptr);
  ASSERT_TRUE(c.predicted()) << c.why_not;
  EXPECT_EQ(c.scenario.workload.routing.counts.at(0), rows);
  EXPECT_EQ(c.stated_routing, "balanced");
  EXPECT_NE(*c.step_s, *record.step_time_s);
  ASSERT_FALSE(c.notes.empty());
  EXPECT_THAT(c.notes[0], HasSubstr("predicted for balanced routing"));
}

TEST(Comparison, WhatCannotBePredictedSaysWhy) {
  store::RunRecord record = measured(small_scenario());
  record.plan = "mop:ep=3";
  const Comparison c = compare(record, nullptr);
  EXPECT_FALSE(c.predicted());
  EXPECT_THAT(c.why_not, HasSubstr("ep is 3"));
  EXPECT_FALSE(c.step_s);
}

TEST(Comparison, RelativeErrorOfNothing) {
  EXPECT_EQ(relative_error(0, 0), 0);
  EXPECT_TRUE(std::isinf(relative_error(1, 0)));
}

}  // namespace
}  // namespace mop::validate
