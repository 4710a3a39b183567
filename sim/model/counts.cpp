#include "sim/model/counts.h"

#include <algorithm>

#include "sim/base/error.h"

namespace mop::model {
namespace {

// Weights of the attention projections of one layer, biases and norms aside: the part that does
// multiply-adds.
int64_t projection_weights(const ModelConfig& c) {
  if (c.attention == Attention::gqa)
    return c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads);  // q and o, k and v
  const int64_t q = c.q_lora_rank > 0 ? c.hidden * c.q_lora_rank + c.q_lora_rank * c.heads * c.qk_dim()
                                      : c.hidden * c.heads * c.qk_dim();
  // The rotary part of the keys is one vector shared by all heads, straight from the hidden state.
  const int64_t kv =
      c.hidden * (c.kv_lora_rank + c.qk_rope_dim) + c.kv_lora_rank * c.heads * (c.qk_nope_dim + c.v_head_dim);
  return q + kv + c.heads * c.v_head_dim * c.hidden;
}

int64_t attention_extras(const ModelConfig& c) {  // biases, sinks, and norms inside the attention
  int64_t extras = 0;
  if (c.attention == Attention::gqa) {
    if (c.qkv_bias) extras += c.head_dim * (c.heads + 2 * c.kv_heads);
    if (c.qk_norm == QkNorm::per_head) extras += 2 * c.head_dim;
    if (c.qk_norm == QkNorm::full) extras += c.head_dim * (c.heads + c.kv_heads);
  } else {
    if (c.qkv_bias) extras += c.q_lora_rank + c.kv_lora_rank + c.qk_rope_dim;
    extras += c.q_lora_rank + c.kv_lora_rank;  // RMSNorms of the latents
  }
  if (c.out_bias) extras += c.hidden;
  if (c.sinks) extras += c.heads;
  return extras;
}

// Gate, up and down of a gated feed-forward of width `intermediate`.
int64_t feed_forward(const ModelConfig& c, int64_t intermediate) {
  return 3 * c.hidden * intermediate;
}

}  // namespace

int64_t ModelConfig::moe_layers() const {
  return std::count(moe.begin(), moe.end(), true);
}

LayerParameters count_layer(const ModelConfig& c, int64_t layer) {
  ensure(layer >= 0 && layer < c.layers, "0 <= layer < layers");
  LayerParameters p;
  p.attention = projection_weights(c) + attention_extras(c);
  p.norms = 2 * c.hidden;
  if (!c.moe[static_cast<size_t>(layer)]) {
    p.dense_mlp = feed_forward(c, c.dense_intermediate);
    return p;
  }
  p.router = c.experts * (c.hidden + (c.router_bias ? 1 : 0) + (c.correction_bias ? 1 : 0));
  p.shared = feed_forward(c, c.shared_intermediate);
  p.expert = feed_forward(c, c.expert_intermediate);
  if (c.expert_bias) p.expert += 2 * c.expert_intermediate + c.hidden;
  p.experts = c.experts * p.expert;
  return p;
}

Parameters count_parameters(const ModelConfig& c) {
  Parameters p;
  p.embedding = c.vocab * c.hidden;
  p.head = c.tied_head ? 0 : p.embedding;
  p.final_norm = c.hidden;
  p.total = p.active = p.embedding + p.head + p.final_norm;
  for (int64_t layer = 0; layer < c.layers; ++layer) {
    const LayerParameters& l = p.layers.emplace_back(count_layer(c, layer));
    p.total += l.total();
    p.active += l.dense() + (c.moe[static_cast<size_t>(layer)] ? c.top_k * l.expert : 0);
  }
  p.active_without_embedding = c.tied_head ? p.active : p.active - p.embedding;
  return p;
}

double mean_keys(int64_t context, int64_t window) {
  ensure(context >= 1 && window >= 0, "context >= 1 and window >= 0");
  const double s = static_cast<double>(context), w = static_cast<double>(window);
  if (window == 0 || window >= context) return (s + 1) / 2;
  return (w * (w + 1) / 2 + (s - w) * w) /
         s;  // the first `window` queries see 1, 2, ... keys, the others `window`
}

Flops flops_per_token(const ModelConfig& c, int64_t context) {
  // A weight costs a token one multiply-add, 2 FLOPs, in the forward and twice that in the backward.
  const auto matmul = [](int64_t weights) { return 6.0 * static_cast<double>(weights); };
  const double moe_layers = static_cast<double>(c.moe_layers());
  const double layers = static_cast<double>(c.layers);
  Flops f;
  for (int64_t layer = 0; layer < c.layers; ++layer)
    f.attention += 6.0 * static_cast<double>(c.heads * (c.qk_dim() + c.v_dim())) *
                   mean_keys(context, c.window[static_cast<size_t>(layer)]);
  f.projections = layers * matmul(projection_weights(c));
  f.router = moe_layers * matmul(c.experts * c.hidden);
  f.experts = moe_layers * matmul(c.top_k * feed_forward(c, c.expert_intermediate));
  f.shared = moe_layers * matmul(feed_forward(c, c.shared_intermediate));
  f.dense_mlp = (layers - moe_layers) * matmul(feed_forward(c, c.dense_intermediate));
  f.head = matmul(c.vocab * c.hidden);
  return f;
}

}  // namespace mop::model
