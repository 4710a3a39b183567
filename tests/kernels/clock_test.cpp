#include "kernels/clock.h"

#include <gtest/gtest.h>

#include "kernels/elementwise.h"
#include "tests/kernels/device_array.h"

namespace mop::kernels {
namespace {

TEST(Clock, MeanOfThoseThatWereReadTwice) {
  ClockReadings before, after;
  EXPECT_EQ(mean_clock(before, after), 0);
  before[3] = {1000, 500}, after[3] = {3000, 1500};
  before[5] = {0, 500}, after[5] = {1000, 1500};
  before[7] = {1, 1};
  EXPECT_DOUBLE_EQ(mean_clock(before, after), 1.5e9);
}

TEST(Clock, IsThatOfTheGpu) {
  if (const std::string reason = no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  const DeviceBytes readings(2 * sizeof(ClockReadings)), work(1 << 28);
  check(cudaMemset(readings.get(), 0, readings.size()), "zeros");
  auto* const at = static_cast<ClockReadings*>(readings.get());
  const Matrix matrix{work.get(), Type::f32, 1 << 13, 1 << 13, 1 << 13};
  read_clock(at, nullptr);
  for (int i = 0; i < 20; ++i) clear({matrix}, nullptr);
  read_clock(at + 1, nullptr);
  std::array<ClockReadings, 2> read;
  check(cudaMemcpy(read.data(), at, readings.size(), cudaMemcpyDeviceToHost), "readings");
  int kilohertz = 0;
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0), "the largest clock");
  const double clock = mean_clock(read[0], read[1]), largest = 1e3 * kilohertz;
  EXPECT_GT(clock, 0.3 * largest);
  EXPECT_LT(clock, 1.02 * largest);
}

}  // namespace
}  // namespace mop::kernels
