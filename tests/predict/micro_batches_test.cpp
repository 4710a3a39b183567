// What a search is told of many micro-batches, against all of them simulated.
#include "sim/predict/micro_batches.h"

#include <gtest/gtest.h>

#include "tests/predict/support.h"

namespace mop::predict::testing {
namespace {

TEST(Outline, OfAFewMicroBatchesIsThePrediction) {
  for (const int64_t accumulate : {1, 2, 3}) {
    const Scenario s = make("olmoe-1b-7b", "h200x4", 1, mop_plan(1, 4, 1, 4), 4096, 1, accumulate);
    const Prediction p = predict(s);
    const Outline o = outline(s);
    EXPECT_TRUE(o.fits);
    EXPECT_EQ(o.step_time, *p.step_time);
    EXPECT_EQ(o.hbm_peak, p.hbm_peak);
    EXPECT_EQ(o.host_peak, p.host_peak);
    EXPECT_EQ(o.tokens_per_step, p.tokens_per_step);
  }
}

TEST(Outline, OfManyGrowsAsFromTheSecondToTheThird) {
  for (const std::string& plan : {mop_plan(1, 4, 1, 4), mop_plan(2, 2, 2, 2, "optimizer=host"),
                                  mop_plan(1, 4, 1, 4, "optimizer=stream"), std::string("fsdp2:ep=4"),
                                  std::string("fsdp2:runtime=native,offload=on")}) {
    SCOPED_TRACE(plan);
    const Scenario s = make("olmoe-1b-7b", "h200x4", 1, plan, 4096, 2, 17);
    const Prediction p = predict(s);
    const Outline o = outline(s);
    ASSERT_TRUE(o.fits);
    EXPECT_NEAR(o.step_time, *p.step_time, 0.01 * *p.step_time);
    EXPECT_NEAR(static_cast<double>(o.hbm_peak), static_cast<double>(p.hbm_peak),
                1e-3 * static_cast<double>(p.hbm_peak));
    EXPECT_EQ(o.host_peak, p.host_peak);
    EXPECT_EQ(o.tokens_per_step, p.tokens_per_step);
  }
}

// The copies of staged states are the limit of three micro-batches, computing that of many.
TEST(Outline, OfCopiesThatManyHide) {
  for (const auto& [gpus, staged] : {std::pair{4, 24}, {2, 16}}) {
    Scenario s =
        make("gpt-oss-20b", "h200x4", 1,
             mop_plan(1, gpus, 1, gpus, "optimizer=stream,optimizer-staged-layers=" + std::to_string(staged)),
             4096, 1, 32);
    s.gpus_per_node = gpus;
    const Prediction p = predict(s);
    const Outline o = outline(s);
    ASSERT_TRUE(o.fits);
    EXPECT_NEAR(o.step_time, *p.step_time, 0.1 * *p.step_time) << gpus << " GPUs";
    Scenario few = s;
    few.workload.accumulate = 3;
    EXPECT_GT(o.step_time, 1.5 * *predict(few).step_time) << gpus << " GPUs";
  }
}

TEST(Outline, PackingDoesNotGrow) {
  const Scenario s = make("olmoe-1b-7b", "h200x4", 1, mop_plan(4, 4, 4, 4, "checkpoints=host"), 4096, 4, 20);
  const Prediction p = predict(s);
  EXPECT_NEAR(static_cast<double>(outline(s).hbm_peak), static_cast<double>(p.hbm_peak),
              1e-3 * static_cast<double>(p.hbm_peak));
}

// Whether a plan fits is exact; what is too large by its live bytes alone is not placed, and said to miss no
// more than it does.
TEST(Outline, FitsWhatThePredictionFits) {
  int fit = 0, too_large = 0;
  for (const int64_t context : {int64_t{8} << 10, int64_t{128} << 10, int64_t{512} << 10, int64_t{2} << 20})
    for (const char* settings : {"", "checkpoints=host", "optimizer=host,checkpoints=host"}) {
      const Scenario s = make("gpt-oss-20b", "h200x4", 1, mop_plan(1, 4, 4, 4, settings), context, 1);
      SCOPED_TRACE(settings + std::to_string(context));
      const Prediction p = predict(s, {.only_memory = true});
      const Outline o = outline(s, true);
      EXPECT_EQ(o.fits, p.fits);
      EXPECT_LE(o.hbm_peak, p.hbm_peak);
      EXPECT_LE(o.host_peak, p.host_peak);
      if (p.fits) {
        ++fit;
        EXPECT_EQ(o.hbm_peak, p.hbm_peak);
        EXPECT_EQ(o.host_peak, p.host_peak);
      } else {
        ++too_large;
        EXPECT_GT(static_cast<double>(o.hbm_peak), 0.9 * static_cast<double>(p.hbm_peak));
      }
    }
  EXPECT_GE(fit, 3);
  EXPECT_GE(too_large, 3);
}

TEST(Outline, TellsWhatDoesNotFit) {
  const Outline o = outline(make("kimi-k2", "h200x4", 1, mop_plan(4, 4, 4, 4), 4096, 1, 40));
  EXPECT_FALSE(o.fits);
  EXPECT_GT(o.hbm_peak, o.hbm_capacity);
}

}  // namespace
}  // namespace mop::predict::testing
