#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "exec/train/schedule.h"
#include "tests/error_of.h"

namespace mop::train {
namespace {

using ::testing::HasSubstr;

TEST(Schedule, WarmsUpThenFollowsHalfACosine) {
  const Schedule s{.decay = Decay::cosine, .peak = 8, .minimum = 2, .warmup = 4, .steps = 10};
  EXPECT_DOUBLE_EQ(s.rate(0), 2);
  EXPECT_DOUBLE_EQ(s.rate(1), 4);
  EXPECT_DOUBLE_EQ(s.rate(2), 6);
  EXPECT_DOUBLE_EQ(s.rate(3), 8);
  // cos(60 degrees) = 1 / 2 and so on.
  EXPECT_DOUBLE_EQ(s.rate(4), 5 + 3 * std::sqrt(3) / 2);
  EXPECT_DOUBLE_EQ(s.rate(5), 6.5);
  EXPECT_DOUBLE_EQ(s.rate(6), 5);
  EXPECT_DOUBLE_EQ(s.rate(7), 3.5);
  EXPECT_DOUBLE_EQ(s.rate(8), 5 - 3 * std::sqrt(3) / 2);
  EXPECT_DOUBLE_EQ(s.rate(9), 2);
  EXPECT_DOUBLE_EQ(s.rate(10), 2);
  EXPECT_DOUBLE_EQ(s.rate(1000), 2);
}

TEST(Schedule, StaysConstant) {
  const Schedule s{.decay = Decay::constant, .peak = 3, .warmup = 3, .steps = 5};
  EXPECT_DOUBLE_EQ(s.rate(0), 1);
  EXPECT_DOUBLE_EQ(s.rate(1), 2);
  for (int64_t step = 2; step < 20; ++step) EXPECT_EQ(s.rate(step), 3);
}

TEST(Schedule, Edges) {
  const Schedule none{.peak = 1, .minimum = 0.5, .warmup = 0, .steps = 1};
  EXPECT_DOUBLE_EQ(none.rate(0), 0.5);
  const Schedule only_warmup{.peak = 1, .minimum = 0.5, .warmup = 2, .steps = 2};
  EXPECT_DOUBLE_EQ(only_warmup.rate(0), 0.5);
  EXPECT_DOUBLE_EQ(only_warmup.rate(1), 1);
  EXPECT_DOUBLE_EQ(only_warmup.rate(2), 0.5);
}

TEST(Schedule, RisesThenFalls) {
  for (int64_t warmup = 0; warmup < 50; ++warmup) {
    const Schedule s{.peak = 1e-3, .minimum = 1e-5, .warmup = warmup, .steps = 97};
    s.validate();
    for (int64_t step = 1; step < warmup; ++step) EXPECT_GT(s.rate(step), s.rate(step - 1));
    for (int64_t step = warmup + 1; step < 97; ++step) EXPECT_LT(s.rate(step), s.rate(step - 1));
    EXPECT_NEAR(s.rate(96), 1e-5, 1e-18);
  }
}

TEST(Schedule, Errors) {
  const auto error = [](Schedule s) { return error_of([&] { s.validate(); }); };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(error({.peak = -1, .steps = 1}), HasSubstr("not -1"));
  EXPECT_THAT(error({.peak = nan, .steps = 1}), HasSubstr("not nan"));
  EXPECT_THAT(error({.peak = 1, .minimum = 2, .steps = 1}), HasSubstr("not at 2"));
  EXPECT_THAT(error({.peak = 1, .minimum = -1, .steps = 1}), HasSubstr("not at -1"));
  EXPECT_THAT(error({.peak = 1, .minimum = nan, .steps = 1}), HasSubstr("not at nan"));
  EXPECT_THAT(error({.peak = 1, .warmup = 2, .steps = 1}), HasSubstr("all 1 steps"));
  EXPECT_THAT(error({.peak = 1, .warmup = -1, .steps = 1}), HasSubstr("not -1"));
  EXPECT_NO_THROW((Schedule{.peak = 1, .warmup = 1, .steps = 1}.validate()));
}

}  // namespace
}  // namespace mop::train
