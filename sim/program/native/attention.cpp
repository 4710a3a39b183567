// Attention under Ulysses (mop.md 2): own tokens and all heads outside, all tokens of the sequence and a part
// of the heads inside, in chunks of heads that bound the working set.
#include <algorithm>

#include "sim/base/error.h"
#include "sim/program/native/lowering.h"

namespace mop::program {

using model::Role;

// The part that is not divided over heads: the norm, and for MLA the latents of q and of k and v.
NativeLowering::Latents NativeLowering::attention_inputs(int layer, BufferId x, const Gathered& g,
                                                         const Latents* kept) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden;
  const double es = static_cast<double>(es_);
  const auto own = [&](const char* label, int64_t rows, int64_t cols) {
    return transient(label, es_ * rows * cols, Holds::attention_activations, layer);
  };
  const auto norm = [&](const Operand& from, Role role, const Operand& to) {
    b_.op(local(OpKind::rms_norm, part, traffic(n_ * from.view.cols, es, es)),
          {from, weight(g, role, 1, from.view.cols), {}}, {to, {}});
  };
  Latents out;
  out.normed = own("attention_normed", n_, h);
  const Operand normed = matrix(out.normed, ct_, n_, h);
  norm(matrix(x, ct_, n_, h), Role::attention_norm, normed);
  if (!mla()) return out;
  if (c_.q_lora_rank > 0) {
    const int64_t rank = c_.q_lora_rank;
    out.q_raw = kept != nullptr ? kept->q_raw : own("q_latent_raw", n_, rank);
    out.q = own("q_latent", n_, rank);
    if (kept == nullptr)
      linear(part, normed, weight(g, Role::q_a, rank, h), matrix(out.q_raw, ct_, n_, rank),
             bias(g, c_.qkv_bias, Role::q_a_bias, rank));
    norm(matrix(out.q_raw, ct_, n_, rank), Role::q_a_norm, matrix(out.q, ct_, n_, rank));
  }
  const int64_t rank = c_.kv_lora_rank, rope = c_.qk_rope_dim, kv = rank + rope;
  out.kv_raw = kept != nullptr ? kept->kv_raw : own("kv_latent_raw", n_, kv);
  out.kv = own("kv_latent", n_, kv);
  const Operand raw = matrix(out.kv_raw, ct_, n_, kv), latent_rows = matrix(out.kv, ct_, n_, kv);
  if (kept == nullptr)
    linear(part, normed, weight(g, Role::kv_a, kv, h), raw, bias(g, c_.qkv_bias, Role::kv_a_bias, kv));
  norm(columns(raw, 0, rank), Role::kv_a_norm, columns(latent_rows, 0, rank));
  Does rotate;
  rotate.a = rotate.c = rope;
  b_.op(local(OpKind::rope, part, rope_shape(n_ * rope, 0), rotate),
        {columns(raw, rank, rope), positions(), {}}, {columns(latent_rows, rank, rope)});
  if (latent() && sequence_ != kNoGroup) {
    out.kv_all = own("kv_latent_gathered", t_, kv);
    b_.op(remote(OpKind::all_gather, Stream::sequence, part, sequence_, es_ * t_ * kv), {latent_rows},
          {matrix(out.kv_all, ct_, t_, kv)});
  } else {
    out.kv_all = out.kv;
  }
  return out;
}

