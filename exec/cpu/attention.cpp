// Causal attention in tiles of queries and keys, with the softmax computed online: scratch memory does not
// grow with the context. Backward visits the tiles twice, once for the queries and once for keys and values,
// so that every sum is in fp32 until it is complete.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "exec/cpu/operations.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {
namespace {

constexpr int64_t kQueries = 64, kKeys = 128;  // of a tile

using Tile = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Map = Eigen::Map<Tile>;

constexpr float kNothing = -std::numeric_limits<float>::infinity();  // logit of what is not seen

// The operands that forward and backward share, and what their shapes say.
struct Inputs {
  Operand q, k, v, sinks;
  std::span<const int32_t> starts;
  int64_t tokens, heads, kv_heads, qk_dim, v_dim, window;
  int64_t first_sink;  // of this rank
  float scale;

  Inputs(const Call& call, const Operand& starts_operand, const Operand& sinks_operand, const Operand& lse,
         const Constants& constants)
      : q(required(call.in, 0)),
        k(required(call.in, 1)),
        v(required(call.in, 2)),
        sinks(sinks_operand),
        starts(integers(starts_operand)),
        tokens(q.view.rows),
        heads(lse.view.cols),
        qk_dim(q.view.cols / heads),
        window(call.op->does.b),
        first_sink(call.index * heads),
        scale(static_cast<float>(constants.rope.attention_scale)) {
    kv_heads = k.view.cols / qk_dim;
    v_dim = v.view.cols / kv_heads;
    ensure(q.view.cols == heads * qk_dim && k.view.cols == kv_heads * qk_dim &&
               v.view.cols == kv_heads * v_dim && heads % kv_heads == 0,
           "queries, keys and values are whole heads");
    ensure(k.view.rows == tokens && v.view.rows == tokens && std::ssize(starts) == tokens &&
               lse.view.rows == tokens,
           "every token has a query, a key and a value");
    ensure(!sinks || sinks.view.cols >= first_sink + heads, "every head of this rank has a sink");
  }

  int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }
  // First key that a query sees; its own is the last.
  int64_t first_key(int64_t query) const {
    const int64_t start = starts[static_cast<size_t>(query)];
    ensure(start >= 0 && start <= query, "a token sees itself");
    return window == 0 ? start : std::max(start, query - window + 1);
  }
  int64_t first_key(int64_t query, int64_t end) const {  // of queries [query, end)
    int64_t first = query;
    for (; query < end; ++query) first = std::min(first, first_key(query));
    return first;
  }
  float sink(int64_t head) const {
    float value = kNothing;
    if (sinks) load(row(sinks, 0).part(first_sink + head, 1), &value);
    return value;
  }
};

// Columns [head x width, + width) of rows [first, last).
Map load_head(const Operand& operand, int64_t head, int64_t width, int64_t first, int64_t last,
              std::span<float> scratch) {
  const Matrix m = matrix(operand);
  for (int64_t r = first; r < last; ++r)
    load(m.part(r, head * width, width), scratch.data() + (r - first) * width);
  return {scratch.data(), last - first, width};
}

void store_head(const Map& tile, const Operand& operand, int64_t head, int64_t first, bool accumulate) {
  const Matrix m = matrix(operand);
  for (int64_t r = 0; r < tile.rows(); ++r)
    store(tile.data() + r * tile.cols(), m.part(first + r, head * tile.cols(), tile.cols()), accumulate);
}

// Calls f(r, n_before, n) for the rows of the tile of queries from `query` on and keys [key, key + keys): row
// r sees the columns [n_before, n_before + n).
template <typename F>
void for_each_row(const Inputs& in, int64_t query, int64_t queries, int64_t key, int64_t keys, F f) {
  for (int64_t r = 0; r < queries; ++r) {
    const int64_t first = std::clamp<int64_t>(in.first_key(query + r) - key, 0, keys);
    const int64_t last = std::clamp<int64_t>(query + r + 1 - key, first, keys);
    f(r, first, last - first);
  }
}

// What backward needs of a tile of queries of one head.
class BackwardTile {
 public:
  BackwardTile(const Inputs& in, const Operand& o, const Operand& d_o, const Operand& lse,
               Workspace& workspace)
      : in_(in),
        o_operand_(o),
        d_o_operand_(d_o),
        lse_operand_(lse),
        q_(workspace.take<float>(kQueries * in.qk_dim)),
        o_(workspace.take<float>(kQueries * in.v_dim)),
        d_o_(workspace.take<float>(kQueries * in.v_dim)),
        lse_(workspace.take<float>(kQueries)),
        delta_(workspace.take<float>(kQueries)),
        p_(workspace.take<float>(kQueries * kKeys)),
        d_s_(workspace.take<float>(kQueries * kKeys)) {}

