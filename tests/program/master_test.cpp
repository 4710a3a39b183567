#include "sim/program/master.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

namespace mop::program {
namespace {

float as_float(uint32_t bits) {
  return std::bit_cast<float>(bits);
}

TEST(Master, TheTwoPartsAreTheWholeAndTheHighOneIsTheNearestBf16) {
  std::mt19937 random(11);
  std::vector<uint32_t> all{0,          0x80000000, 1,          0x8000,     0x7fff,     0x8001,
                            0x3f808000, 0x3f818000, 0x3f7fffff, 0x7f7fffff, 0x7f800000, 0xff800000};
  for (int i = 0; i < 200000; ++i) all.push_back(static_cast<uint32_t>(random()));
  for (int i = 0; i < 2000; ++i) all.push_back(static_cast<uint32_t>(random()) << 16 | 0x8000);  // halfway
  for (const uint32_t given : all) {
    const uint32_t master = settled(given);
    EXPECT_LE(given - master, 1U);
    if (is_nan(given)) {
      EXPECT_TRUE(std::isnan(as_float(whole(high_part(given), low_part(given)))));
      continue;
    }
    ASSERT_EQ(whole(high_part(master), low_part(master)), master) << std::hex << given;
    if (!std::isfinite(as_float(master))) continue;
    // No bf16 number is nearer.
    const auto distance = [&](uint32_t high) {
      return std::abs(static_cast<double>(as_float(high << 16)) - as_float(master));
    };
    const uint32_t high = high_part(master);
    if ((high & 0x7fff) == 0x7f80) continue;  // beyond the largest
    const bool zero = (high & 0x7fff) == 0, largest = (high & 0x7fff) == 0x7f7f;
    EXPECT_TRUE(zero || distance(high) < distance(high - 1)) << std::hex << given;
    EXPECT_TRUE(largest || distance(high) < distance(high + 1)) << std::hex << given;
  }
}

}  // namespace
}  // namespace mop::program