// Queries of one chunk of heads for the whole sequence, and its keys and values unless an earlier chunk
// brought them.
NativeLowering::HeadChunk NativeLowering::project_chunk(int layer, int64_t chunk, const Latents& in,
                                                        const Gathered& g, const HeadChunk& earlier,
                                                        const HeadChunk* kept) {
  const Component part = Component::attention;
  const int64_t qd = c_.qk_dim(), d = layout_.sequence.size, heads = chunks_.heads * d;
  const bool q_lora = mla() && c_.q_lora_rank > 0;
  const int64_t width = q_lora ? c_.q_lora_rank : c_.hidden;
  const auto own = [&](const char* label, int64_t rows, int64_t cols) {
    return matrix(transient(label, es_ * rows * cols, Holds::attention_activations, layer), ct_, rows, cols);
  };
  HeadChunk out = earlier;
  if (kept != nullptr) {
    out.q_raw = kept->q_raw;
  } else {
    out.q_raw = own("queries", n_, heads * qd);
    linear(part, matrix(q_lora ? in.q : in.normed, ct_, n_, width),
           weight(g, q_lora ? Role::q_b : Role::q, heads * qd, width, chunk * heads * qd * width), out.q_raw,
           bias(g, c_.qkv_bias && !mla(), Role::q_bias, heads * qd, chunk * heads * qd));
  }
  // Backward of a norm needs what entered it; without one rotations are in place.
  const bool keep = kept_raw() && (keeps(layer) != Keeps::nothing || b_.phase() == Phase::recompute);
  out.q = keep ? own("queries_rotated", n_, heads * qd) : out.q_raw;
  Does rotate;
  rotate.a = qd;
  rotate.b = mla() ? c_.qk_nope_dim : 0;
  rotate.c = c_.rotary_dim();
  const auto rotated = [&](const Operand& x, Role norm, const Operand& y) {
    if (kept != nullptr && !keep) return;
    const int64_t columns = norm_columns(norm);
    b_.op(local(OpKind::rope, part, rope_shape(x.view.elements(), columns), rotate),
          {x, positions(), columns > 0 ? weight(g, norm, 1, columns) : Operand{}}, {y});
  };
  rotated(out.q_raw, Role::q_norm, out.q);

  Operand k, v;  // of own tokens
  const bool with_kv = chunk < chunks_.kv_chunks;
  if (with_kv) {
    if (kept != nullptr)
      k = out.k_raw = kept->k_raw, v = out.v_own = kept->v_own;
    else
      project_keys_values(layer, chunk, in, g, out, k, v);
    if (!mla()) {
      const Operand to = keep ? own("keys_rotated", n_, k.view.cols) : k;
      rotated(k, Role::k_norm, to);
      k = to;
    }
  }
  if (sequence_ == kNoGroup) {
    out.queries = out.q;
    if (with_kv) out.k = k, out.v = v;
    return out;
  }
  // The whole sequence's rows of own heads.
  const int64_t q_bytes = es_ * n_ * heads * qd;
  out.queries = own("queries_exchanged", t_, chunks_.heads * qd);
  if (with_kv && !latent()) {
    const int64_t kv_heads = chunks_.kv_heads, vd = c_.v_dim();
    const BufferId both = transient("keys_values_exchanged", es_ * t_ * kv_heads * (qd + vd),
                                    Holds::attention_activations, layer);
    out.k = matrix(both, ct_, t_, kv_heads * qd);
    out.v = matrix(both, ct_, t_, kv_heads * vd, t_ * kv_heads * qd);
    const int64_t bytes = q_bytes + b_.at(both).bytes;
    b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, bytes, bytes,
                 exchanging(Exchange::columns_to_rows)),
          {out.q, k, v}, {out.queries, out.k, out.v});
  } else {
    if (with_kv) out.k = k, out.v = v;
    b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, q_bytes, q_bytes,
                 exchanging(Exchange::columns_to_rows)),
          {out.q}, {out.queries});
  }
  return out;
}

