#include "sim/program/program.h"

#include <fmt/format.h>

#include <algorithm>

#include "sim/base/error.h"

namespace mop::program {

const char* name(Stream stream) {
  static constexpr const char* kNames[] = {"compute", "gather", "dispatch", "combine", "sequence",
                                           "spill",   "h2d",    "d2h",      "host"};
  return kNames[static_cast<size_t>(stream)];
}

const char* name(Phase phase) {
  static constexpr const char* kNames[] = {"forward", "recompute", "backward", "optimizer"};
  return kNames[static_cast<size_t>(phase)];
}

const char* name(Component component) {
  static constexpr const char* kNames[] = {"embedding",      "attention",  "dense",     "router",  "experts",
                                           "shared_experts", "vocabulary", "optimizer", "weights", "other"};
  return kNames[static_cast<size_t>(component)];
}

const char* name(Holds holds) {
  static constexpr const char* kNames[] = {"weights",
                                           "gradients",
                                           "optimizer_states",
                                           "gathered_weights",
                                           "unsharded_gradients",
                                           "checkpoints",
                                           "attention_activations",
                                           "expert_activations",
                                           "expert_exchange",
                                           "spilled_experts",
                                           "vocabulary_activations",
                                           "other_activations",
                                           "staging"};
  return kNames[static_cast<size_t>(holds)];
}

const char* name(Type type) {
  static constexpr const char* kNames[] = {"bf16", "f32", "f64", "i32"};
  return kNames[static_cast<size_t>(type)];
}

int64_t size_of(Type type) {
  static constexpr int64_t kSizes[] = {2, 4, 8, 4};
  return kSizes[static_cast<size_t>(type)];
}

const char* name(OpKind kind) {
  static constexpr const char* kNames[] = {"gemm",           "grouped_gemm",
                                           "attention_fwd",  "attention_bwd",
                                           "rms_norm",       "rms_norm_bwd",
                                           "rope",           "rope_bwd",
                                           "mla_keys",       "mla_keys_bwd",
                                           "swiglu",         "swiglu_bwd",
                                           "clamped_swiglu", "clamped_swiglu_bwd",
                                           "expert_bias",    "expert_bias_bwd",
                                           "column_sum",     "add",
                                           "sum_replicas",   "cast",
                                           "copy",           "concatenate",
                                           "clear",          "topk",
                                           "topk_bwd",       "balance_loss",
                                           "sort",           "permute",
                                           "unpermute",      "unpermute_bwd",
                                           "embedding",      "embedding_bwd",
                                           "cross_entropy",  "cross_entropy_bwd",
                                           "scale_bwd",      "square_sum",
                                           "clip_factor",    "adam",
                                           "scale",          "all_gather",
                                           "reduce_scatter", "all_reduce",
                                           "all_to_all",     "send_recv",
                                           "copy_h2d",       "copy_d2h",
                                           "adam_host",      "norm_host",
                                           "scale_host",     "plan_routing",
                                           "next_batch"};
  static_assert(std::size(kNames) == static_cast<size_t>(OpKind::next_batch) + 1);
  return kNames[static_cast<size_t>(kind)];
}

bool is_collective(OpKind kind) {
  return kind >= OpKind::all_gather && kind <= OpKind::send_recv;
}
bool is_pairwise(OpKind kind) {
  return kind == OpKind::all_to_all || kind == OpKind::send_recv;
}
bool is_memory_bound(OpKind kind) {
  return kind >= OpKind::rms_norm && kind <= OpKind::scale;
}

double AttentionShape::pairs() const {
  const auto q = static_cast<double>(q_len), kv = static_cast<double>(kv_len);
  if (causal == 0) return q * kv;
  // Query j of the last q positions sees min(window, before + j + 1) keys.
  const double before = kv - q;
  const double w = window <= 0 ? kv : std::min(static_cast<double>(window), kv);
  const double partial = std::clamp(w - before - 1, 0.0, q);  // queries that see fewer than w keys
  return partial * (before + 1) + partial * (partial - 1) / 2 + (q - partial) * w;
}

double flops(OpKind kind, const Shape& s) {
  const auto product = [&](int a, int b, int c) {
    return 2.0 * static_cast<double>(s.v[a]) * static_cast<double>(s.v[b]) * static_cast<double>(s.v[c]);
  };
  switch (kind) {
    case OpKind::gemm:
    case OpKind::grouped_gemm:
      return product(0, 1, 2);
    case OpKind::attention_fwd:
    case OpKind::attention_bwd: {
      const AttentionShape a = AttentionShape::of(s);
      const double forward = 2.0 * static_cast<double>(a.batch * a.heads * (a.qk_dim + a.v_dim)) * a.pairs();
      return kind == OpKind::attention_fwd ? forward : 2.5 * forward;
    }
    default:
      return 0;
  }
}

double hbm_bytes(OpKind kind, const Shape& s) {
  const auto v = [&](int i) { return static_cast<double>(s.v[i]); };
  switch (kind) {
    case OpKind::gemm:
      return 2 * (v(0) * v(2) + v(2) * v(1) + v(0) * v(1));
    case OpKind::grouped_gemm:
      return 2 * (v(0) * v(2) + std::max(v(3), v(4)) * v(2) * v(1) + v(0) * v(1));
    case OpKind::attention_fwd:
    case OpKind::attention_bwd: {
      const AttentionShape a = AttentionShape::of(s);
      const double q =
          static_cast<double>(a.batch * a.q_len * a.heads) * static_cast<double>(a.qk_dim + a.v_dim);
      const double kv =
          static_cast<double>(a.batch * a.kv_len * a.kv_heads) * static_cast<double>(a.qk_dim + a.v_dim);
      return kind == OpKind::attention_fwd ? 2 * (q + kv) : 4 * (q + kv);
    }
    case OpKind::all_gather:
    case OpKind::reduce_scatter:
    case OpKind::all_reduce:
    case OpKind::copy_h2d:
    case OpKind::copy_d2h:
      return v(0);
    case OpKind::all_to_all:
    case OpKind::send_recv:
      return v(0) + v(1);
    case OpKind::adam_host:
    case OpKind::norm_host:
    case OpKind::scale_host:
    case OpKind::plan_routing:
      return 0;
    case OpKind::next_batch:
      return v(0);
    default:
      return v(1) + v(2);
  }
}

std::string StepProgram::op_name(OpId id) const {
  const Op& op = ops[id];
  const std::string where = op.layer < 0 ? "" : fmt::format("L{} ", op.layer);
  return fmt::format("{}{} {} {}", where, name(op.phase), name(op.component), name(op.kind));
}

std::string StepProgram::buffer_name(BufferId id) const {
  const Buffer& buffer = buffers[id];
  return buffer.layer < 0 ? std::string(buffer.label) : fmt::format("{}[{}]", buffer.label, buffer.layer);
}

}  // namespace mop::program
