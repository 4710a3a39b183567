#include "exec/weights/normal.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <random>
#include <vector>

namespace mop::weights {
namespace {

// Numbers of 32 bits: both ends, both sides of each power of two and of its product with sqrt 2 (where the
// logarithm changes its exponent) and of the quarters (where the cosine is 0 or turns), and random ones.
std::vector<uint32_t> halves(int random_ones) {
  std::vector<uint32_t> result;
  const auto around = [&](double middle, int64_t distance) {
    const auto m = static_cast<int64_t>(middle);
    for (int64_t x = m - distance; x <= m + distance; ++x)
      if (x >= 0 && x < int64_t{1} << 32) result.push_back(static_cast<uint32_t>(x));
  };
  for (double power = 1; power <= 0x1p32; power *= 2) {
    around(power, 8);
    around(power / std::numbers::sqrt2, 8);
  }
  for (int quarter = 0; quarter <= 4; ++quarter) around(quarter * 0x1p30, 1000);
  std::mt19937 random(1);
  for (int i = 0; i < random_ones; ++i) result.push_back(static_cast<uint32_t>(random()));
  return result;
}

std::vector<Simd> simds() {
  std::vector<Simd> result;
  for (const Simd simd : {Simd::baseline, Simd::avx2, Simd::avx512})
    if (available(simd)) result.push_back(simd);
  return result;
}

TEST(Normal, CentresOfIntervals) {
  for (const uint32_t x : halves(100000)) ASSERT_EQ(centre(x), (x + 0.5) * 0x1p-32) << x;
}

TEST(Normal, LogarithmIsAccurate) {
  for (const uint32_t x : halves(1000000)) {
    const double u = (x + 0.5) * 0x1p-32, expected = -2 * std::log(u);
    ASSERT_NEAR(minus_two_log(u), expected, 1e-13 * expected) << x;
  }
}

TEST(Normal, CosineIsAccurate) {
  for (const uint32_t x : halves(1000000)) {
    const double v = (x + 0.5) * 0x1p-32, expected = std::cos(2 * std::numbers::pi * v);
    ASSERT_NEAR(cosine_of_turns(v), expected, 3e-11 * std::abs(expected) + 1e-15) << x;
  }
  for (int i = 0; i <= 1 << 20; ++i) {
    const double v = i * 0x1p-20;
    ASSERT_NEAR(cosine_of_turns(v), std::cos(2 * std::numbers::pi * v), 3e-11) << v;
  }
}

TEST(Normal, IsTheBoxMullerTransform) {
  const std::vector<uint32_t> x = halves(0);
  std::mt19937_64 random(2);
  for (int i = 0; i < 1000000; ++i) {
    uint64_t bits = random();
    if (i % 2 == 0) bits = uint64_t{x[random() % x.size()]} << 32 | x[random() % x.size()];
    const double u = (static_cast<double>(bits >> 32) + 0.5) * 0x1p-32;
    const double v = (static_cast<double>(bits & 0xffffffff) + 0.5) * 0x1p-32;
    const double expected = std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
    ASSERT_NEAR(normal(bits), expected, 5e-10) << bits;
  }
}

// To the last bit of the double: one number over and over, less itself, is 0.
TEST(Normal, TheSameDoublesFromEveryInstructionSet) {
  constexpr double kStd = 0.02;
  std::mt19937_64 random(3);
  for (int i = 0; i < 20000; ++i) {
    const uint64_t start = random();
    const double product = kStd * normal(mix(start));
    std::vector<float> out(37);
    for (const Simd simd : simds()) {
      normals({.start = start, .step = 0, .mean = -product, .std = kStd}, 37, out.data(), simd);
      for (const float value : out) ASSERT_EQ(value, 0) << static_cast<int>(simd) << ' ' << start;
    }
  }
}

// Every instruction set and every length gives the bits that a number has alone.
TEST(Normal, TheSameBitsFromEveryInstructionSet) {
  constexpr int64_t kMost = 100000;
  for (const Sequence& sequence :
       {Sequence{1, 0x9e3779b97f4a7c15, 0, 0.02}, {~uint64_t{0}, 5760 * 0x9e3779b97f4a7c15, 1, 0.2}}) {
    std::vector<float> alone(kMost);
    Sequence at = sequence;
    for (float& value : alone) {
      normals(at, 1, &value, Simd::baseline);
      at.start += at.step;
    }
    std::vector<int64_t> counts{1000, 4099, kMost};
    for (int64_t count = 0; count < 70; ++count) counts.push_back(count);
    for (const Simd simd : simds()) {
      for (const int64_t count : counts) {
        std::vector<float> out(static_cast<size_t>(count) + 1, -9);
        normals(sequence, count, out.data(), simd);
        for (int64_t i = 0; i < count; ++i)
          ASSERT_EQ(out[static_cast<size_t>(i)], alone[static_cast<size_t>(i)])
              << static_cast<int>(simd) << ' ' << count << ' ' << i;
        ASSERT_EQ(out.back(), -9);
      }
    }
  }
}

}  // namespace
}  // namespace mop::weights