// gqa: k and v of own tokens side by side, not yet rotated. mla: from the latents, of own tokens and the
// chunk's heads, or of all tokens and own heads where latents are exchanged.
void NativeLowering::project_keys_values(int layer, int64_t chunk, const Latents& in, const Gathered& g,
                                         HeadChunk& out, Operand& k, Operand& v) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden, qd = c_.qk_dim(), vd = c_.v_dim(), d = layout_.sequence.size;
  const double es = static_cast<double>(es_);
  const auto own = [&](const char* label, int64_t elements) {
    return transient(label, es_ * elements, Holds::attention_activations, layer);
  };
  if (!mla()) {
    const int64_t heads = c_.kv_heads / chunks_.kv_chunks, width = heads * (qd + vd);
    const Operand both = matrix(own("keys_values", n_ * width), ct_, n_, width);
    linear(part, matrix(in.normed, ct_, n_, h), weight(g, Role::k, width, h, chunk * width * h), both,
           bias(g, c_.qkv_bias, Role::k_bias, width, chunk * width));
    k = out.k_raw = columns(both, 0, heads * qd);
    v = out.v_own = columns(both, heads * qd, heads * vd);
    return;
  }
  const int64_t rank = c_.kv_lora_rank, up = c_.qk_nope_dim + vd, rope = c_.qk_rope_dim,
                chunk_heads = chunks_.heads * d;
  const int64_t tokens = latent() ? t_ : n_, heads = latent() ? chunks_.heads : chunk_heads;
  const Operand latents = matrix(latent() ? in.kv_all : in.kv, ct_, tokens, rank + rope);
  const Operand expanded = matrix(own("keys_values_up", tokens * heads * up), ct_, tokens, heads * up);
  Operand w = weight(g, Role::kv_b, heads * up, rank, chunk * chunk_heads * up * rank);
  if (latent()) w = by_rank(w, heads * up * rank);
  gemm(part, columns(latents, 0, rank), false, w, true, expanded, false, {}, latent() ? sequence_ : kNoGroup);
  const BufferId both = own("keys_values", tokens * heads * (qd + vd));
  k = matrix(both, ct_, tokens, heads * qd);
  v = matrix(both, ct_, tokens, heads * vd, tokens * heads * qd);
  Does does;
  does.a = c_.qk_nope_dim;
  does.b = vd;
  does.c = rope;
  b_.op(local(OpKind::mla_keys, part, traffic(tokens * heads * (qd + vd), es, es), does),
        {expanded, columns(latents, rank, rope)}, {k, v});
}

AttentionShape NativeLowering::attention_shape(int layer) const {
  const int64_t window = plan_.windows ? c_.window[static_cast<size_t>(layer)] : 0;
  const int64_t group =
      c_.heads / layout_.sequence.size / (chunks_.kv_heads * chunks_.kv_chunks);  // queries a key head
  const int64_t kv_heads =
      chunks_.kv_chunks == chunks_.chunks ? chunks_.kv_heads : std::max<int64_t>(1, chunks_.heads / group);
  return {in_.workload.sequences,
          in_.workload.context,
          in_.workload.context,
          chunks_.heads,
          kv_heads,
          c_.qk_dim(),
          c_.v_dim(),
          1,
          window};
}

// The key heads that a chunk of query heads looks at, `width` elements each, where one chunk brought all of
// them.
Operand NativeLowering::own_keys(Operand keys, int64_t chunk, int64_t width) const {
  if (chunks_.kv_chunks == chunks_.chunks) return keys;
  const int64_t group = c_.heads / layout_.sequence.size / chunks_.kv_heads;
  return columns(keys, chunk * chunks_.heads / group * width,
                 std::max<int64_t>(1, chunks_.heads / group) * width);
}

