#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

// op(a)(m, k) op(b)(k, n) of matrix i of each.
Values product(const Values& a, bool transpose_a, const Values& b, bool transpose_b, int64_t m, int64_t n,
               int64_t k, int64_t i = 0) {
  Values c(static_cast<size_t>(m * n));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t col = 0; col < n; ++col)
      for (int64_t j = 0; j < k; ++j)
        c[static_cast<size_t>(r * n + col)] +=
            a[static_cast<size_t>(i * m * k + (transpose_a ? j * m + r : r * k + j))] *
            b[static_cast<size_t>(i * n * k + (transpose_b ? col * k + j : j * n + col))];
  return c;
}

TEST(Gemm, AgreesWithSumsInAnyLayout) {
  for (int trial = 0; trial < 60; ++trial) {
    const int64_t m = uniform(1, 40), n = uniform(1, 40), k = uniform(1, 40), count = uniform(1, 3);
    const bool ta = uniform(0, 1) != 0, tb = uniform(0, 1) != 0, biased = uniform(0, 1) != 0,
               accumulate = uniform(0, 1) != 0;
    const auto type = [] { return kReals[uniform(0, 1)]; };
    Tensor a = Tensor::random(ta ? k : m, ta ? m : k, type(), count);
    Tensor b = Tensor::random(tb ? n : k, tb ? k : n, type(), count);
    Tensor bias = biased ? Tensor::random(1, n, type()) : Tensor();
    Tensor c = Tensor::random(m, n, type(), count);
    const Values before = c.values();
    Does does;
    does.transpose_a = ta;
    does.transpose_b = tb;
    does.accumulate = accumulate;
    run_op(OpKind::gemm, does, {&a, &b, biased ? &bias : nullptr}, {&c});
    Values want;
    for (int64_t i = 0; i < count; ++i) {
      const Values one = product(a.values(), ta, b.values(), tb, m, n, k, i);
      want.insert(want.end(), one.begin(), one.end());
    }
    for (size_t i = 0; i < want.size(); ++i) {
      if (biased) want[i] += bias.at(static_cast<int64_t>(i) % n);
      if (accumulate) want[i] += before[i];
    }
    expect_close(c, want);
  }
}

// More than one tile in every direction.
TEST(Gemm, CutsLargeProductsIntoTiles) {
  const int64_t m = 300, n = 270, k = 1030;
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      Tensor a = Tensor::random(ta ? k : m, ta ? m : k, ta ? Type::bf16 : Type::f32);
      Tensor b = Tensor::random(tb ? n : k, tb ? k : n, tb ? Type::bf16 : Type::f32);
      Tensor bias = Tensor::random(1, n), c(m, n);
      Does does;
      does.transpose_a = ta;
      does.transpose_b = tb;
      run_op(OpKind::gemm, does, {&a, &b, ta == tb ? &bias : nullptr}, {&c});
      Values want = product(a.values(), ta, b.values(), tb, m, n, k);
      for (size_t i = 0; ta == tb && i < want.size(); ++i) want[i] += bias.at(static_cast<int64_t>(i) % n);
      expect_close(c, want);
    }
  }
}

TEST(Gemm, RefusesMatricesThatDoNotFit) {
  Tensor a(3, 4), b(5, 6), c(3, 6);
  EXPECT_THROW(run_op(OpKind::gemm, {}, {&a, &b}, {&c}), InternalError);
  EXPECT_THROW(run_op(OpKind::gemm, {}, {&a}, {&c}), InternalError);
}

TEST(ColumnSum, AddsUpRows) {
  for (const Type type : kReals) {
    for (const bool accumulate : {false, true}) {
      const int64_t rows = uniform(1, 50), cols = uniform(500, 1100);
      Tensor x = Tensor::random(rows, cols, type), sum = Tensor::random(1, cols, type);
      Values want = accumulate ? sum.values() : Values(static_cast<size_t>(cols));
      for (int64_t i = 0; i < x.size(); ++i) want[static_cast<size_t>(i % cols)] += x.at(i);
      Does does;
      does.accumulate = accumulate;
      run_op(OpKind::column_sum, does, {&x}, {&sum});
      expect_close(sum, want);
    }
  }
}

// Ties and signs: what is stored as bf16 is the nearest, the even one of two.
TEST(Rounding, IsToNearestEven) {
  Values values{1 + 1.0 / 256, 1 + 3.0 / 256, -1 - 1.0 / 256, 1 + 1.0 / 256 + 1e-6, 0, 3.3e38, 1e-30};
  for (const double value : normal(1000, 100)) values.push_back(value);
  const auto n = std::ssize(values);
  Tensor from = Tensor::of(1, n, values), to(1, n, Type::bf16);
  run_op(OpKind::cast, {}, {&from}, {&to});
  for (int64_t i = 0; i < n; ++i) EXPECT_EQ(to.at(i), round_to(from.at(i), Type::bf16)) << from.at(i);
}

}  // namespace
}  // namespace mop::cpu