  void load_queries(int64_t head, int64_t first, int64_t last) {
    first_ = first;
    queries_ = last - first;
    load_head(in_.q, head, in_.qk_dim, first, last, q_) *= in_.scale;
    const Map o = load_head(o_operand_, head, in_.v_dim, first, last, o_);
    const Map d_o = load_head(d_o_operand_, head, in_.v_dim, first, last, d_o_);
    load_head(lse_operand_, head, 1, first, last, lse_);
    for (int64_t r = 0; r < queries_; ++r) delta_[static_cast<size_t>(r)] = o.row(r).dot(d_o.row(r));
  }

  Map scaled_q() const { return {q_.data(), queries_, in_.qk_dim}; }
  Map d_o() const { return {d_o_.data(), queries_, in_.v_dim}; }
  float lse(int64_t r) const { return lse_[static_cast<size_t>(r)]; }
  float delta(int64_t r) const { return delta_[static_cast<size_t>(r)]; }  // o . d_o
  Map p() const { return {p_.data(), queries_, keys_}; }                   // probabilities
  Map d_s() const { return {d_s_.data(), queries_, keys_}; }               // gradient of the logits

  void compute(const Map& k, const Map& v, int64_t first_key) {
    keys_ = k.rows();
    Map p = this->p(), d_s = this->d_s();
    p.noalias() = scaled_q() * k.transpose();
    d_s.noalias() = d_o() * v.transpose();
    for_each_row(in_, first_, queries_, first_key, keys_, [&](int64_t r, int64_t before, int64_t n) {
      auto seen = p.row(r).segment(before, n).array();
      seen = (seen - lse(r)).exp();
      p.row(r).head(before).setZero();
      p.row(r).tail(keys_ - before - n).setZero();
      d_s.row(r).array() = p.row(r).array() * (d_s.row(r).array() - delta(r));
    });
  }

 private:
  const Inputs& in_;
  const Operand &o_operand_, &d_o_operand_, &lse_operand_;
  std::span<float> q_, o_, d_o_, lse_, delta_, p_, d_s_;
  int64_t first_ = 0, queries_ = 0, keys_ = 0;
};

}  // namespace

int64_t attention_bytes(int64_t qk_dim, int64_t v_dim) {
  // Backward takes the most: q, o, do, lse, delta, p, ds of a BackwardTile; dq; k, v, dk, dv.
  return 2 * Workspace::size<float>(kQueries * qk_dim) + 2 * Workspace::size<float>(kQueries * v_dim) +
         2 * Workspace::size<float>(kQueries) + 2 * Workspace::size<float>(kQueries * kKeys) +
         2 * Workspace::size<float>(kKeys * qk_dim) + 2 * Workspace::size<float>(kKeys * v_dim);
}

void attention_fwd(const Call& call, const Constants& constants, Workspace& workspace) {
  const Operand &o_operand = required(call.out, 0), &lse = required(call.out, 1);
  const Inputs in(call, required(call.in, 3), optional(call.in, 4), lse, constants);
  const std::span<float> q_scratch = workspace.take<float>(kQueries * in.qk_dim),
                         k_scratch = workspace.take<float>(kKeys * in.qk_dim),
                         v_scratch = workspace.take<float>(kKeys * in.v_dim),
                         o_scratch = workspace.take<float>(kQueries * in.v_dim),
                         s_scratch = workspace.take<float>(kQueries * kKeys);
  std::array<float, kQueries> highest, sum;  // of the logits seen so far; of exp(logit - highest)
  for (int64_t head = 0; head < in.heads; ++head) {
    const int64_t kv_head = in.kv_head(head);
    const float sink = in.sink(head);
    for (int64_t query = 0; query < in.tokens; query += kQueries) {
      const int64_t end = std::min(query + kQueries, in.tokens);
      Map q = load_head(in.q, head, in.qk_dim, query, end, q_scratch);
      q *= in.scale;
      Map o(o_scratch.data(), end - query, in.v_dim);
      o.setZero();
      highest.fill(sink);
      sum.fill(in.sinks ? 1.0F : 0.0F);
      for (int64_t key = in.first_key(query, end); key < end; key += kKeys) {
        const int64_t key_end = std::min(key + kKeys, end);
        const Map k = load_head(in.k, kv_head, in.qk_dim, key, key_end, k_scratch);
        const Map v = load_head(in.v, kv_head, in.v_dim, key, key_end, v_scratch);
        Map s(s_scratch.data(), end - query, key_end - key);
        s.noalias() = q * k.transpose();
        for_each_row(in, query, end - query, key, s.cols(), [&](int64_t r, int64_t before, int64_t n) {
          const auto i = static_cast<size_t>(r);
          auto seen = s.row(r).segment(before, n).array();
          if (n > 0) {
            const float now = std::max(highest[i], seen.maxCoeff());
            const float shrink = std::exp(highest[i] - now);
            highest[i] = now;
            seen = (seen - now).exp();
            sum[i] = sum[i] * shrink + seen.sum();
            o.row(r) *= shrink;
          }
          s.row(r).head(before).setZero();
          s.row(r).tail(s.cols() - before - n).setZero();
        });
        o.noalias() += s * v;
      }
      for (int64_t r = 0; r < end - query; ++r) {
        const auto i = static_cast<size_t>(r);
        o.row(r) /= sum[i];
        const float logarithm = highest[i] + std::log(sum[i]);
        store(&logarithm, matrix(lse).part(query + r, head, 1));
      }
      store_head(o, o_operand, head, query, false);
    }
  }
}