// out: (N, heads x v), all heads; lse: (S, heads / D) fp32, a chunk after the other. Chunk c + 1 is projected
// and exchanged while chunk c computes.
std::vector<NativeLowering::HeadChunk> NativeLowering::attention_forward(int layer, const Latents& in,
                                                                         const Gathered& g, BufferId out,
                                                                         BufferId lse) {
  const Component part = Component::attention;
  const int64_t qd = c_.qk_dim(), vd = c_.v_dim(), heads = chunks_.heads * layout_.sequence.size;
  const int64_t o_bytes = es_ * n_ * heads * vd;
  std::vector<HeadChunk> all{project_chunk(layer, 0, in, g, {})};
  for (int64_t chunk = 0; chunk < chunks_.chunks; ++chunk) {
    const HeadChunk now = all.back();
    if (chunk + 1 < chunks_.chunks) all.push_back(project_chunk(layer, chunk + 1, in, g, now));
    const Operand home = columns(matrix(out, ct_, n_, c_.heads * vd), chunk * heads * vd, heads * vd);
    const Operand own =
        sequence_ == kNoGroup
            ? home
            : matrix(transient("attention_output", o_bytes, Holds::attention_activations, layer), ct_, t_,
                     chunks_.heads * vd);
    Does attend;
    attend.b = attention_shape(layer).window;
    b_.op(local(OpKind::attention_fwd, part, attention_shape(layer).shape(), attend, sequence_),
          {now.queries, own_keys(now.k, chunk, qd), own_keys(now.v, chunk, vd), starts(),
           bias(g, c_.sinks, Role::sinks, heads, chunk * heads)},
          {own, matrix(lse, Type::f32, t_, chunks_.heads, chunk * t_ * chunks_.heads)});
    if (sequence_ != kNoGroup)
      b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, o_bytes, o_bytes,
                   exchanging(Exchange::rows_to_columns)),
            {own}, {home});
  }
  return all;
}

