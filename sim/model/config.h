// ModelConfig: the shapes and options of one Mixture-of-Experts transformer, read from a Hugging Face
// config.json. It knows nothing of parallelism. Symbols follow the MoP paper: L layers, H hidden, V
// vocabulary, E experts, k experts a token, I expert intermediate width. All widths and counts are in
// elements.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace mop::model {

enum class Attention : uint8_t { gqa, mla };  // grouped-query; multi-head latent
// RMSNorm of q and k: over each head (Qwen3), over the full width (OLMoE).
enum class QkNorm : uint8_t { none, per_head, full };
enum class Scoring : uint8_t { softmax, sigmoid };           // router score function
enum class Activation : uint8_t { swiglu, clamped_swiglu };  // clamped: gpt-oss, limit 7, alpha 1.702

struct RopeScaling {  // YaRN; factor 1 means none
  double factor = 1, beta_fast = 32, beta_slow = 1, mscale = 1, mscale_all_dim = 0;
  int64_t original_positions = 0;
  bool truncate = true;
};

struct ModelConfig {
  std::string name;        // folder or file name, "kimi-k2"
  std::string model_type;  // as in config.json, "kimi_k2"
  int64_t layers = 0, hidden = 0, vocab = 0, max_positions = 0;
  bool tied_head = false;
  double norm_eps = 0;

  Attention attention = Attention::gqa;
  int64_t heads = 0, kv_heads = 0;
  int64_t head_dim = 0;     // gqa: width of q, k and v a head
  int64_t q_lora_rank = 0;  // mla: 0 means a plain q projection
  int64_t kv_lora_rank = 0, qk_nope_dim = 0, qk_rope_dim = 0, v_head_dim = 0;  // mla
  // gqa: biases of q, k and v. mla: of the two down-projections from H (q_a, where there is one, and kv_a).
  bool qkv_bias = false;
  bool out_bias = false, sinks = false;  // sinks: one learned logit a head (gpt-oss)
  QkNorm qk_norm = QkNorm::none;
  double rope_theta = 0;
  double rotary_fraction = 1;  // gqa: share of head_dim that is rotated; mla rotates qk_rope_dim, all of it
  RopeScaling rope;
  std::vector<int64_t> window;  // (L) tokens seen by a layer's sliding attention, 0 = full

  std::vector<bool> moe;  // (L) false: a dense feed-forward layer of width dense_intermediate
  int64_t dense_intermediate = 0;
  int64_t experts = 0, top_k = 0, expert_intermediate = 0;
  int64_t shared_experts = 0;
  int64_t shared_intermediate = 0;  // of all shared experts together, 0 = none
  bool expert_bias = false, router_bias = false;
  bool correction_bias = false;  // sigmoid routers' e_score_correction_bias: E fp32 values a layer
  Scoring scoring = Scoring::softmax;
  bool softmax_after_topk = false;  // gpt-oss: softmax over the top-k logits, so they sum to 1 already
  bool normalise_topk = false;      // divide the k weights by their sum
  double routed_scale = 1;
  // A token's experts come from the best router_top_groups of the groups, each E / router_groups experts.
  int64_t router_groups = 1, router_top_groups = 1;
  Activation activation = Activation::swiglu;
  double swiglu_limit = 0, swiglu_alpha = 1;
  double aux_loss_coefficient = 0;  // of the load-balancing loss; 0 = none

  // Widths of one head: q and k (nope + rope for mla), v.
  int64_t qk_dim() const { return attention == Attention::mla ? qk_nope_dim + qk_rope_dim : head_dim; }
  int64_t v_dim() const { return attention == Attention::mla ? v_head_dim : head_dim; }
  int64_t rotary_dim() const {  // elements of q and k that are rotated
    return attention == Attention::mla
               ? qk_rope_dim
               : static_cast<int64_t>(static_cast<double>(head_dim) * rotary_fraction);
  }
  int64_t moe_layers() const;
};

// Reads `where`: a config.json, a folder that holds one, or a short name of scenarios/models; what exists on
// disk wins over a short name. Errors: UserError that names the file and the field (missing, of the wrong
// type, out of range), or, for an unknown short name or model_type, the nearest known one. Never crashes on
// garbage.
ModelConfig read_config(const std::string& where);

// The file that read_config reads, and its text. Errors: as its.
std::filesystem::path config_path(const std::string& where);
std::string config_text(const std::string& where);

// The same from text; `name` becomes the model's and appears in errors.
ModelConfig parse_config(const std::string& json_text, const std::string& name);

// Names of the shipped models, sorted.
std::vector<std::string> shipped_models();

}  // namespace mop::model
