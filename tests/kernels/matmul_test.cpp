#include "kernels/matmul.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "tests/kernels/device_array.h"

namespace mop::kernels {
namespace {

class MatmulTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  }

  // Runs the shape on random numbers and compares with the plain formula in fp64. first: elements that A and
  // B are off the boundary of their allocations. by_rows: by its run_rows.
  void expect_right(const MatmulShape& s, int64_t first = 0, Matmul* by_rows = nullptr) {
    Matmul matmul;
    DeviceBytes workspace(Matmul::kWorkspaceBytes);
    const auto size = [&](int64_t rows, int64_t cols, int64_t ld, int64_t stride) {
      return (s.count - 1) * stride + (rows - 1) * ld + cols + first;
    };
    const int64_t a_rows = s.transpose_a ? s.k : s.m, a_cols = s.transpose_a ? s.m : s.k;
    const int64_t b_rows = s.transpose_b ? s.n : s.k, b_cols = s.transpose_b ? s.k : s.n;
    const Values a = random_values(size(a_rows, a_cols, s.lda, s.stride_a), s.in, random_),
                 b = random_values(size(b_rows, b_cols, s.ldb, s.stride_b), s.in, random_),
                 c = random_values(size(s.m, s.n, s.ldc, s.stride_c), s.out, random_),
                 bias = random_values(s.n + (s.count - 1) * s.stride_bias, s.bias_type, random_);
    const DeviceArray da(a, s.in), db(b, s.in), dc(c, s.out), dbias(bias, s.bias_type);
    if (by_rows != nullptr) {
      by_rows->run_rows(s, da.get(first), db.get(first), dc.get(first), workspace.get(), nullptr);
    } else {
      matmul.prepare(s);
      matmul.run(s, da.get(first), db.get(first), s.bias ? dbias.get() : nullptr, dc.get(first),
                 workspace.get(), nullptr);
    }
    const auto at = [&](const Values& v, int64_t i, int64_t stride, int64_t row, int64_t ld, int64_t col) {
      return v[static_cast<size_t>(first + i * stride + row * ld + col)];
    };
    const Values all = dc.values();
    Values expected, actual, untouched = c;
    for (int64_t i = 0; i < s.count; ++i) {
      for (int64_t r = 0; r < s.m; ++r) {
        for (int64_t col = 0; col < s.n; ++col) {
          double sum = s.accumulate ? at(c, i, s.stride_c, r, s.ldc, col) : 0;
          if (s.bias) sum += bias[static_cast<size_t>(i * s.stride_bias + col)];
          for (int64_t k = 0; k < s.k; ++k)
            sum +=
                (s.transpose_a ? at(a, i, s.stride_a, k, s.lda, r) : at(a, i, s.stride_a, r, s.lda, k)) *
                (s.transpose_b ? at(b, i, s.stride_b, col, s.ldb, k) : at(b, i, s.stride_b, k, s.ldb, col));
          expected.push_back(sum);
          actual.push_back(at(all, i, s.stride_c, r, s.ldc, col));
          untouched[static_cast<size_t>(first + i * s.stride_c + r * s.ldc + col)] = actual.back();
        }
      }
    }
    EXPECT_LT(relative_error(actual, expected), bound(s.out))
        << s.m << " " << s.n << " " << s.k << " " << s.transpose_a << s.transpose_b << s.accumulate << s.bias;
    EXPECT_EQ(all, untouched) << "elements beyond the matrix were written";
  }

  // A shape of whole matrices.
  static MatmulShape plain(int64_t m, int64_t n, int64_t k, bool ta, bool tb, Type in, Type out) {
    MatmulShape s;
    s.m = m, s.n = n, s.k = k;
    s.transpose_a = ta, s.transpose_b = tb;
    s.lda = ta ? m : k, s.ldb = tb ? k : n, s.ldc = n;
    s.in = in, s.out = out, s.bias_type = out;
    return s;
  }

  std::mt19937 random_{7};
};

constexpr std::pair<Type, Type> kTypes[] = {
    {Type::bf16, Type::bf16}, {Type::bf16, Type::f32}, {Type::f32, Type::f32}};

