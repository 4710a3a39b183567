#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <numeric>

#include "tests/kernels/device_array.h"

namespace mop::kernels {
namespace {

struct Problem {
  AttentionShape shape;
  std::vector<int32_t> starts;
  Values q, k, v, d_o, sinks;  // (t, heads x width) each, without gaps
};

struct Result {
  Values o, lse, dq, dk, dv, d_sinks;  // lse (t, heads)
};

// The plain formula, in fp64.
Result reference(const Problem& p) {
  const AttentionShape& s = p.shape;
  const int64_t t = s.rows(), group = s.heads / s.kv_heads;
  const auto size = [&](int64_t heads, int64_t width) { return static_cast<size_t>(t * heads * width); };
  Result r{Values(size(s.heads, s.v_dim)),    Values(size(s.heads, 1)),
           Values(size(s.heads, s.qk_dim)),   Values(size(s.kv_heads, s.qk_dim)),
           Values(size(s.kv_heads, s.v_dim)), Values(static_cast<size_t>(s.heads))};
  for (int64_t h = 0; h < s.heads; ++h) {
    const int64_t g = h / group;
    for (int64_t i = 0; i < t; ++i) {
      const double* const q = &p.q[static_cast<size_t>((i * s.heads + h) * s.qk_dim)];
      const double* const d_o = &p.d_o[static_cast<size_t>((i * s.heads + h) * s.v_dim)];
      double* const o = &r.o[static_cast<size_t>((i * s.heads + h) * s.v_dim)];
      double* const dq = &r.dq[static_cast<size_t>((i * s.heads + h) * s.qk_dim)];
      int64_t first = p.starts[static_cast<size_t>(i)];
      if (s.window > 0) first = std::max(first, i - s.window + 1);
      const auto k_row = [&](int64_t j) { return static_cast<size_t>((j * s.kv_heads + g) * s.qk_dim); };
      const auto v_row = [&](int64_t j) { return static_cast<size_t>((j * s.kv_heads + g) * s.v_dim); };
      Values weights(static_cast<size_t>(i - first + 1));
      double sum = s.sinks ? std::exp(p.sinks[static_cast<size_t>(h)]) : 0;
      for (int64_t j = first; j <= i; ++j)
        sum += weights[static_cast<size_t>(j - first)] =
            std::exp(s.scale * std::inner_product(q, q + s.qk_dim, &p.k[k_row(j)], 0.0));
      r.lse[static_cast<size_t>(i * s.heads + h)] = std::log(sum);
      double delta = 0;
      for (int64_t j = first; j <= i; ++j)
        for (int64_t c = 0; c < s.v_dim; ++c)
          o[c] += weights[static_cast<size_t>(j - first)] / sum * p.v[v_row(j) + static_cast<size_t>(c)];
      delta = std::inner_product(o, o + s.v_dim, d_o, 0.0);
      for (int64_t j = first; j <= i; ++j) {
        const double weight = weights[static_cast<size_t>(j - first)] / sum;
        const double d_logit =
            weight * s.scale * (std::inner_product(d_o, d_o + s.v_dim, &p.v[v_row(j)], 0.0) - delta);
        for (int64_t c = 0; c < s.qk_dim; ++c) {
          dq[c] += d_logit * p.k[k_row(j) + static_cast<size_t>(c)];
          r.dk[k_row(j) + static_cast<size_t>(c)] += d_logit * q[c];
        }
        for (int64_t c = 0; c < s.v_dim; ++c) r.dv[v_row(j) + static_cast<size_t>(c)] += weight * d_o[c];
      }
      if (s.sinks)
        r.d_sinks[static_cast<size_t>(h)] -= std::exp(p.sinks[static_cast<size_t>(h)]) / sum * delta;
    }
  }
  return r;
}

// Rows `ld` apart: matrices inside of larger ones.
Values spread(const Values& from, int64_t cols, int64_t ld, double gap) {
  Values to(from.size() / static_cast<size_t>(cols) * static_cast<size_t>(ld), gap);
  for (size_t i = 0; i < from.size(); ++i)
    to[i / static_cast<size_t>(cols) * static_cast<size_t>(ld) + i % static_cast<size_t>(cols)] = from[i];
  return to;
}
Values gathered(const Values& from, int64_t cols, int64_t ld) {
  Values to;
  for (size_t row = 0; row * static_cast<size_t>(ld) < from.size(); ++row)
    to.insert(to.end(), from.begin() + static_cast<int64_t>(row) * ld,
              from.begin() + static_cast<int64_t>(row) * ld + cols);
  return to;
}
bool gaps_untouched(const Values& all, int64_t cols, int64_t ld) {
  for (size_t i = 0; i < all.size(); ++i)
    if (static_cast<int64_t>(i) % ld >= cols && all[i] != DeviceArray::kPoison) return false;
  return true;
}

// Memory full of NaN, so that whatever reads what nothing wrote shows.
struct Poisoned : DeviceBytes {
  explicit Poisoned(size_t bytes) : DeviceBytes(bytes) {
    check(cudaMemset(get(), 0xff, bytes), "test memory");
  }
};

class AttentionTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  }

