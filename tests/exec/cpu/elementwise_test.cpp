#include <cmath>

#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

Type any_real() {
  return kReals[uniform(0, 1)];
}

TEST(Elementwise, Add) {
  for (int trial = 0; trial < 30; ++trial) {
    const int64_t rows = uniform(1, 9), cols = uniform(1, 700), count = uniform(1, 2);
    const bool two = uniform(0, 1) != 0, accumulate = uniform(0, 1) != 0;
    Tensor a = Tensor::random(rows, cols, any_real(), count),
           b = Tensor::random(rows, cols, any_real(), count),
           c = Tensor::random(rows, cols, any_real(), count);
    Values want = a.values();
    if (two) want = plus(want, b.values());
    if (accumulate) want = plus(want, c.values());
    Does does;
    does.accumulate = accumulate;
    run_op(OpKind::add, does, {&a, two ? &b : nullptr}, {&c});
    expect_close(c, want, 1e-6);
  }
}

TEST(Elementwise, AddInPlace) {
  Tensor a = Tensor::random(3, 50), b = Tensor::random(3, 50);
  const Values want = plus(a.values(), b.values());
  run_op(OpKind::add, {}, {&a, &b}, {&a});
  expect_close(a, want, 1e-6);
}

// The order of the elements is what counts, not how they lie in rows.
TEST(Elementwise, CopyBetweenLayoutsAndTypes) {
  for (const Type from : {Type::bf16, Type::f32, Type::f64}) {
    for (const Type to : {Type::bf16, Type::f32, Type::f64}) {
      Tensor a = Tensor::random(6, 35, from), b(5, 21, to, 2);
      run_op(from == to ? OpKind::copy : OpKind::cast, {}, {&a}, {&b});
      for (int64_t i = 0; i < a.size(); ++i) EXPECT_EQ(b.at(i), round_to(a.at(i), to));
    }
  }
  Values large;  // whole numbers that fp32 does not hold
  for (int64_t i = 0; i < 100; ++i) large.push_back(static_cast<double>(2000000001 + i));
  Tensor ids = Tensor::of(10, 10, large, Type::i32), same(1, 100, Type::i32);
  run_op(OpKind::copy, {}, {&ids}, {&same});
  EXPECT_EQ(same.values(), large);
}

TEST(Elementwise, RefusesDifferentElementCounts) {
  Tensor a = Tensor::random(3, 4), b(3, 5);
  EXPECT_THROW(run_op(OpKind::copy, {}, {&a}, {&b}), InternalError);
  EXPECT_THROW(run_op(OpKind::copy_d2h, {}, {&a}, {&b}), InternalError);
}

TEST(Elementwise, Clear) {
  for (const Type type : {Type::bf16, Type::f32, Type::f64, Type::i32}) {
    Tensor x(7, 13, type, 3);
    run_op(OpKind::clear, {}, {}, {&x});
    EXPECT_EQ(x.values(), Values(static_cast<size_t>(x.size())));
  }
}

TEST(Elementwise, Scale) {
  for (const Type type : kReals) {
    Tensor x = Tensor::random(4, 300, type), factor = Tensor::of(1, 1, {0.3}, Type::f64);
    Values want = x.values();
    for (double& value : want) value *= 0.3;
    run_op(OpKind::scale, {}, {&x, &factor}, {&x});
    expect_close(x, want, 1e-6);
  }
}

TEST(Elementwise, SquareSum) {
  for (const Type to : {Type::f32, Type::f64}) {
    for (const bool accumulate : {false, true}) {
      Tensor x = Tensor::random(30, 70, any_real()), sum = Tensor::random(1, 1, to);
      double want = accumulate ? sum.at(0) : 0;
      want += dot(x.values(), x.values()) / 3;
      Does does;
      does.accumulate = accumulate;
      does.a = 3;
      run_op(OpKind::square_sum, does, {&x}, {&sum});
      EXPECT_NEAR(sum.at(0), want, 1e-6 * want);
    }
  }
}

TEST(Elementwise, SumReplicas) {
  for (const Type type : kReals) {
    const int64_t t = 4, heads = 3, replicas = 2, d = 5;
    Tensor x = Tensor::random(t, heads * replicas * d, type), y(t, heads * d, type);
    Values want(static_cast<size_t>(y.size()));
    for (int64_t i = 0; i < x.size(); ++i) {
      const int64_t row = i / (heads * replicas * d), head = i / (replicas * d) % heads, e = i % d;
      want[static_cast<size_t>((row * heads + head) * d + e)] += x.at(i);
    }
    Does does;
    does.a = replicas;
    does.b = d;
    run_op(OpKind::sum_replicas, does, {&x}, {&y});
    expect_close(y, want);
  }
}

// Bytes of operands of different types and layouts, end to end.
TEST(Elementwise, CopiesBytesEndToEnd) {
  Tensor a = Tensor::random(5, 7, Type::bf16), b = Tensor::random(3, 3, Type::f32),
         c = Tensor::random(2, 6, Type::bf16);  // 70 + 36 + 24 bytes
  Tensor host = Tensor::random(1, 65, Type::bf16);
  run_op(OpKind::copy_d2h, {}, {&a, &b, &c}, {&host});
  Tensor a_back(7, 5, Type::bf16), b_back(3, 3, Type::f32), c_back(1, 12, Type::bf16);
  run_op(OpKind::copy_h2d, {}, {&host}, {&a_back, &b_back, &c_back});
  EXPECT_EQ(a_back.values(), a.values());
  EXPECT_EQ(b_back.values(), b.values());
  EXPECT_EQ(c_back.values(), c.values());
}

TEST(Dispatch, RefusesWhatIsNotALocalOperation) {
  Tensor x = Tensor::random(2, 2);
  for (const OpKind kind : {OpKind::all_gather, OpKind::concatenate, OpKind::norm_host})
    EXPECT_THROW(run_op(kind, {}, {&x}, {&x}), InternalError);
}

}  // namespace
}  // namespace mop::cpu
