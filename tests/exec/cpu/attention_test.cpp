#include <algorithm>

#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

struct Problem {
  int64_t tokens, heads, kv_heads, qk_dim, v_dim, window;
  bool sinks;
  double scale;
  Values starts;
};

size_t at(int64_t row, int64_t head, int64_t heads, int64_t dim, int64_t i) {
  return static_cast<size_t>((row * heads + head) * dim + i);
}

struct Result {
  Values o, lse;
};
struct Gradients {
  Values dq, dk, dv, d_sinks;
};

// Probabilities of query i and head h over keys 0 .. i, and the logarithm of their sum; the plain formula.
Values probabilities(const Problem& p, const Values& q, const Values& k, const Values& sinks, int64_t i,
                     int64_t h, double& lse) {
  const int64_t g = h / (p.heads / p.kv_heads);
  Values weight(static_cast<size_t>(p.tokens));
  double sum = p.sinks ? std::exp(sinks[static_cast<size_t>(h)]) : 0;
  for (int64_t j = 0; j <= i; ++j) {
    if (static_cast<double>(j) < p.starts[static_cast<size_t>(i)]) continue;
    if (p.window > 0 && i - j >= p.window) continue;
    double logit = 0;
    for (int64_t c = 0; c < p.qk_dim; ++c)
      logit += q[at(i, h, p.heads, p.qk_dim, c)] * k[at(j, g, p.kv_heads, p.qk_dim, c)];
    sum += weight[static_cast<size_t>(j)] = std::exp(logit * p.scale);
  }
  lse = std::log(sum);
  for (double& w : weight) w /= sum;
  return weight;
}

Result forward(const Problem& p, const Values& q, const Values& k, const Values& v, const Values& sinks) {
  Result result{Values(static_cast<size_t>(p.tokens * p.heads * p.v_dim)),
                Values(static_cast<size_t>(p.tokens * p.heads))};
  for (int64_t i = 0; i < p.tokens; ++i) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const Values w = probabilities(p, q, k, sinks, i, h, result.lse[at(i, h, p.heads, 1, 0)]);
      for (int64_t j = 0; j <= i; ++j)
        for (int64_t c = 0; c < p.v_dim; ++c)
          result.o[at(i, h, p.heads, p.v_dim, c)] +=
              w[static_cast<size_t>(j)] * v[at(j, h / (p.heads / p.kv_heads), p.kv_heads, p.v_dim, c)];
    }
  }
  return result;
}

// From the stored o, which may be rounded.
Gradients backward(const Problem& p, const Values& q, const Values& k, const Values& v, const Values& sinks,
                   const Values& o, const Values& d_o) {
  Gradients g{Values(q.size()), Values(k.size()), Values(v.size()), Values(sinks.size())};
  for (int64_t i = 0; i < p.tokens; ++i) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t kv = h / (p.heads / p.kv_heads);
      double lse = 0, mean = 0;
      const Values w = probabilities(p, q, k, sinks, i, h, lse);
      Values dp(w.size());
      for (int64_t j = 0; j <= i; ++j) {
        const auto js = static_cast<size_t>(j);
        for (int64_t c = 0; c < p.v_dim; ++c) {
          dp[js] += d_o[at(i, h, p.heads, p.v_dim, c)] * v[at(j, kv, p.kv_heads, p.v_dim, c)];
          g.dv[at(j, kv, p.kv_heads, p.v_dim, c)] += w[js] * d_o[at(i, h, p.heads, p.v_dim, c)];
        }
      }
      for (int64_t c = 0; c < p.v_dim; ++c)
        mean += o[at(i, h, p.heads, p.v_dim, c)] * d_o[at(i, h, p.heads, p.v_dim, c)];
      if (p.sinks) g.d_sinks[static_cast<size_t>(h)] -= std::exp(sinks[static_cast<size_t>(h)] - lse) * mean;
      for (int64_t j = 0; j <= i; ++j) {
        const double ds = w[static_cast<size_t>(j)] * (dp[static_cast<size_t>(j)] - mean) * p.scale;
        for (int64_t c = 0; c < p.qk_dim; ++c) {
          g.dq[at(i, h, p.heads, p.qk_dim, c)] += ds * k[at(j, kv, p.kv_heads, p.qk_dim, c)];
          g.dk[at(j, kv, p.kv_heads, p.qk_dim, c)] += ds * q[at(i, h, p.heads, p.qk_dim, c)];
        }
      }
    }
  }
  return g;
}

