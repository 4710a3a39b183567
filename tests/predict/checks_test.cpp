// A prediction that is wrong in any of these ways is an internal error, not a number.
#include "sim/predict/checks.h"

#include <gtest/gtest.h>

#include "sim/base/error.h"
#include "tests/predict/support.h"

namespace mop::predict::testing {
namespace {

class Checks : public ::testing::Test {
 protected:
  void SetUp() override {
    scenario_ = make("tiny-qwen3-moe", "h200x4", 1, "fsdp2", 1024);
    prediction_ = predict(scenario_, {}, &details_);
    ASSERT_TRUE(prediction_.fits);
  }
  template <typename Break>
  void expect_caught(const std::string& part, Break broken) {
    Prediction p = prediction_;
    broken(p);
    try {
      check(scenario_, details_, p);
      FAIL() << "not caught";
    } catch (const InternalError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }
  Scenario scenario_;
  Details details_;
  Prediction prediction_;
};

TEST_F(Checks, ARightOnePasses) {
  EXPECT_NO_THROW(check(scenario_, details_, prediction_));
}

TEST_F(Checks, FasterThanItsFlops) {
  details_.schedules[0].flops = 2 * *prediction_.step_time * scenario_.cluster["peak_flops"];
  expect_caught("FLOPs alone", [](Prediction&) {});
}

TEST_F(Checks, FasterThanItsBytes) {
  details_.schedules[0].hbm_bytes = 2 * *prediction_.step_time * scenario_.cluster["hbm_peak_bw"];
  expect_caught("HBM bytes alone", [](Prediction&) {});
}

TEST_F(Checks, AResourceBeyondItsCapacity) {
  expect_caught("of its capacity", [](Prediction& p) { p.busy[0].value = 1.01; });
}

TEST_F(Checks, APathThatDoesNotAddUp) {
  expect_caught("critical path adds up", [](Prediction& p) { p.time[0].value *= 1.01; });
  expect_caught("critical path adds up", [](Prediction& p) { p.time.clear(); });
}

TEST_F(Checks, MemoryThatDoesNotAddUp) {
  expect_caught("memory rows add up",
                [](Prediction& p) { p.memory[0].value += 0.01 * static_cast<double>(p.hbm_peak); });
}

TEST_F(Checks, AnArenaSmallerThanItsBuffers) {
  expect_caught("arena", [](Prediction& p) { p.hbm_arena = p.hbm_allocated - 1; });
}

TEST_F(Checks, MoreThanThePeak) {
  expect_caught("MFU", [](Prediction& p) { p.mfu = 1.01; });
}

TEST_F(Checks, NoStepTime) {
  expect_caught("step time", [](Prediction& p) { p.step_time.reset(); });
}

}  // namespace
}  // namespace mop::predict::testing