  static AttentionShape shape(int64_t batch, int64_t context, int64_t heads, int64_t kv_heads, int64_t qk,
                              int64_t v) {
    AttentionShape s;
    s.batch = batch, s.context = context, s.heads = heads, s.kv_heads = kv_heads, s.qk_dim = qk, s.v_dim = v;
    s.scale = 1 / std::sqrt(static_cast<double>(qk));
    return s;
  }

  // begins: of the documents, if they are not the sequences.
  void expect_right(AttentionShape s, std::vector<int32_t> begins = {}, bool accumulate = false) {
    const int64_t t = s.rows(), gap = 16;
    s.q_ld = s.heads * s.qk_dim + gap;
    s.k_ld = s.kv_heads * s.qk_dim + s.kv_heads * s.v_dim;  // keys and values side by side
    s.v_ld = s.k_ld;
    s.o_ld = s.heads * s.v_dim + gap;
    if (begins.empty()) {
      for (int64_t b = 0; b < s.batch; ++b) begins.push_back(static_cast<int32_t>(b * s.context));
    } else {
      s.documents = static_cast<int64_t>(begins.size()) + 3;  // more than there are
    }
    Problem p;
    p.shape = s;
    p.starts.resize(static_cast<size_t>(t));
    for (size_t i = 0, document = 0; i < p.starts.size(); ++i) {
      if (document + 1 < begins.size() && static_cast<int32_t>(i) == begins[document + 1]) ++document;
      p.starts[i] = begins[document];
    }
    const auto random = [&](int64_t width) { return random_values(t * width, Type::bf16, random_); };
    p.q = random(s.heads * s.qk_dim), p.k = random(s.kv_heads * s.qk_dim), p.v = random(s.kv_heads * s.v_dim),
    p.d_o = random(s.heads * s.v_dim);
    const int64_t first_sink = s.heads, all_sinks = 3 * s.heads;  // of three ranks, this is the second
    const Values all = random_values(all_sinks, Type::bf16, random_, 2);
    p.sinks.assign(all.begin() + first_sink, all.begin() + first_sink + s.heads);
    const Result expected = reference(p);

    const Type b = Type::bf16;
    const int64_t k_width = s.kv_heads * s.qk_dim, v_width = s.kv_heads * s.v_dim,
                  q_width = s.heads * s.qk_dim, o_width = s.heads * s.v_dim;
    Values kv;
    for (int64_t row = 0; row < t; ++row) {
      kv.insert(kv.end(), p.k.begin() + row * k_width, p.k.begin() + (row + 1) * k_width);
      kv.insert(kv.end(), p.v.begin() + row * v_width, p.v.begin() + (row + 1) * v_width);
    }
    const DeviceArray q(spread(p.q, q_width, s.q_ld, 99), b), k_v(kv, b), sinks(all, b),
        d_o(spread(p.d_o, o_width, o_width + 8, 99), b), o = DeviceArray::poisoned(t * s.o_ld, b),
                                                         lse = DeviceArray::poisoned(t * s.heads, Type::f32);
    DeviceBytes starts(p.starts.size() * sizeof(int32_t));
    check(cudaMemcpy(starts.get(), p.starts.data(), starts.size(), cudaMemcpyHostToDevice), "starts");
    AttentionInputs in{q.get(),
                       k_v.get(),
                       k_v.get(k_width),
                       static_cast<const int32_t*>(starts.get()),
                       {{sinks.get(), b, 1, all_sinks, all_sinks}, first_sink}};
    Attention attention;
    attention.prepare(s);
    {
      const Poisoned workspace(attention.workspace_bytes(s));
      attention.forward(s, in, o.get(), static_cast<float*>(lse.get()), workspace.get(), nullptr);
      check(cudaDeviceSynchronize(), "forward");
    }
    EXPECT_LT(relative_error(gathered(o.values(), o_width, s.o_ld), expected.o), 5e-3);
    EXPECT_TRUE(gaps_untouched(o.values(), o_width, s.o_ld));
    Values own_lse = lse.values(), ordered;
    for (int64_t i = 0; i < t; ++i)
      for (int64_t h = 0; h < s.heads; ++h)
        ordered.push_back(own_lse[static_cast<size_t>(
            s.documents > 0 ? i * s.heads + h : (i / s.context * s.heads + h) * s.context + i % s.context)]);
    EXPECT_LT(relative_error(ordered, expected.lse), 1e-3);

    AttentionGradientShape g;
    g.forward = s;
    g.do_ld = o_width + 8;
    g.dq_ld = s.documents > 0 ? s.q_ld : q_width + 24;
    g.dk_ld = g.dv_ld = s.k_ld;
    g.accumulate = accumulate;
    const Values before = accumulate ? random_values(t * s.k_ld, b, random_, 0.2)
                                     : Values(static_cast<size_t>(t * s.k_ld), DeviceArray::kPoison);
    const Values sinks_before = accumulate ? random_values(all_sinks, Type::f32, random_)
                                           : Values(static_cast<size_t>(all_sinks), DeviceArray::kPoison);
    const DeviceArray dq = DeviceArray::poisoned(t * g.dq_ld, b), dk_dv(before, b),
                      d_sinks(sinks_before, Type::f32);
    {
      const Poisoned workspace(attention.workspace_bytes(g));
      attention.backward(
          g, in, o.get(), d_o.get(), static_cast<const float*>(lse.get()),
          {dq.get(), dk_dv.get(), dk_dv.get(k_width),
           s.sinks ? Matrix{d_sinks.get(), Type::f32, 1, all_sinks, all_sinks} : Matrix{}, accumulate},
          workspace.get(), nullptr);
      check(cudaDeviceSynchronize(), "backward");
    }
    EXPECT_LT(relative_error(gathered(dq.values(), q_width, g.dq_ld), expected.dq), 1e-2);
    EXPECT_TRUE(gaps_untouched(dq.values(), q_width, g.dq_ld));
    const auto expect_sum = [&](const Values& gradient, int64_t first, int64_t width) {
      const Values all_after = dk_dv.values();
      Values actual, sum;
      for (int64_t row = 0; row < t; ++row) {
        for (int64_t col = 0; col < width; ++col) {
          const auto i = static_cast<size_t>(row * s.k_ld + first + col);
          actual.push_back(all_after[i]);
          sum.push_back(gradient[static_cast<size_t>(row * width + col)] + (accumulate ? before[i] : 0));
        }
      }
      EXPECT_LT(relative_error(actual, sum), 1e-2);
    };
    expect_sum(expected.dk, 0, k_width);
    expect_sum(expected.dv, k_width, v_width);
    if (!s.sinks) return;
    Values d_own;
    const Values d_all = d_sinks.values();
    for (int64_t h = 0; h < all_sinks; ++h) {
      const double start = accumulate ? sinks_before[static_cast<size_t>(h)] : 0;
      if (h >= first_sink && h < first_sink + s.heads) {
        d_own.push_back(d_all[static_cast<size_t>(h)] - start);
      } else {
        EXPECT_EQ(d_all[static_cast<size_t>(h)], start) << "sinks of other ranks";
      }
    }
    EXPECT_LT(relative_error(d_own, expected.d_sinks), 2e-2);
  }