// Documents of random lengths, one after the other.
Values any_starts(int64_t tokens) {
  Values starts;
  int64_t start = 0, left = 0;
  for (int64_t i = 0; i < tokens; ++i, --left) {
    if (left == 0) start = i, left = uniform(1, tokens);
    starts.push_back(static_cast<double>(start));
  }
  return starts;
}

Problem any_problem(int64_t tokens) {
  Problem p;
  p.tokens = tokens;
  p.kv_heads = uniform(1, 2);
  p.heads = p.kv_heads * uniform(1, 3);
  p.qk_dim = uniform(1, 9);
  p.v_dim = uniform(1, 9);
  p.window = uniform(0, 1) != 0 ? uniform(1, tokens) : 0;
  p.sinks = uniform(0, 1) != 0;
  p.scale = 0.4;
  p.starts = any_starts(tokens);
  return p;
}

Does windowed_by(const Problem& p) {
  Does does;
  does.b = p.window;
  return does;
}

Setting setting_of(const Problem& p) {
  Setting setting;
  setting.rope.attention_scale = p.scale;
  setting.index = 1;  // of 3 ranks with as many heads each
  setting.size = 3;
  setting.shape =
      program::AttentionShape{1, p.tokens, p.tokens, p.heads, p.kv_heads, p.qk_dim, p.v_dim, 1, p.window}
          .shape();
  return setting;
}

// The sinks of three ranks, of which the second is meant.
Values middle(const Values& sinks) {
  const auto n = std::ssize(sinks) / 3;
  return {sinks.begin() + n, sinks.begin() + 2 * n};
}

void check(const Problem& p, Type type) {
  SCOPED_TRACE(testing::Message() << p.tokens << " tokens, " << p.heads << "/" << p.kv_heads << " heads of "
                                  << p.qk_dim << "/" << p.v_dim << ", window " << p.window
                                  << (p.sinks ? ", sinks" : ""));
  Tensor q = Tensor::random(p.tokens, p.heads * p.qk_dim, type),
         k = Tensor::random(p.tokens, p.kv_heads * p.qk_dim, type),
         v = Tensor::random(p.tokens, p.kv_heads * p.v_dim, type),
         sinks = Tensor::random(1, 3 * p.heads, type),
         d_o = Tensor::random(p.tokens, p.heads * p.v_dim, type),
         starts = Tensor::contiguous(1, p.tokens, p.starts, Type::i32), o(p.tokens, p.heads * p.v_dim, type),
         lse(p.tokens, p.heads), dq(p.tokens, p.heads * p.qk_dim, type),
         dk = Tensor::random(p.tokens, p.kv_heads * p.qk_dim),
         dv = Tensor::random(p.tokens, p.kv_heads * p.v_dim), d_sinks = Tensor::random(1, 3 * p.heads);
  const Setting setting = setting_of(p);
  const Values own_sinks = middle(sinks.values());
  run_op(OpKind::attention_fwd, windowed_by(p), {&q, &k, &v, &starts, p.sinks ? &sinks : nullptr}, {&o, &lse},
         setting);
  const Result want = forward(p, q.values(), k.values(), v.values(), own_sinks);
  expect_close(o, want.o);
  expect_close(lse, want.lse);

  for (const bool accumulate : {false, true}) {
    Does does;
    does.accumulate = accumulate;
    does.a = accumulate ? 1 : 0;
    does.b = p.window;
    const Values sinks_before = d_sinks.values();
    const Values dk_before = dk.values(), dv_before = dv.values();
    run_op(OpKind::attention_bwd, does, {&q, &k, &v, &o, &d_o, &lse, &starts, p.sinks ? &sinks : nullptr},
           {&dq, &dk, &dv, p.sinks ? &d_sinks : nullptr}, setting);
    Gradients g = backward(p, q.values(), k.values(), v.values(), own_sinks, o.values(), d_o.values());
    if (accumulate) g.dk = plus(g.dk, dk_before), g.dv = plus(g.dv, dv_before);
    expect_close(dq, g.dq);
    expect_close(dk, g.dk);
    expect_close(dv, g.dv);
    if (p.sinks) {
      Values all(static_cast<size_t>(3 * p.heads));
      std::copy(g.d_sinks.begin(), g.d_sinks.end(), all.begin() + p.heads);
      if (accumulate) all = plus(all, sinks_before);
      expect_close(d_sinks, all);
    }
  }
}

