// Every kind of operation of the programs that our executor runs, but for collectives (those: gpus_test.cpp),
// with random shapes, layouts, types and options.
#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/attention.h"
#include "tests/exec/cuda/sample.h"

namespace mop::cuda::testing {
namespace {

using program::columns;

Does adding(bool accumulate) {
  return {.accumulate = accumulate};
}

// Values of an (n) vector of squares, as second moments are.
Values squares(Sample& s, int64_t n) {
  Values values = s.normal_values(n, 0.3);
  for (double& v : values) v = v * v + 1e-4;
  return values;
}

// ---- products and sums

void gemm(Sample& s) {
  const Type in = s.real(), out = s.real_or_f32();
  const Does does{.accumulate = s.coin(), .transpose_a = s.coin(), .transpose_b = s.coin()};
  const int64_t m = s.size(1, 260), n = s.size(1, 200), k = s.size(1, 300);
  const Operand a = does.transpose_a ? s.normal(in, k, m) : s.normal(in, m, k),
                b = does.transpose_b ? s.normal(in, n, k) : s.normal(in, k, n),
                bias = s.coin() && !does.accumulate ? s.normal(in, 1, n) : Operand{},
                c = s.target(does.accumulate, out, m, n);
  if (out == Type::bf16) s.expect(c, rounded(1));
  s.op(OpKind::gemm, does, {a, b, bias}, {c});
}

void column_sum(Sample& s) {
  const bool accumulate = s.coin();
  const int64_t n = s.size(1, 300);
  const Operand x = s.normal(s.real(), s.number(1, 900), n),
                sum = s.target(accumulate, s.real_or_f32(), 1, n);
  s.op(OpKind::column_sum, adding(accumulate), {x}, {sum});
}

// ---- norms and rotations

void rms_norm(Sample& s) {
  const int64_t t = s.number(1, 200), d = s.size(3, 400), groups = s.one_of<int64_t>({1, 1, 3});
  const Operand x = s.normal(s.real(), t, groups * d), w = s.normal(s.real(), 1, d),
                y = s.blank(s.real(), t, groups * d);
  if (s.coin()) return void(s.op(OpKind::rms_norm, {}, {x, w, {}}, {y, {}}));
  const Operand residual = s.normal(s.real(), t, groups * d),
                sum = s.coin() ? x : s.blank(s.real(), t, groups * d);
  s.op(OpKind::rms_norm, {}, {x, w, residual}, {y, sum});
}

void rms_norm_bwd(Sample& s) {
  const int64_t t = s.number(1, 200), d = s.size(3, 400), groups = s.one_of<int64_t>({1, 1, 3});
  const bool accumulate = s.coin();
  const Operand dy = s.normal(s.real_or_f32(), t, groups * d), x = s.normal(s.real(), t, groups * d),
                w = s.normal(s.real(), 1, d),
                d_sum = s.coin() ? s.normal(s.real(), t, groups * d) : Operand{},
                dx = dy.view.type == s.real() && s.coin() ? dy : s.blank(s.real(), t, groups * d),
                dw = s.target(accumulate, s.real_or_f32(), 1, d);
  s.op(OpKind::rms_norm_bwd, adding(accumulate), {dy, x, w, d_sum}, {dx, dw});
}

struct Rotated {
  int64_t tokens, cols, norm;  // norm: columns that are normalised together; 0: none
  Does does;
  Operand positions;
};
Rotated rotated(Sample& s) {
  constexpr int64_t kPositions = 300;
  Rotated r{s.number(1, 150), 0, 0, {}, {}};
  const int64_t heads = s.number(1, 6);
  r.does.a = 2 * s.size(2, 64);
  r.does.b = s.coin() ? 0 : s.number(0, r.does.a / 2);
  r.does.c = r.does.b == 0 && s.coin() ? r.does.a : 2 * s.number(1, (r.does.a - r.does.b) / 2);
  r.cols = heads * r.does.a;
  if (s.coin()) r.norm = s.coin() ? r.does.a : r.cols;
  s.rope = {.positions = kPositions, .width = r.does.c, .interleaved = s.coin(), .cos = {}, .sin = {}};
  for (const double angle : s.normal_values(kPositions * r.does.c / 2, 3)) {
    s.rope.cos.push_back(static_cast<float>(std::cos(angle)));
    s.rope.sin.push_back(static_cast<float>(std::sin(angle)));
  }
  r.positions = s.whole(1, r.tokens, s.whole_values(r.tokens, 0, kPositions - 1));
  return r;
}

void rope(Sample& s) {
  const Rotated r = rotated(s);
  const Operand x = s.normal(s.real(), r.tokens, r.cols),
                w = r.norm > 0 ? s.normal(s.real(), 1, r.norm) : Operand{},
                y = s.coin() ? x : s.blank(s.real(), r.tokens, r.cols);
  s.op(OpKind::rope, r.does, {x, r.positions, w}, {y});
}

void rope_bwd(Sample& s) {
  Rotated r = rotated(s);
  Operand x, w, dw;
  if (r.norm > 0) {
    r.does.accumulate = s.coin();
    x = s.normal(s.real(), r.tokens, r.cols);
    w = s.normal(s.real(), 1, r.norm);
    dw = s.target(r.does.accumulate, s.real_or_f32(), 1, r.norm);
  }
  const Operand dy = s.normal(s.real(), r.tokens, r.cols),
                dx = s.coin() ? dy : s.blank(s.real(), r.tokens, r.cols);
  s.op(OpKind::rope_bwd, r.does, {dy, r.positions, x, w}, {dx, dw});
}

void mla_keys(Sample& s) {
  const int64_t t = s.number(1, 150), heads = s.number(1, 6), nope = s.size(1, 64), value = s.size(1, 64),
                rotary = s.size(1, 40);
  const Operand kv = s.normal(s.real(), t, heads * (nope + value)), k_rope = s.normal(s.real(), t, rotary),
                k = s.blank(s.real(), t, heads * (nope + rotary)), v = s.blank(s.real(), t, heads * value);
  s.expect(k, Tolerance::exact());
  s.expect(v, Tolerance::exact());
  s.op(OpKind::mla_keys, {.a = nope, .b = value, .c = rotary}, {kv, k_rope}, {k, v});
}

void mla_keys_bwd(Sample& s) {
  const int64_t t = s.number(1, 150), heads = s.number(1, 6), nope = s.size(1, 64), value = s.size(1, 64),
                rotary = s.size(1, 40);
  const Does does{.accumulate = s.coin(), .a = nope, .b = value, .c = rotary};
  const Operand dk = s.normal(s.real(), t, heads * (nope + rotary)),
                dv = s.normal(s.real(), t, heads * value), dkv = s.blank(s.real(), t, heads * (nope + value)),
                dk_rope = s.target(does.accumulate, s.real(), t, rotary);
  s.expect(dkv, Tolerance::exact());
  s.op(OpKind::mla_keys_bwd, does, {dk, dv}, {dkv, dk_rope});
}

// ---- attention: bf16 on a GPU, widths and lds in multiples of 8

// Documents of random lengths: the first visible row of each of the rows.
std::vector<int32_t> starts_of(Sample& s, int64_t batch, int64_t context, int64_t documents) {
  std::vector<int32_t> starts;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int64_t> begins{0};
    for (int64_t d = 1; d < documents; ++d) begins.push_back(s.number(1, context - 1));
    std::ranges::sort(begins);
    for (int64_t i = 0; i < context; ++i)
      starts.push_back(static_cast<int32_t>(b * context + *(std::ranges::upper_bound(begins, i) - 1)));
  }
  return starts;
}

std::array<std::vector<int32_t>, 4> batch_of(std::vector<int32_t> starts) {
  const size_t t = starts.size();
  return {std::vector<int32_t>(t, 1), std::vector<int32_t>(t, 1), std::vector<int32_t>(t, 0),
          std::move(starts)};
}

struct Widths {
  int64_t heads, kv_heads, qk, v;
};
struct Attending {
  Widths widths;
  bool sinks = false;
  int64_t documents = 1;        // a sequence
  int64_t first_documents = 0;  // above 0: of another micro-batch before, which has so many
  std::vector<int64_t> windows{0};
  int64_t unit = 8;  // of the context
};

// Forward and backward, which takes what forward left: its logarithms are in the backend's own order.
void attend(Sample& s, const Attending& a) {
  s.narrow();
  s.aligned();
  s.fixed_order = false;
  const Widths& w = a.widths;
  const int64_t batch = s.number(1, 3), context = s.number(5, 25) * a.unit, t = batch * context;
  const int64_t window = a.windows[static_cast<size_t>(s.number(0, std::ssize(a.windows) - 1))];
  s.rope.positions = context;
  s.rope.attention_scale = 1 / std::sqrt(static_cast<double>(w.qk));
  const bool accumulate = s.coin(), add_sinks = s.coin();
  s.group(3, static_cast<int>(s.number(0, 2)));

  Operand starts;
  const bool documents = a.documents > 1 || a.first_documents > 0;
  if (documents) {  // where the host sees them
    const Operand valid = s.blank(Type::f64, 1, 1, {.dense = true});
    const auto bring = [&](int64_t each, bool first) {
      s.batches.push_back(batch_of(starts_of(s, batch, context, each)));
      const auto ints = [&] { return s.blank(Type::i32, 1, t, {.dense = true}); };
      starts = ints();
      s.op(OpKind::next_batch, {.accumulate = !first, .a = std::ssize(s.batches) - 1}, {},
           {ints(), ints(), ints(), starts, valid}, Stream::h2d);
    };
    if (a.first_documents > 0) bring(a.first_documents, true);
    bring(a.documents, a.first_documents == 0);
  } else {
    const std::vector<int32_t> all = starts_of(s, batch, context, 1);
    starts = s.whole(1, t, Values(all.begin(), all.end()));
  }
  const int64_t k_width = w.kv_heads * w.qk, v_width = w.kv_heads * w.v;
  const Operand q = s.normal(Type::bf16, t, w.heads * w.qk), kv = s.normal(Type::bf16, t, k_width + v_width),
                sinks = a.sinks ? s.normal(Type::bf16, 1, 3 * w.heads) : Operand{},
                o = s.blank(Type::bf16, t, w.heads * w.v),
                lse = s.blank(Type::f32, t, w.heads, {.dense = true}),
                d_o = s.normal(Type::bf16, t, w.heads * w.v),
                dq = s.blank(Type::bf16, t, w.heads * w.qk, {.ld = q.view.ld}),
                d_kv = s.target(accumulate, Type::bf16, t, k_width + v_width),
                d_sinks = a.sinks ? s.target(add_sinks, s.one_of({Type::bf16, Type::f32}), 1, 3 * w.heads)
                                  : Operand{};
  const auto split = [&](const Operand& both) {
    return std::pair{columns(both, 0, k_width), columns(both, k_width, v_width)};
  };
  const auto [k, v] = split(kv);
  const auto [dk, dv] = split(d_kv);
  // Probabilities and gradients of logits pass through bf16 on a GPU, 2^-9 each: so much of the norm, and the
  // farthest of 10^5 elements four times that.
  s.expect(o, {2e-2, 1, 6e-3});
  s.expect(lse, {1e-3, 0, 1e-3});
  s.expect(dq, {6e-2, 1, 1.2e-2});
  s.expect(d_kv, {6e-2, 1, 1.2e-2});
  if (a.sinks) s.expect(d_sinks, {4e-2, 1, 2e-2});
  if (!documents) s.heads_first(lse, context);
  const program::Shape shape =
      program::AttentionShape{batch, context, context, w.heads, w.kv_heads, w.qk, w.v, 1, window}.shape();
  s.op(OpKind::attention_fwd, {.b = window}, {q, k, v, starts, sinks}, {o, lse}, Stream::compute, shape);
  s.op(OpKind::attention_bwd, {.accumulate = accumulate, .a = add_sinks ? 1 : 0, .b = window},
       {q, k, v, o, d_o, lse, starts, sinks}, {dq, dk, dv, d_sinks}, Stream::compute, shape);
}

void attention_gqa(Sample& s) {
  attend(s, {.widths = s.one_of<Widths>({{8, 2, 64, 64}, {4, 4, 128, 128}, {6, 1, 128, 128}})});
}
void attention_odd_context(Sample& s) {
  attend(s, {.widths = {4, 2, 64, 64}, .unit = 7});
}
void attention_mla(Sample& s) {
  attend(s, {.widths = {4, 4, 192, 128}});
}
void attention_window(Sample& s) {
  attend(s, {.widths = {4, 2, 64, 64}, .windows = {2, 16, 48, 1000}});
}
void attention_sinks(Sample& s) {
  attend(s, {.widths = {8, 2, 64, 64}, .sinks = true, .windows = {0, 20}});
}
// Of the smallest models, which the tests train.
void attention_small_heads(Sample& s) {
  attend(s, {.widths = s.one_of<Widths>({{4, 2, 16, 16}, {4, 4, 24, 16}}),
             .sinks = s.coin(),
             .windows = {0, 0, 8}});
}
void attention_documents(Sample& s) {
  attend(s, {.widths = s.one_of<Widths>({{8, 2, 64, 64}, {4, 1, 128, 128}, {4, 2, 16, 16}}),
             .sinks = s.coin(),
             .documents = s.number(2, 6),
             .windows = {0, 0, 20}});
}
void attention_documents_mla(Sample& s) {
  attend(s, {.widths = {4, 4, 192, 128}, .documents = s.number(2, 4)});
}
// The first of a step's micro-batches has none, or fewer.
void attention_documents_of_the_second_batch(Sample& s) {
  attend(s, {.widths = {8, 2, 64, 64}, .documents = 5, .first_documents = s.one_of<int64_t>({1, 2})});
}

// ---- activations

template <OpKind kKind>
void activation(Sample& s) {
  s.model.swiglu_limit = 1.5, s.model.swiglu_alpha = 1.702;
  const int64_t r = s.number(1, 200), i = s.size(1, 300);
  const Operand gate_up = s.normal(s.real(), r, 2 * i);
  if constexpr (kKind == OpKind::swiglu || kKind == OpKind::clamped_swiglu) {
    s.op(kKind, {}, {gate_up, {}}, {s.blank(s.real(), r, i)});
  } else {
    s.op(kKind, {}, {gate_up, s.normal(s.real(), r, i)}, {s.coin() ? gate_up : s.blank(s.real(), r, 2 * i)});
  }
}

// ---- routers

void router(Sample& s, bool groups) {
  s.model.experts = groups ? 8 * s.number(2, 8) : s.number(2, 70);
  s.model.top_k = s.number(1, std::min<int64_t>(8, s.model.experts / 2 + 1));
  s.model.routed_scale = s.one_of({1.0, 2.5});
  s.model.normalise_topk = s.coin();
  s.model.aux_loss_coefficient = 0.05;
  if (!groups) return;
  s.model.router_groups = 4;
  s.model.router_top_groups = s.number(1, 3);
  s.model.top_k = std::min(s.model.top_k, s.model.experts / 4 * s.model.router_top_groups);
}

// With its backward, whose choices are then the same.
void route_tokens(Sample& s, bool correction, bool balanced) {
  const int64_t n = s.number(1, 400), e = s.model.experts, k = s.model.top_k;
  const bool accumulate = s.coin();
  const Operand logits = s.normal(Type::f32, n, e),
                bias =
                    correction ? s.of(Type::f32, 1, e, s.normal_values(e, 0.3), {.dense = true}) : Operand{},
                ids = s.blank(Type::i32, n, k, {.dense = true}),
                weights = s.blank(Type::f32, n, k, {.dense = true});
  Operand load, all_load;
  if (balanced) {
    Values before = s.whole_values(2 * e, 0, 100);
    load = accumulate ? s.of(Type::f32, 1, 2 * e, before, {.dense = true})
                      : s.blank(Type::f32, 1, 2 * e, {.dense = true});
    all_load = s.of(Type::f32, 1, 2 * e, s.whole_values(2 * e, 0, 300), {.dense = true});
  }
  s.op(OpKind::topk, adding(accumulate), {logits, bias}, {ids, weights, load});
  const Operand d_logits = s.blank(s.real(), n, e);
  s.expect(d_logits, {.floor = 1e-6});  // with one choice, normalised, there is nothing but roundings
  s.op(OpKind::topk_bwd, {.a = 2, .b = 10, .c = 2},
       {s.normal(Type::f32, n, k, {.dense = true}), ids, weights, logits, all_load}, {d_logits});
}

void topk_softmax(Sample& s) {
  router(s, false);
  route_tokens(s, false, s.coin());
}
void topk_softmax_groups(Sample& s) {
  router(s, true);
  route_tokens(s, false, false);
}
void topk_softmax_after(Sample& s) {
  router(s, false);
  s.model.softmax_after_topk = true;
  s.model.normalise_topk = false;
  route_tokens(s, false, s.coin());
}
void topk_sigmoid(Sample& s) {
  router(s, s.coin());
  s.model.scoring = model::Scoring::sigmoid;
  route_tokens(s, s.coin(), false);
}

void balance_loss(Sample& s) {
  router(s, false);
  s.group(2, static_cast<int>(s.number(0, 1)));
  const bool accumulate = s.coin();
  const int64_t e = s.model.experts;
  const Operand load = s.of(Type::f32, 1, 2 * e, s.whole_values(2 * e, 0, 300), {.dense = true}),
                sum = s.target(accumulate, Type::f64, 1, 1, {.dense = true});
  s.op(OpKind::balance_loss, {.accumulate = accumulate, .a = 3, .b = 500, .c = 2}, {load}, {sum});
}

void sort(Sample& s) {
  s.model.experts = s.number(1, 200);
  s.model.top_k = s.number(1, 6);
  const int64_t n = s.number(1, 3000), k = s.model.top_k, hot = s.one_of<int64_t>({0, 5, 10});
  Values ids = s.whole_values(n * k, 0, s.model.experts - 1);
  for (double& id : ids)
    if (s.number(0, 9) < hot) id = static_cast<double>(s.model.experts - 1);
  s.op(OpKind::sort, {}, {s.whole(n, k, ids)},
       {s.blank(Type::i32, 1, n * k, {.dense = true}),
        s.blank(Type::i32, 1, s.model.experts, {.dense = true})});
}

// ---- routed rows, a rank of one, two or four; the others' counts come as if gathered

void permute(Sample& s) {
  const Routed r = route(s);
  const int64_t h = s.size(1, 200);
  const bool backward = s.coin();
  const auto rows = [&] { return s.blank(s.real(), r.capacity, h); };
  const Operand x = s.normal(s.real(), r.tokens, h), to_x = rows();
  Operand dy, to_dy, weights, to_weights;
  if (backward) {
    dy = s.normal(s.real(), r.tokens, h), to_dy = rows();
    weights = s.normal(Type::f32, r.tokens, r.k, {.dense = true});
    to_weights = s.blank(Type::f32, 1, r.capacity, {.dense = true});
    s.expect(to_dy, Tolerance::exact());
    s.expect(to_weights, Tolerance::exact());
  }
  s.expect(to_x, Tolerance::exact());
  s.repeat(r.plan, [&] {
    s.op(OpKind::permute, {}, {x, r.order, r.rounds, dy, weights}, {to_x, to_dy, to_weights});
  });
}

// (R, cols) of which the first `rows` may be read, and only they.
Operand rows_of(Sample& s, const Routed& r, int64_t rows, int64_t cols) {
  Values values = s.normal_values(r.capacity * cols);
  std::fill(values.begin() + rows * cols, values.end(), std::nan(""));
  return s.of(s.real(), r.capacity, cols, std::move(values));
}

void unpermute(Sample& s) {
  const Routed r = route(s);
  const int64_t h = s.size(1, 200);
  const Operand rows = rows_of(s, r, r.sent, h),
                weights = s.normal(Type::f32, r.tokens, r.k, {.dense = true}),
                y = s.normal(Type::f32, r.tokens, h);
  s.repeat(r.plan, [&] { s.op(OpKind::unpermute, adding(true), {rows, r.order, r.rounds, weights}, {y}); });
}

void unpermute_bwd(Sample& s) {
  const Routed r = route(s);
  const int64_t h = s.size(1, 200);
  const Operand rows = rows_of(s, r, r.sent, h),
                d_gates = s.normal(Type::f32, 1, r.capacity, {.dense = true}),
                dx = s.normal(Type::f32, r.tokens, h),
                d_weights = s.blank(Type::f32, r.tokens, r.k, {.dense = true});
  s.expect(d_weights, Tolerance::exact());
  s.repeat(r.plan, [&] {
    s.op(OpKind::unpermute_bwd, adding(true), {rows, r.order, r.rounds, d_gates}, {dx, d_weights});
  });
}

// Matrices of the own experts, and of the borrowed ones with the same ld.
struct Experts {
  Operand own, spilled;
};

// Gradients of weights: only what is added to is there.
Experts gradients(Sample& s, const Routed& r, bool accumulate, int64_t rows, int64_t cols) {
  const Type type = s.real_or_f32();
  Experts e;
  e.own = s.target(accumulate, type, rows, cols, {.count = r.own()});
  if (r.ranks > 1) e.spilled = s.blank(type, rows, cols, {.count = s.spill_slots, .ld = e.own.view.ld});
  for (const Operand& out : {e.own, e.spilled})
    if (out.buffer != program::kNoBuffer && type == Type::bf16) s.expect(out, rounded(r.times + 1));
  return e;
}

Experts experts(Sample& s, const Routed& r, Type type, int64_t rows, int64_t cols) {
  const auto scale = 1 / std::sqrt(static_cast<double>(std::max(rows, cols)));
  Experts e;
  e.own = s.normal(type, rows, cols, {.count = r.own(), .scale = scale});
  if (r.ranks > 1)
    e.spilled = s.normal(type, rows, cols, {.count = s.spill_slots, .ld = e.own.view.ld, .scale = scale});
  return e;
}

void grouped_gemm(Sample& s) {
  const Routed r = route(s);
  const int64_t n = s.size(1, 160), k = s.size(1, 160);
  const Does does{.transpose_b = s.coin()};
  const Operand a = rows_of(s, r, r.computed, k), c = s.blank(s.real(), r.capacity, n);
  const Experts w = does.transpose_b ? experts(s, r, s.real(), n, k) : experts(s, r, s.real(), k, n),
                bias = does.transpose_b && s.coin() ? experts(s, r, s.real(), 1, n) : Experts{};
  if (s.real() == Type::bf16) s.expect(c, rounded(1));
  s.repeat(r.plan, [&] {
    s.op(OpKind::grouped_gemm, does, {a, r.rounds, w.own, w.spilled, bias.own, bias.spilled}, {c});
  });
}

void grouped_gemm_weight_gradient(Sample& s) {
  const Routed r = route(s);
  const int64_t m = s.size(1, 160), n = s.size(1, 160);
  const Operand a = rows_of(s, r, r.computed, m), b = rows_of(s, r, r.computed, n);
  const bool accumulate = s.coin();
  const Experts dw = gradients(s, r, accumulate, m, n);
  s.repeat(r.plan, [&] {
    s.op(OpKind::grouped_gemm, {.accumulate = accumulate, .transpose_a = true}, {a, b, r.rounds},
         {dw.own, dw.spilled});
  });
}

void expert_bias_bwd(Sample& s) {
  const Routed r = route(s);
  const int64_t n = s.size(1, 300);
  const Operand dy = rows_of(s, r, r.computed, n),
                weights = s.coin() ? s.normal(Type::f32, 1, r.capacity, {.dense = true}) : Operand{};
  const bool accumulate = s.coin();
  const Experts db = gradients(s, r, accumulate, 1, n);
  s.repeat(r.plan, [&] {
    s.op(OpKind::expert_bias_bwd, adding(accumulate), {dy, r.rounds, weights}, {db.own, db.spilled});
  });
}

template <OpKind kKind>
void routed_activation(Sample& s) {
  s.model.swiglu_limit = 1.5, s.model.swiglu_alpha = 1.702;
  constexpr bool kForward = kKind == OpKind::swiglu || kKind == OpKind::clamped_swiglu;
  const bool in_place = !kForward && s.coin();
  const Routed r = route(s, in_place);
  const int64_t i = s.size(1, 200), h = s.size(1, 200);
  const Operand gate_up = rows_of(s, r, r.computed, 2 * i);
  if constexpr (kForward) {
    const Operand act = s.blank(s.real(), r.capacity, i);
    s.repeat(r.plan, [&] { s.op(kKind, {}, {gate_up, r.rounds}, {act}); });
  } else {
    const Experts bias = s.coin() ? experts(s, r, s.real(), 1, h) : Experts{};
    const Operand d_act = rows_of(s, r, r.computed, i), act = rows_of(s, r, r.computed, i),
                  dy = rows_of(s, r, r.computed, h),
                  weights = s.normal(Type::f32, 1, r.capacity, {.dense = true}),
                  d_gate_up = in_place ? gate_up : s.blank(s.real(), r.capacity, 2 * i),
                  weighted = in_place ? act : s.blank(s.real(), r.capacity, i),
                  d_weights = s.blank(Type::f32, 1, r.capacity, {.dense = true});
    s.repeat(r.plan, [&] {
      s.op(kKind, {}, {gate_up, d_act, r.rounds, weights, act, dy, bias.own, bias.spilled},
           {d_gate_up, weighted, d_weights});
    });
  }
}

// ---- elementwise

void clear(Sample& s) {
  const Type type = s.one_of({s.real(), Type::f32, Type::f64, Type::i32});
  s.op(OpKind::clear, {}, {}, {s.blank(type, s.number(1, 100), s.size(1, 300))});
}

void add(Sample& s) {
  const int64_t rows = s.number(1, 150), cols = s.size(1, 300);
  const bool accumulate = s.coin();
  const auto in = [&] { return s.normal(s.real_or_f32(), rows, cols); };
  const Operand a = in(), b = s.coin() ? in() : Operand{};
  s.op(OpKind::add, adding(accumulate), {a, b}, {s.target(accumulate, s.real_or_f32(), rows, cols)});
}

template <OpKind kKind>
void convert(Sample& s) {
  const int64_t rows = s.number(1, 150), cols = s.size(1, 300);
  const Operand to = s.blank(s.real_or_f32(), rows, cols);
  s.expect(to, Tolerance::exact());
  s.op(kKind, {}, {s.normal(s.real_or_f32(), rows, cols)}, {to});
}

void sum_replicas(Sample& s) {
  const int64_t t = s.number(1, 150), heads = s.number(1, 4), replicas = s.number(1, 4),
                width = s.size(1, 100);
  s.op(OpKind::sum_replicas, {.a = replicas, .b = width}, {s.normal(s.real(), t, heads * replicas * width)},
       {s.blank(s.real(), t, heads * width)});
}

// ---- the two ends

void embedding(Sample& s) {
  s.model.vocab = s.number(2, 300);
  const int64_t t = s.number(1, 300), c = s.size(1, 200);
  const Operand ids = s.whole(1, t, s.whole_values(t, 0, s.model.vocab - 1)), x = s.blank(s.real(), t, c);
  s.expect(x, Tolerance::exact());
  s.op(OpKind::embedding, {}, {ids, s.normal(s.real(), s.model.vocab, c)}, {x});
}

void embedding_bwd(Sample& s) {
  s.model.vocab = s.number(2, 300);
  const int64_t t = s.number(1, 900), c = s.size(1, 150), hot = s.one_of<int64_t>({0, 5, 10});
  const bool accumulate = s.coin();
  Values ids = s.whole_values(t, 0, s.model.vocab - 1);
  for (double& id : ids)
    if (s.number(0, 9) < hot) id = 1;
  const Operand d_table = s.target(accumulate, s.real_or_f32(), s.model.vocab, c);
  s.expect(d_table, {.noise = 1e-4});  // one row may be the sum of all, the others none
  s.op(OpKind::embedding_bwd, adding(accumulate), {s.whole(1, t, ids), s.normal(s.real(), t, c)}, {d_table});
}

// A block of the vocabulary's columns at one of `ranks` ranks, `step` blocks further than its own; what lies
// beyond the vocabulary is NaN. tokens_move: for everyone's tokens, else for its own.
struct Block {
  bool tokens_move;
  int64_t ranks, step, m;
  Operand logits, targets;
  Values at_target;  // by row: the target's logit where it is in this block, else NaN
};
Block block(Sample& s) {
  Block b{s.coin(), s.number(1, 4), 0, s.number(1, 60), {}, {}, {}};
  s.group(b.ranks, static_cast<int>(s.number(0, b.ranks - 1)));
  const int64_t own = b.m, of = b.tokens_move ? b.ranks : 1, width = s.size(4, 300),
                missing = s.number(0, std::min<int64_t>(width - 1, 20));
  b.m *= of;
  if (!b.tokens_move) b.step = s.number(0, b.ranks - 1);
  s.model.vocab = b.ranks * width - missing;
  const int64_t first = (s.rank() - b.step + b.ranks) % b.ranks * width;
  const bool last = first == (b.ranks - 1) * width;
  Values logits = s.normal_values(b.m * width, 2), targets = s.whole_values(b.m, 0, s.model.vocab - 1);
  // Sixteenths below 8 are the same in bf16 and fp32: so are the targets' in the statistics.
  for (double& logit : logits) logit = std::clamp(std::round(logit * 16) / 16, -7.5, 7.5);
  for (int64_t row = 0; last && row < b.m; ++row)
    std::fill_n(logits.begin() + (row + 1) * width - missing, missing, std::nan(""));
  for (double& target : targets)
    if (s.number(0, 9) == 0) target = -100;
  for (int64_t row = 0; row < b.m; ++row) {
    const int64_t column = static_cast<int64_t>(targets[static_cast<size_t>(row)]) - first;
    b.at_target.push_back(column >= 0 && column < width ? logits[static_cast<size_t>(row * width + column)]
                                                        : std::nan(""));
  }
  b.logits = s.of(s.real(), b.m, width, std::move(logits));
  b.targets = s.of(Type::i32, of, own, std::move(targets));
  return b;
}

// (blocks, m, 3) as the blocks' forwards leave them.
Operand statistics(Sample& s, int64_t blocks, const Block& b) {
  const int64_t m = b.m;
  Values values;
  for (int64_t i = 0; i < blocks * m; ++i) {
    values.push_back(s.normal_values(1)[0] + 5);
    values.push_back(std::exp(s.normal_values(1)[0] + 1));
    const double own = b.at_target[static_cast<size_t>(i % m)];
    values.push_back(i / m != i % m % blocks ? 0 : std::isnan(own) ? s.normal_values(1)[0] : own);
  }
  return s.of(Type::f32, m, 3, std::move(values), {.count = blocks, .dense = true});
}

void cross_entropy(Sample& s) {
  const Block b = block(s);
  const bool accumulate = s.coin();
  const Operand all = accumulate ? statistics(s, 1, b) : s.blank(Type::f32, b.m, 3, {.dense = true});
  s.op(OpKind::cross_entropy, {.accumulate = accumulate, .a = b.step}, {b.logits, b.targets}, {all});
}

void cross_entropy_bwd(Sample& s) {
  const Block b = block(s);
  const bool accumulate = s.coin();
  const Operand valid = s.number_of(Type::f64, 37), loss = b.step > 0 ? Operand{}
                                                           : accumulate
                                                               ? s.number_of(Type::f64, 2.5)
                                                               : s.blank(Type::f64, 1, 1, {.dense = true});
  s.op(OpKind::cross_entropy_bwd,
       {.accumulate = accumulate, .a = b.step, .b = b.targets.view.cols, .c = b.tokens_move ? 1 : 0},
       {b.logits, statistics(s, b.tokens_move ? b.ranks : 1, b), b.targets, valid}, {b.logits, loss});
}

void next_batch(Sample& s) {
  const int64_t t = s.number(1, 100), all = t * s.number(1, 4);
  s.rope.positions = all;
  const Operand valid = s.blank(Type::f64, 1, 1, {.dense = true});
  for (int64_t micro = 0; micro < 2; ++micro) {
    const auto numbers = [&](int64_t n) {
      const Values values = s.whole_values(n, 0, 1000);
      return std::vector<int32_t>(values.begin(), values.end());
    };
    s.batches.push_back({numbers(t), numbers(t), numbers(t), numbers(all)});
    for (int32_t& target : s.batches.back()[1])
      if (target < 200) target = -100;
    const auto ints = [&](int64_t n) { return s.blank(Type::i32, 1, n, {.dense = true}); };
    s.op(OpKind::next_batch, {.accumulate = micro > 0, .a = micro}, {},
         {ints(t), ints(t), ints(t), ints(all), valid}, Stream::h2d);
  }
}

// ---- the optimizer

void square_sum(Sample& s) {
  const bool accumulate = s.coin();
  const Operand sum = s.target(accumulate, Type::f64, 1, 1, {.dense = true});
  s.expect(sum, {1e-6, 0, 0});  // fp32 or better
  s.op(OpKind::square_sum, {.accumulate = accumulate, .a = s.number(1, 4)},
       {s.normal(s.real(), s.number(1, 50), s.size(1, 3000))}, {sum});
}

void clip_factor(Sample& s) {
  s.step.max_norm = s.one_of({1.0, 0.3, 1e3, double{INFINITY}});
  const Operand factor = s.blank(Type::f32, 1, 1, {.dense = true});
  s.expect(factor, {1e-6, 0, 0});
  s.op(OpKind::clip_factor, {}, {s.number_of(Type::f64, s.one_of({0.0, 1e-4, 3.0, 1e8}))}, {factor});
}

void adam(Sample& s, Space space, OpKind kind, Stream stream) {
  s.step.adam = {s.number(1, 50), 1e-2, 0.9, 0.95, 1e-8, 0.1};
  const bool master = s.coin(), clipped = s.coin();
  const int64_t pairs = s.number(1, 2);
  std::vector<int64_t> sizes;
  int64_t n = 0;
  for (int64_t i = 0; i < pairs; ++i) n += sizes.emplace_back(s.size(1, 3000));
  // One block, or several whose last one is not full.
  const int64_t bucket = s.coin() ? n + s.number(0, 40) : s.number(n / 3 + 1, n),
                blocks = (n + bucket - 1) / bucket;
  Values states;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t used = std::min(bucket, n - b * bucket);
    const auto put = [&](Values values) {
      values.resize(static_cast<size_t>(bucket), std::nan(""));
      states.insert(states.end(), values.begin(), values.end());
    };
    if (master) put(s.normal_values(used));
    put(s.normal_values(used, 0.3));
    put(squares(s, used));
  }
  const Operand states_of = s.of(Type::f32, 1, std::ssize(states), states, {.dense = true, .space = space});
  s.expect(states_of, {.noise = 5e-6});  // moments are small beside the weights
  const Operand factor = clipped ? s.number_of(Type::f32, 0.37) : Operand{};
  std::vector<Operand> reads{factor, states_of}, writes{states_of};
  const Type gradients = s.real_or_f32();
  for (const int64_t size : sizes) {
    reads.push_back(s.normal(gradients, 1, size, {.space = space}));
    writes.push_back(master ? s.blank(s.real(), 1, size, {.space = space})
                            : s.normal(Type::f32, 1, size, {.space = space}));
  }
  s.op(kind, {.a = bucket, .b = master ? 0 : 1}, reads, writes, stream);
}
void adam_on_gpu(Sample& s) {
  adam(s, Space::hbm, OpKind::adam, Stream::compute);
}
void adam_on_host(Sample& s) {
  adam(s, Space::host, OpKind::adam_host, Stream::host);
}