void attention_bwd(const Call& call, const Constants& constants, Workspace& workspace) {
  const Operand &o = required(call.in, 3), &d_o = required(call.in, 4), &lse = required(call.in, 5);
  const Inputs in(call, required(call.in, 6), optional(call.in, 7), lse, constants);
  const Operand &dq_operand = required(call.out, 0), &dk_operand = required(call.out, 1),
                &dv_operand = required(call.out, 2);
  const bool accumulate = call.op->does.accumulate;
  BackwardTile tile(in, o, d_o, lse, workspace);
  const std::span<float> k_scratch = workspace.take<float>(kKeys * in.qk_dim),
                         v_scratch = workspace.take<float>(kKeys * in.v_dim),
                         dq_scratch = workspace.take<float>(kQueries * in.qk_dim),
                         dk_scratch = workspace.take<float>(kKeys * in.qk_dim),
                         dv_scratch = workspace.take<float>(kKeys * in.v_dim);
  const bool add_sinks = call.op->does.a != 0;
  if (in.sinks && !add_sinks) clear(row(required(call.out, 3), 0));

  for (int64_t head = 0; head < in.heads; ++head) {
    const int64_t kv_head = in.kv_head(head);
    double d_sink = 0;
    for (int64_t query = 0; query < in.tokens; query += kQueries) {
      const int64_t end = std::min(query + kQueries, in.tokens);
      tile.load_queries(head, query, end);
      Map dq(dq_scratch.data(), end - query, in.qk_dim);
      dq.setZero();
      for (int64_t key = in.first_key(query, end); key < end; key += kKeys) {
        const int64_t key_end = std::min(key + kKeys, end);
        const Map k = load_head(in.k, kv_head, in.qk_dim, key, key_end, k_scratch);
        tile.compute(k, load_head(in.v, kv_head, in.v_dim, key, key_end, v_scratch), key);
        dq.noalias() += tile.d_s() * k;
      }
      dq *= in.scale;
      store_head(dq, dq_operand, head, query, false);
      if (in.sinks)
        for (int64_t r = 0; r < end - query; ++r)
          d_sink -= static_cast<double>(std::exp(in.sink(head) - tile.lse(r))) * tile.delta(r);
    }
    if (in.sinks) {
      const float value = static_cast<float>(d_sink);
      store(&value, row(required(call.out, 3), 0).part(in.first_sink + head, 1), add_sinks);
    }
  }

  for (int64_t kv_head = 0; kv_head < in.kv_heads; ++kv_head) {
    const int64_t group = in.heads / in.kv_heads;
    for (int64_t key = 0; key < in.tokens; key += kKeys) {
      const int64_t key_end = std::min(key + kKeys, in.tokens);
      const Map k = load_head(in.k, kv_head, in.qk_dim, key, key_end, k_scratch);
      const Map v = load_head(in.v, kv_head, in.v_dim, key, key_end, v_scratch);
      Map dk(dk_scratch.data(), key_end - key, in.qk_dim), dv(dv_scratch.data(), key_end - key, in.v_dim);
      dk.setZero();
      dv.setZero();
      for (int64_t query = key; query < in.tokens; query += kQueries) {
        const int64_t end = std::min(query + kQueries, in.tokens);
        if (in.first_key(query, end) >= key_end) continue;
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          tile.load_queries(head, query, end);
          tile.compute(k, v, key);
          dk.noalias() += tile.d_s().transpose() * tile.scaled_q();
          dv.noalias() += tile.p().transpose() * tile.d_o();
        }
      }
      store_head(dk, dk_operand, kv_head, key, accumulate);
      store_head(dv, dv_operand, kv_head, key, accumulate);
    }
  }
}

}  // namespace mop::cpu
