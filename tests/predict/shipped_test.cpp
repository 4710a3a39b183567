// Every shipped model under both families, its plan left to the planner: a prediction, and no failed check.
#include <gtest/gtest.h>

#include "sim/search/planner.h"
#include "tests/predict/support.h"

namespace mop::predict::testing {
namespace {

class Shipped : public ::testing::TestWithParam<std::string> {};

TEST_P(Shipped, PredictsUnderBothFamilies) {
  for (const char* plan :
       {"fsdp2:ep=auto,offload=auto", "fsdp2:ep=auto,offload=auto,runtime=native", "mop"}) {
    SCOPED_TRACE(plan);
    Scenario s = make(GetParam(), "h200", 2, plan, 8192);
    s.plan = search::choose(s);
    EXPECT_TRUE(s.plan.resolved());
    const Prediction p = predict(s);
    EXPECT_GT(p.hbm_peak, 0);
    if (p.fits) {
      EXPECT_GT(*p.step_time, 0);
      EXPECT_GT(p.mfu, 0.001);
    } else {
      EXPECT_NE(p.why_not, "");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Shipped,
                         ::testing::Values("gpt-oss-20b", "gpt-oss-120b", "qwen3-30b-a3b", "qwen3-235b-a22b",
                                           "mixtral-8x7b", "olmoe-1b-7b", "deepseek-v3", "kimi-k2",
                                           "deepseek-v2-lite", "glm-4.5-air"),
                         [](const auto& test) {
                           std::string name = test.param;
                           for (char& c : name)
                             if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
                           return name;
                         });

}  // namespace
}  // namespace mop::predict::testing