TEST(Attention, AgreesWithThePlainFormula) {
  for (int trial = 0; trial < 40; ++trial) check(any_problem(uniform(1, 40)), kReals[trial % 2]);
}

// More than one tile of queries (64) and of keys (128), also with ends inside of them.
TEST(Attention, CrossesTiles) {
  for (const int64_t tokens : {64, 65, 128, 129, 300}) check(any_problem(tokens), Type::f32);
  Problem windowed = any_problem(400);
  windowed.window = 150;
  windowed.starts.assign(400, 0);
  windowed.sinks = true;
  check(windowed, Type::f32);
}

// The reference's own gradients.
TEST(Attention, ReferenceBackwardIsTheDerivative) {
  for (int trial = 0; trial < 8; ++trial) {
    const Problem p = any_problem(6);
    const Values q = normal(p.tokens * p.heads * p.qk_dim), k = normal(p.tokens * p.kv_heads * p.qk_dim),
                 v = normal(p.tokens * p.kv_heads * p.v_dim), sinks = normal(p.heads),
                 d_o = normal(p.tokens * p.heads * p.v_dim);
    const Gradients g = backward(p, q, k, v, sinks, forward(p, q, k, v, sinks).o, d_o);
    const auto near = [](const Values& a, const Values& b) {
      for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-7);
    };
    near(g.dq, numeric_gradient([&](const Values& x) { return dot(forward(p, x, k, v, sinks).o, d_o); }, q));
    near(g.dk, numeric_gradient([&](const Values& x) { return dot(forward(p, q, x, v, sinks).o, d_o); }, k));
    near(g.dv, numeric_gradient([&](const Values& x) { return dot(forward(p, q, k, x, sinks).o, d_o); }, v));
    near(g.d_sinks,
         numeric_gradient([&](const Values& x) { return dot(forward(p, q, k, v, x).o, d_o); }, sinks));
  }
}

// Logits of several hundred, whose exponentials no float holds.
TEST(Attention, IsStableForLargeLogits) {
  Problem p = any_problem(200);
  p.qk_dim = 8;
  p.window = 0;
  p.sinks = true;
  p.scale = 1;
  Tensor q = Tensor::random(200, p.heads * 8, Type::f32, 1, 5),
         k = Tensor::random(200, p.kv_heads * 8, Type::f32, 1, 5),
         v = Tensor::random(200, p.kv_heads * p.v_dim),
         sinks = Tensor::random(1, 3 * p.heads, Type::f32, 1, 100),
         starts = Tensor::contiguous(1, 200, p.starts, Type::i32), o(200, p.heads * p.v_dim),
         lse(200, p.heads);
  run_op(OpKind::attention_fwd, windowed_by(p), {&q, &k, &v, &starts, &sinks}, {&o, &lse}, setting_of(p));
  const Result want = forward(p, q.values(), k.values(), v.values(), middle(sinks.values()));
  ASSERT_TRUE(std::all_of(want.lse.begin(), want.lse.end(), [](double x) { return std::isfinite(x); }));
  EXPECT_GT(*std::max_element(want.lse.begin(), want.lse.end()), 150);
  expect_close(lse, want.lse, 1e-6);
  expect_close(o, want.o, 1e-3);
}

TEST(Attention, RefusesATokenThatDoesNotSeeItself) {
  Problem p = any_problem(4);
  p.starts = {0, 0, 3, 0};
  Tensor q(4, p.heads * p.qk_dim), k(4, p.kv_heads * p.qk_dim), v(4, p.kv_heads * p.v_dim),
      starts = Tensor::contiguous(1, 4, p.starts, Type::i32), o(4, p.heads * p.v_dim), lse(4, p.heads);
  EXPECT_THROW(
      run_op(OpKind::attention_fwd, windowed_by(p), {&q, &k, &v, &starts}, {&o, &lse}, setting_of(p)),
      InternalError);
}

}  // namespace
}  // namespace mop::cpu