TEST_F(MatmulTest, EveryTransposeAndTypeAgreesWithFp64) {
  for (const auto& [in, out] : kTypes)
    for (const bool ta : {false, true})
      for (const bool tb : {false, true})
        for (const bool accumulate : {false, true}) {
          MatmulShape s = plain(136, 264, 320, ta, tb, in, out);
          s.accumulate = accumulate;
          expect_right(s);
        }
}

TEST_F(MatmulTest, ViewsInsideOfLargerMatrices) {
  for (const auto& [in, out] : kTypes) {
    MatmulShape s = plain(96, 128, 64, false, true, in, out);
    s.lda = 200, s.ldb = 72, s.ldc = 136;
    expect_right(s);
    s.transpose_a = true, s.transpose_b = false;
    s.ldb = 160;
    s.accumulate = true;
    expect_right(s);
  }
}

TEST_F(MatmulTest, OddSizesAndBoundaries) {
  for (const auto& [in, out] : kTypes) {
    expect_right(plain(77, 53, 101, false, true, in, out));
    expect_right(plain(1, 7, 33, true, false, in, out));
    expect_right(plain(64, 64, 64, false, false, in, out), 1);
  }
}

TEST_F(MatmulTest, BiasOfTheOutputsTypeOrAnother) {
  for (const auto& [in, out] : kTypes)
    for (const Type bias : {Type::bf16, Type::f32}) {
      MatmulShape s = plain(128, 160, 96, false, true, in, out);
      s.bias = true;
      s.bias_type = bias;
      expect_right(s);
      if (bias != out) continue;
      s.accumulate = true;
      expect_right(s);
    }
}

TEST_F(MatmulTest, SeveralProductsWithTheirOwnBiases) {
  for (const auto& [in, out] : kTypes) {
    MatmulShape s = plain(40, 48, 56, false, true, in, out);
    s.count = 3;
    s.stride_a = 40 * 56 + 8, s.stride_b = 48 * 56, s.stride_c = 40 * 48 + 16;
    expect_right(s);
    s.bias = true;
    s.stride_bias = 48;
    expect_right(s);
  }
}

// One plan serves many numbers of rows, as those of experts are.
TEST_F(MatmulTest, RowsThatVary) {
  Matmul matmul;
  std::mt19937 draw(5);
  for (const auto& [in, out] : kTypes)
    for (const bool gradient : {false, true}) {
      std::vector<int64_t> rows{1, 8, 15, 16, 17, 127, 128, 129, 255, 1000, 1024, 1025};
      for (int i = 0; i < 6; ++i) rows.push_back(1 + static_cast<int64_t>(draw() % 1200));
      for (const int64_t n : rows) {
        MatmulShape s =
            gradient ? plain(72, 136, n, true, false, in, out) : plain(n, 136, 72, false, true, in, out);
        s.accumulate = gradient;
        expect_right(s, 0, &matmul);
      }
      expect_right(
          gradient ? plain(33, 21, 301, true, false, in, out) : plain(301, 21, 33, false, false, in, out), 1,
          &matmul);
    }
  MatmulShape biased = plain(8, 8, 8, false, true, Type::bf16, Type::bf16);
  biased.bias = true;
  EXPECT_THROW(matmul.run_rows(biased, nullptr, nullptr, nullptr, nullptr, nullptr), CudaError);
}

TEST(PlannedRows, AreLessThanAQuarterMoreAndAreTheirOwn) {
  std::mt19937 draw(7);
  for (int i = 0; i < 2000; ++i) {
    const int64_t rows = 1 + static_cast<int64_t>(draw() % (1U << (1 + i % 20)));
    const int64_t planned = Matmul::planned_rows(rows);
    EXPECT_GE(planned, rows);
    EXPECT_LT(planned, std::max(rows + rows / 4 + 1, rows + 16));
    EXPECT_EQ(Matmul::planned_rows(planned), planned);
    EXPECT_LE(Matmul::planned_rows(rows), Matmul::planned_rows(rows + 1));
  }
}

TEST_F(MatmulTest, RefusesTypesThatItDoesNotMultiply) {
  Matmul matmul;
  EXPECT_THROW(matmul.prepare(plain(8, 8, 8, false, false, Type::i32, Type::f32)), CudaError);
}

}  // namespace
}  // namespace mop::kernels