// d_out: (N, H) gradient of the block's attention output; writes d_normed (N, H) and the layer's gradients.
// The output is exchanged once more beside its gradient: keeping both layouts of it would cost N x heads x v
// more a layer.
void NativeLowering::attention_backward(int layer, const Checkpoint& saved, const Latents& in,
                                        const Gathered& g, BufferId d_out, BufferId d_normed, BufferId dw) {
  const Component part = Component::attention;
  const BufferId out = saved.attention, lse = saved.lse;
  const int64_t h = c_.hidden, qd = c_.qk_dim(), vd = c_.v_dim(), d = layout_.sequence.size;
  const int64_t heads = chunks_.heads * d, all_heads = c_.heads * vd;
  const double es = static_cast<double>(es_);
  const bool q_lora = mla() && c_.q_lora_rank > 0;
  const int64_t q_width = q_lora ? c_.q_lora_rank : h;
  const auto own = [&](const char* label, int64_t rows, int64_t cols) {
    return matrix(transient(label, es_ * rows * cols, Holds::attention_activations, layer), ct_, rows, cols);
  };
  const Operand gradient_rows = matrix(d_out, ct_, n_, h), d_x = matrix(d_normed, ct_, n_, h);
  const Operand normed = matrix(in.normed, ct_, n_, h);
  const Operand d_o_weight = gradient(dw, layer, Role::o, h, all_heads);
  gemm(part, gradient_rows, true, matrix(out, ct_, n_, all_heads), false, d_o_weight, again(d_o_weight));
  if (c_.out_bias) column_sum(part, gradient_rows, gradient(dw, layer, Role::o_bias, 1, h));

  Operand d_q_latent, d_kv_latent;
  const int64_t kv_rank = c_.kv_lora_rank, kv_latent = kv_rank + c_.qk_rope_dim;
  if (q_lora) d_q_latent = own("q_latent_gradient", n_, q_width);
  if (mla()) d_kv_latent = own("kv_latent_gradient", latent() ? t_ : n_, kv_latent);
  if (latent() && sequence_ != kNoGroup) {
    // Every rank adds its own heads' rows only.
    const Operand all = gradient(dw, layer, Role::kv_b, c_.heads * (c_.qk_nope_dim + vd), kv_rank);
    if (!again(all)) clear(part, all);
  }

  const Does home_to_rows = exchanging(Exchange::columns_to_rows),
             rows_to_home = exchanging(Exchange::rows_to_columns);
  Does unrotate;
  unrotate.a = qd;
  unrotate.b = mla() ? c_.qk_nope_dim : 0;
  unrotate.c = c_.rotary_dim();
  const auto rope_back = [&](const Operand& dy, const Operand& raw, Role norm) {
    Does does = unrotate;
    Operand w, dw_norm;
    const int64_t width = norm_columns(norm);
    if (width > 0) {
      w = weight(g, norm, 1, width);
      dw_norm = gradient(dw, layer, norm, 1, width);
      does.accumulate = again(dw_norm);
    }
    // A norm needs what entered it, too.
    b_.op(local(OpKind::rope_bwd, part, rope_shape(dy.view.elements(), width, width > 0 ? 2 : 1), does),
          {dy, positions(), width > 0 ? raw : Operand{}, w}, {dy, dw_norm});
  };

  HeadChunk now;
  Operand d_k, d_v;  // gradients of keys and values, which several chunks may share
  for (int64_t chunk = 0; chunk < chunks_.chunks; ++chunk) {
    const int64_t o_bytes = es_ * n_ * heads * vd, q_bytes = es_ * n_ * heads * qd;
    Operand d_o = own("attention_output_gradient", n_, heads * vd);
    gemm(part, gradient_rows, false,
         columns(weight(g, Role::o, h, all_heads), chunk * heads * vd, heads * vd), false, d_o);
    Operand o = columns(matrix(out, ct_, n_, all_heads), chunk * heads * vd, heads * vd);
    if (sequence_ != kNoGroup) {
      const Operand o_rows = own("attention_output_exchanged", t_, chunks_.heads * vd),
                    d_o_rows = own("attention_output_gradient_exchanged", t_, chunks_.heads * vd);
      b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, 2 * o_bytes, 2 * o_bytes,
                   home_to_rows),
            {o, d_o}, {o_rows, d_o_rows});
      o = o_rows;
      d_o = d_o_rows;
    }
    b_.at(Phase::recompute, layer);
    const HeadChunk* const kept = saved.heads.empty() ? nullptr : &saved.heads[static_cast<size_t>(chunk)];
    now = keeps(layer) == Keeps::all ? *kept : project_chunk(layer, chunk, in, g, now, kept);
    b_.at(Phase::backward, layer);

    const bool fresh = chunk < chunks_.kv_chunks;  // this chunk brought keys and values
    const int64_t kv_heads = chunks_.kv_heads;
    Operand d_q = own("queries_gradient", t_, chunks_.heads * qd);
    if (fresh) {
      if (sequence_ == kNoGroup && !mla()) {  // side by side, as they were projected
        const Operand both = own("keys_values_gradient", n_, kv_heads * (qd + vd));
        d_k = columns(both, 0, kv_heads * qd);
        d_v = columns(both, kv_heads * qd, kv_heads * vd);
      } else {
        const Operand both = own("keys_values_gradient", t_, kv_heads * (qd + vd));
        d_k = matrix(both.buffer, ct_, t_, kv_heads * qd);
        d_v = matrix(both.buffer, ct_, t_, kv_heads * vd, t_ * kv_heads * qd);
      }
    }
    const Operand d_keys = own_keys(d_k, chunk, qd), d_values = own_keys(d_v, chunk, vd);
    const Operand d_sinks = c_.sinks ? gradient(dw, layer, Role::sinks, 1, heads, chunk * heads) : Operand{};
    Does attend;
    attend.accumulate = again(d_keys);
    attend.a = c_.sinks && again(d_sinks) ? 1 : 0;
    attend.b = attention_shape(layer).window;
    b_.op(local(OpKind::attention_bwd, part, attention_shape(layer).shape(), attend, sequence_),
          {now.queries, own_keys(now.k, chunk, qd), own_keys(now.v, chunk, vd), o, d_o,
           matrix(lse, Type::f32, t_, chunks_.heads, chunk * t_ * chunks_.heads), starts(),
           bias(g, c_.sinks, Role::sinks, heads, chunk * heads)},
          {d_q, d_keys, d_values, d_sinks});

    // Keys and values that all chunks share go back after the last one.
    const bool give_back = chunks_.kv_chunks == chunks_.chunks || chunk + 1 == chunks_.chunks;
    Operand d_k_home = d_k, d_v_home = d_v;
    const int64_t key_heads = mla() ? heads : c_.kv_heads / chunks_.kv_chunks;  // of own tokens
    if (sequence_ != kNoGroup) {
      const Operand d_q_home = own("queries_gradient_home", n_, heads * qd);
      if (give_back && !latent()) {
        const int64_t returned = kv_heads * d;  // key heads that come back, copies included
        const int64_t kv_bytes = es_ * n_ * returned * (qd + vd);
        const Operand both = own("keys_values_gradient_home", n_, returned * (qd + vd));
        d_k_home = columns(both, 0, returned * qd);
        d_v_home = columns(both, returned * qd, returned * vd);
        b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, q_bytes + kv_bytes,
                     q_bytes + kv_bytes, rows_to_home),
              {d_q, d_k, d_v}, {d_q_home, d_k_home, d_v_home});
        if (chunks_.kv_replicas > 1) {
          const Operand summed = own("keys_values_gradient_summed", n_, key_heads * (qd + vd));
          const auto fold = [&](const Operand& from, const Operand& to, int64_t width) {
            Does does;
            does.a = chunks_.kv_replicas;
            does.b = width;
            b_.op(local(OpKind::sum_replicas, part,
                        {{from.view.elements(), es_ * from.view.elements(), es_ * to.view.elements()}}, does),
                  {from}, {to});
            return to;
          };
          d_k_home = fold(d_k_home, columns(summed, 0, key_heads * qd), qd);
          d_v_home = fold(d_v_home, columns(summed, key_heads * qd, key_heads * vd), vd);
        }
      } else {
        b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, q_bytes, q_bytes, rows_to_home),
              {d_q}, {d_q_home});
      }
      d_q = d_q_home;
    }
    rope_back(d_q, now.q_raw, Role::q_norm);
    const int64_t q_first = chunk * heads * qd;
    const Role q_role = q_lora ? Role::q_b : Role::q;
    const Operand d_wq = gradient(dw, layer, q_role, heads * qd, q_width, q_first * q_width);
    const Operand d_from = q_lora ? d_q_latent : d_x;
    gemm(part, d_q, true, q_lora ? matrix(in.q, ct_, n_, q_width) : normed, false, d_wq, again(d_wq));
    if (c_.qkv_bias && !mla())
      column_sum(part, d_q, gradient(dw, layer, Role::q_bias, 1, heads * qd, q_first));
    gemm(part, d_q, false, weight(g, q_role, heads * qd, q_width, q_first * q_width), false, d_from,
         again(d_from));
    if (!give_back) continue;
    if (mla()) {
      const int64_t up = c_.qk_nope_dim + vd, tokens = latent() ? t_ : n_,
                    width = latent() ? chunks_.heads : heads;
      const Operand d_up = own("keys_values_up_gradient", tokens, width * up);
      const Operand d_rope = columns(d_kv_latent, kv_rank, c_.qk_rope_dim);
      Does does;
      does.a = c_.qk_nope_dim;
      does.b = vd;
      does.c = c_.qk_rope_dim;
      does.accumulate = again(d_rope);
      b_.op(local(OpKind::mla_keys_bwd, part, traffic(tokens * width * (qd + vd), es, es), does),
            {d_k_home, d_v_home}, {d_up, d_rope});
      const int64_t first = chunk * heads * up * kv_rank;
      Operand w = weight(g, Role::kv_b, width * up, kv_rank, first),
              d_w = gradient(dw, layer, Role::kv_b, width * up, kv_rank, first);
      if (latent()) w = by_rank(w, width * up * kv_rank), d_w = by_rank(d_w, width * up * kv_rank);
      const uint16_t index = latent() ? sequence_ : kNoGroup;
      const Operand latents =
                        columns(matrix(latent() ? in.kv_all : in.kv, ct_, tokens, kv_latent), 0, kv_rank),
                    d_latents = columns(d_kv_latent, 0, kv_rank);
      const bool cleared = latent() && sequence_ != kNoGroup;
      gemm(part, d_up, true, latents, false, d_w, again(d_w) || cleared, {}, index);
      gemm(part, d_up, false, w, false, d_latents, again(d_latents), {}, index);
    } else {
      const int64_t width = key_heads * (qd + vd), first = chunks_.kv_chunks == 1 ? 0 : chunk * width;
      rope_back(d_k_home, now.k_raw, Role::k_norm);
      Operand both = d_k_home;  // with the values to its right
      both.view.cols = width;
      const Operand d_w = gradient(dw, layer, Role::k, width, h, first * h);
      gemm(part, both, true, normed, false, d_w, again(d_w));
      if (c_.qkv_bias) column_sum(part, both, gradient(dw, layer, Role::k_bias, 1, width, first));
      gemm(part, both, false, weight(g, Role::k, width, h, first * h), false, d_x, again(d_x));
    }
  }
  if (mla()) latent_backward(layer, in, g, d_q_latent.buffer, d_kv_latent.buffer, d_normed, dw);
}