// What is read, end to end, is what is written; the pieces on either side differ.
template <OpKind kKind>
void copy_bytes(Sample& s) {
  constexpr bool kUp = kKind == OpKind::copy_h2d;
  s.widens = false;
  std::vector<Operand> pieces;
  int64_t bytes = 0;
  for (int64_t i = s.number(1, 4); i > 0; --i) {
    const Type type = s.real_or_f32();
    const int64_t rows = s.number(1, 40), cols = 2 * s.number(1, 60);
    const Layout there{.dense = true, .space = kUp ? Space::hbm : Space::host};
    pieces.push_back(kUp ? s.blank(type, rows, cols, there) : s.normal(type, rows, cols, there));
    bytes += rows * cols * program::size_of(type);
  }
  const Layout here{.dense = true, .space = kUp ? Space::host : Space::hbm};
  const int64_t first = 4 * s.number(0, bytes / 8);  // the other side: one piece or two
  std::vector<Operand> ends;
  for (const int64_t n : {first / 4, (bytes - first) / 4})
    if (n > 0) ends.push_back(kUp ? s.normal(Type::f32, 1, n, here) : s.blank(Type::f32, 1, n, here));
  for (const auto& all : {pieces, ends})
    for (const Operand& operand : all) s.expect(operand, Tolerance::exact());
  s.op(kKind, {}, kUp ? ends : pieces, kUp ? pieces : ends, kUp ? Stream::h2d : Stream::d2h);
}

}  // namespace