  std::mt19937 random_{13};
};

TEST_F(AttentionTest, GroupedQueries) {
  expect_right(shape(2, 192, 8, 2, 64, 64));
  expect_right(shape(1, 256, 4, 4, 128, 128));
  expect_right(shape(1, 200, 6, 1, 128, 128));
}

TEST_F(AttentionTest, KeysWiderThanValues) {
  expect_right(shape(2, 160, 4, 4, 192, 128));
}

TEST_F(AttentionTest, Windows) {
  AttentionShape s = shape(2, 320, 4, 2, 64, 64);
  for (const int64_t window : {2, 48, 128, 319, 320, 1000}) {
    s.window = window;
    expect_right(s);
  }
}

TEST_F(AttentionTest, Sinks) {
  AttentionShape s = shape(2, 256, 8, 2, 64, 64);
  s.sinks = true;
  expect_right(s);
  s.window = 100;
  expect_right(s, {}, true);
}

TEST_F(AttentionTest, AddsToGradientsOfKeysAndValues) {
  expect_right(shape(1, 256, 4, 2, 128, 128), {}, true);
}

TEST_F(AttentionTest, SeveralDocuments) {
  AttentionShape s = shape(2, 256, 8, 2, 64, 64);
  expect_right(s, {0, 1, 100, 200, 256, 300, 301, 511});
  s.window = 40;
  expect_right(s, {0, 130, 256}, true);
  expect_right(shape(1, 320, 4, 1, 128, 128), {0, 64, 65});
  expect_right(shape(1, 192, 4, 4, 192, 128), {0, 77});
  expect_right(shape(1, 192, 4, 4, 192, 128), {0, 77}, true);
}

TEST_F(AttentionTest, SeveralDocumentsWithSinks) {
  AttentionShape s = shape(2, 256, 8, 2, 64, 64);
  s.sinks = true;
  s.window = 128;
  expect_right(s, {0, 30, 256, 400}, true);
}

TEST_F(AttentionTest, SaysWhatIsNotSupported) {
  AttentionShape s = shape(1, 128, 2, 2, 60, 60);
  s.q_ld = s.k_ld = s.v_ld = s.o_ld = 120;
  Attention attention;
  EXPECT_THROW(attention.prepare(s), CudaError);
  AttentionGradientShape g{shape(1, 128, 2, 2, 64, 64), 128, 136, 128, 128, false};
  g.forward.q_ld = g.forward.k_ld = g.forward.v_ld = g.forward.o_ld = 128;
  g.forward.documents = 4;
  EXPECT_THROW(attention.prepare(g), CudaError) << "dq unlike q";
}

}  // namespace
}  // namespace mop::kernels
