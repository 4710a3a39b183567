#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

constexpr double kEps = 1e-5;

Values reference(const Values& x, const Values& w) {
  const size_t d = w.size();
  Values y = x;
  for (size_t at = 0; at < x.size(); at += d) {
    double squares = 0;
    for (size_t i = 0; i < d; ++i) squares += x[at + i] * x[at + i];
    for (size_t i = 0; i < d; ++i) y[at + i] *= w[i] / std::sqrt(squares / static_cast<double>(d) + kEps);
  }
  return y;
}

TEST(RmsNorm, NormalisesGroupsOfColumns) {
  for (const Type type : kReals) {
    for (const int64_t groups : {1, 3}) {
      const int64_t rows = 7, d = 19;
      Tensor x = Tensor::random(rows, groups * d, type), w = Tensor::random(1, d, type),
             y(rows, groups * d, type);
      run_op(OpKind::rms_norm, {}, {&x, &w}, {&y});
      expect_close(y, reference(x.values(), w.values()));
    }
  }
}

TEST(RmsNorm, AddsTheResidualAndNormalisesTheSumAsItIsStored) {
  for (const Type type : kReals) {
    Tensor x = Tensor::random(5, 33, type), w = Tensor::random(1, 33, type),
           residual = Tensor::random(5, 33, Type::bf16), y(5, 33), sum(5, 33, type);
    run_op(OpKind::rms_norm, {}, {&x, &w, &residual}, {&y, &sum});
    expect_close(sum, plus(x.values(), residual.values()));
    expect_close(y, reference(sum.values(), w.values()));
    run_op(OpKind::rms_norm, {}, {&x, &w, &residual}, {&y});  // without keeping the sum
    expect_close(y, reference(plus(x.values(), residual.values()), w.values()));
  }
}

TEST(RmsNorm, BackwardIsTheDerivative) {
  for (int trial = 0; trial < 12; ++trial) {
    const int64_t rows = uniform(1, 6), d = uniform(1, 20), groups = uniform(1, 3), cols = groups * d;
    const bool with_sum = trial % 2 != 0, accumulate = trial % 3 == 0;
    const Type type = kReals[trial % 4 == 3];
    Tensor dy = Tensor::random(rows, cols, type), x = Tensor::random(rows, cols, type),
           w = Tensor::random(1, d, type), d_sum = Tensor::random(rows, cols, type), dx(rows, cols, type),
           dw = Tensor::random(1, d);
    const Values before = dw.values();
    Does does;
    does.accumulate = accumulate;
    run_op(OpKind::rms_norm_bwd, does, {&dy, &x, &w, with_sum ? &d_sum : nullptr}, {&dx, &dw});
    Values want_dx = numeric_gradient(
        [&](const Values& moved) { return dot(reference(moved, w.values()), dy.values()); }, x.values());
    if (with_sum) want_dx = plus(want_dx, d_sum.values());
    Values want_dw = numeric_gradient(
        [&](const Values& moved) { return dot(reference(x.values(), moved), dy.values()); }, w.values());
    if (accumulate) want_dw = plus(want_dw, before);
    expect_close(dx, want_dx);
    expect_close(dw, want_dw);
  }
}

TEST(RmsNorm, RefusesAWeightThatDoesNotDivideTheRow) {
  Tensor x(2, 7), w(1, 3), y(2, 7);
  EXPECT_THROW(run_op(OpKind::rms_norm, {}, {&x, &w}, {&y}), InternalError);
}

}  // namespace
}  // namespace mop::cpu