const std::vector<Case>& cases() {
  constexpr int kFew = 4;  // attention: a plan of the library's for each takes its time
  static const std::vector<Case> all{
      {"gemm", gemm},
      {"column_sum", column_sum},
      {"rms_norm", rms_norm},
      {"rms_norm_bwd", rms_norm_bwd},
      {"rope", rope},
      {"rope_bwd", rope_bwd},
      {"mla_keys", mla_keys},
      {"mla_keys_bwd", mla_keys_bwd},
      {"attention_gqa", attention_gqa, kFew},
      {"attention_odd_context", attention_odd_context, kFew},
      {"attention_mla", attention_mla, kFew},
      {"attention_window", attention_window, kFew},
      {"attention_sinks", attention_sinks, kFew},
      {"attention_small_heads", attention_small_heads, kFew},
      {"attention_documents", attention_documents, kFew},
      {"attention_documents_mla", attention_documents_mla, kFew},
      {"attention_documents_of_the_second_batch", attention_documents_of_the_second_batch, kFew},
      {"swiglu", activation<OpKind::swiglu>},
      {"swiglu_bwd", activation<OpKind::swiglu_bwd>},
      {"clamped_swiglu", activation<OpKind::clamped_swiglu>},
      {"clamped_swiglu_bwd", activation<OpKind::clamped_swiglu_bwd>},
      {"topk_softmax", topk_softmax},
      {"topk_softmax_groups", topk_softmax_groups},
      {"topk_softmax_after", topk_softmax_after},
      {"topk_sigmoid", topk_sigmoid},
      {"balance_loss", balance_loss},
      {"sort", sort},
      {"permute", permute},
      {"unpermute", unpermute},
      {"unpermute_bwd", unpermute_bwd},
      {"grouped_gemm", grouped_gemm},
      {"grouped_gemm_weight_gradient", grouped_gemm_weight_gradient},
      {"expert_bias_bwd", expert_bias_bwd},
      {"routed_swiglu", routed_activation<OpKind::swiglu>},
      {"routed_swiglu_bwd", routed_activation<OpKind::swiglu_bwd>},
      {"routed_clamped_swiglu", routed_activation<OpKind::clamped_swiglu>},
      {"routed_clamped_swiglu_bwd", routed_activation<OpKind::clamped_swiglu_bwd>},
      {"clear", clear},
      {"add", add},
      {"cast", convert<OpKind::cast>},
      {"copy", convert<OpKind::copy>},
      {"sum_replicas", sum_replicas},
      {"embedding", embedding},
      {"embedding_bwd", embedding_bwd},
      {"cross_entropy", cross_entropy},
      {"cross_entropy_bwd", cross_entropy_bwd},
      {"next_batch", next_batch},
      {"square_sum", square_sum},
      {"clip_factor", clip_factor},
      {"adam", adam_on_gpu},
      {"adam_host", adam_on_host},
      {"copy_h2d", copy_bytes<OpKind::copy_h2d>},
      {"copy_d2h", copy_bytes<OpKind::copy_d2h>},
  };
  return all;
}

}  // namespace mop::cuda::testing
