#include "exec/weights/convert.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "exec/weights/safetensors.h"

namespace mop::weights {
namespace {

float read(Type type, const void* element) {
  float value = 0;
  to_float(type, static_cast<const std::byte*>(element), 1, 1, &value, 1);
  return value;
}

uint16_t bf16(float value) {
  uint16_t bits = 0;
  from_float(Type::bf16, &value, 1, reinterpret_cast<std::byte*>(&bits));
  return bits;
}

TEST(Convert, EveryBf16IsTheUpperHalfOfAFloat) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const auto expected = std::bit_cast<float>(bits << 16);
    const float value = read(Type::bf16, &half);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value) && std::isnan(read(Type::bf16, std::vector{bf16(value)}.data())));
    } else {
      ASSERT_EQ(std::bit_cast<uint32_t>(value), bits << 16);
      ASSERT_EQ(bf16(value), half);
    }
  }
}

TEST(Convert, EveryHalfHasItsValue) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const int exponent = (half >> 10) & 31;
    const double mantissa = half & 1023;
    double expected = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) expected = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::nan("");
    if (half & 0x8000) expected = -expected;
    const float value = read(Type::f16, &half);
    if (std::isnan(expected))
      ASSERT_TRUE(std::isnan(value));
    else
      ASSERT_EQ(value, expected);
  }
}

// The nearest of the two neighbours, in double precision; of two equally near ones the even.
TEST(Convert, ToBf16RoundsToNearestEven) {
  std::mt19937 random(2);
  for (int i = 0; i < 200000; ++i) {
    uint32_t bits = random() & 0x7fffffffu;
    if (i % 4 == 0) bits = (bits & 0xffff0000u) | 0x8000u;  // a tie
    if (bits >= 0x7f7f0000u) continue;                      // no larger finite neighbour
    const auto value = std::bit_cast<float>(bits);
    const auto below = std::bit_cast<float>(bits & 0xffff0000u);
    const auto above = std::bit_cast<float>((bits & 0xffff0000u) + 0x10000u);
    const double down = double{value} - below, up = double{above} - value;
    const bool even_below = ((bits >> 16) & 1u) == 0;
    const auto expected =
        static_cast<uint16_t>((bits >> 16) + (down < up || (down == up && even_below) ? 0 : 1));
    ASSERT_EQ(bf16(value), expected) << value;
    ASSERT_EQ(bf16(-value), expected | 0x8000) << value;
  }
  EXPECT_EQ(bf16(std::numeric_limits<float>::infinity()), 0x7f80);
  EXPECT_EQ(bf16(std::numeric_limits<float>::max()), 0x7f80);
}

// Also one whose upper half alone would be an infinity, and in the vectors of a long run.
TEST(Convert, NanStaysNan) {
  std::vector<float> values;
  for (const uint32_t sign : {0u, 0x80000000u})
    for (uint32_t mantissa = 1; mantissa < 0x800000; mantissa = mantissa * 3 / 2 + 1)
      values.push_back(std::bit_cast<float>(sign | 0x7f800000u | mantissa));
  const auto count = static_cast<int64_t>(values.size());
  for (const Type type : {Type::f16, Type::bf16, Type::f32, Type::f64}) {
    std::vector<std::byte> bytes(values.size() * static_cast<size_t>(size_of(type)));
    from_float(type, values.data(), count, bytes.data());
    std::vector<float> back(values.size());
    to_float(type, bytes.data(), 1, count, back.data(), 1);
    for (const float value : back) ASSERT_TRUE(std::isnan(value)) << name(type);
  }
}

TEST(Convert, ALongRunIsItsElements) {
  std::mt19937 random(3);
  std::vector<float> values(1003);
  for (float& value : values) {
    do value = std::bit_cast<float>(static_cast<uint32_t>(random()));
    while (std::isnan(value));
  }
  const auto count = static_cast<int64_t>(values.size());
  for (const Type type : {Type::f16, Type::bf16, Type::f32, Type::f64}) {
    const auto size = static_cast<size_t>(size_of(type));
    std::vector<std::byte> bytes(1 + values.size() * size), element(size);
    from_float(type, values.data(), count, bytes.data() + 1);
    std::vector<float> back(values.size());
    to_float(type, bytes.data() + 1, 1, count, back.data(), 1);
    for (size_t i = 0; i < values.size(); ++i) {
      from_float(type, &values[i], 1, element.data());
      ASSERT_EQ(std::memcmp(element.data(), bytes.data() + 1 + i * size, size), 0) << name(type) << values[i];
      ASSERT_EQ(back[i], read(type, element.data()));
    }
  }
}

// A tensor whose rows are a parameter's columns, larger than the tiles it is read by, and of it every other
// column (gpt-oss: gate and up interleaved).
TEST(Convert, ABlockOfATransposedTensor) {
  constexpr int64_t kRows = 200, kCols = 150;  // of the parameter
  std::vector<float> data(2 * kRows * kCols);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  const Tensor tensor{"F32",
                      {kCols, 2 * kRows},
                      reinterpret_cast<const std::byte*>(data.data()),
                      static_cast<int64_t>(data.size() * sizeof(float))};
  const model::Stored stored{
      .name = "x", .shape = tensor.shape, .offset = 1, .row_stride = 2, .col_stride = 2 * kRows};
  for (const auto& [row, col, rows, cols] : {std::array<int64_t, 4>{0, 0, kRows, kCols},
                                             {3, 5, 64, 64},
                                             {70, 1, 130, 129},
                                             {199, 149, 1, 1},
                                             {10, 20, 65, 1},
                                             {4, 4, 0, 3}}) {
    const int64_t ld = cols + 2;
    std::vector<float> out(static_cast<size_t>(rows * ld), -9);
    read_block(tensor, stored, row, col, rows, cols, out.data(), ld);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < ld; ++c)
        ASSERT_EQ(out[static_cast<size_t>(r * ld + c)],
                  c < cols ? data[static_cast<size_t>(1 + 2 * (row + r) + 2 * kRows * (col + c))] : -9);
  }
}

TEST(Convert, StridesAndUnalignedElements) {
  std::vector<std::byte> bytes(1 + 8 * 12);
  for (int i = 0; i < 12; ++i) {
    const double value = i / 4.0;
    std::memcpy(bytes.data() + 1 + 8 * i, &value, 8);
  }
  std::vector<float> out(8, -1);
  to_float(Type::f64, bytes.data() + 1, 3, 4, out.data(), 2);
  EXPECT_EQ(out, (std::vector<float>{0, -1, 0.75, -1, 1.5, -1, 2.25, -1}));
}

TEST(Convert, SizesAndSpellings) {
  for (const auto& [type, size] :
       {std::pair{Type::f16, 2}, {Type::bf16, 2}, {Type::f32, 4}, {Type::f64, 8}}) {
    EXPECT_EQ(size_of(type), size);
    EXPECT_EQ(type_of(name(type)), type);
  }
  EXPECT_EQ(type_of("U8"), std::nullopt);
}

}  // namespace
}  // namespace mop::weights