void NativeLowering::latent_backward(int layer, const Latents& in, const Gathered& g, BufferId d_q_latent,
                                     BufferId d_kv_latent, BufferId d_normed, BufferId dw) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden, rank = c_.kv_lora_rank, rope = c_.qk_rope_dim, kv = rank + rope;
  const double es = static_cast<double>(es_);
  const Operand normed = matrix(in.normed, ct_, n_, h), d_x = matrix(d_normed, ct_, n_, h);
  Operand d_kv = matrix(d_kv_latent, ct_, latent() ? t_ : n_, kv);
  if (latent() && sequence_ != kNoGroup) {
    const Operand home =
        matrix(transient("kv_latent_gradient_home", es_ * n_ * kv, Holds::attention_activations, layer), ct_,
               n_, kv);
    b_.op(remote(OpKind::reduce_scatter, Stream::sequence, part, sequence_, es_ * t_ * kv), {d_kv}, {home});
    d_kv = home;
  }
  const auto norm_back = [&](const Operand& dy, const Operand& raw, Role role) {
    const Operand d_w = gradient(dw, layer, role, 1, dy.view.cols);
    Does does;
    does.accumulate = again(d_w);
    b_.op(local(OpKind::rms_norm_bwd, part, traffic(dy.view.elements(), 2 * es, es), does),
          {dy, raw, weight(g, role, 1, dy.view.cols), {}}, {dy, d_w});
  };
  const auto down = [&](const Operand& dy, Role role, Role bias_role) {
    const int64_t width = dy.view.cols;
    const Operand d_w = gradient(dw, layer, role, width, h);
    if (c_.qkv_bias) column_sum(part, dy, gradient(dw, layer, bias_role, 1, width));
    gemm(part, dy, true, normed, false, d_w, again(d_w));
    gemm(part, dy, false, weight(g, role, width, h), false, d_x, again(d_x));
  };
  Does unrotate;
  unrotate.a = unrotate.c = rope;
  b_.op(local(OpKind::rope_bwd, part, rope_shape(n_ * rope, 0), unrotate),
        {columns(d_kv, rank, rope), positions(), {}, {}}, {columns(d_kv, rank, rope), {}});
  norm_back(columns(d_kv, 0, rank), columns(matrix(in.kv_raw, ct_, n_, kv), 0, rank), Role::kv_a_norm);
  down(d_kv, Role::kv_a, Role::kv_a_bias);
  if (c_.q_lora_rank == 0) return;
  const Operand d_q = matrix(d_q_latent, ct_, n_, c_.q_lora_rank);
  norm_back(d_q, matrix(in.q_raw, ct_, n_, c_.q_lora_rank), Role::q_a_norm);
  down(d_q, Role::q_a, Role::q_a_bias);
}

}  // namespace mop::program
