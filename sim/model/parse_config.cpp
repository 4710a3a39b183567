// Maps the config.json of each model family to a ModelConfig.
//
// Which absent fields are errors: every size is (a class default of a size describes the one model that the
// class was written for), and every option is not: it takes the default of the family's configuration class
// in transformers 5.23 (models/<family>/configuration_<family>.py), or for kimi_k2, which has none there, of
// DeepseekV3Config.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <utility>

#include "sim/base/error.h"
#include "sim/base/suggest.h"
#include "sim/model/config.h"
#include "sim/model/counts.h"
#include "sim/model/fields.h"

namespace mop::model {
namespace {

// Limits far above any published model, yet a layer's parameters fit int64 with room to spare.
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHidden = int64_t{1} << 18;
constexpr int64_t kMaxIntermediate = int64_t{1} << 20;
constexpr int64_t kMaxHeads = int64_t{1} << 14;
constexpr int64_t kMaxHeadDim = int64_t{1} << 14;
constexpr int64_t kMaxExperts = int64_t{1} << 14;
constexpr int64_t kMaxVocab = int64_t{1} << 26;
constexpr int64_t kMaxPositions = int64_t{1} << 40;
// Of the whole model: 16 bytes of training state each still fit int64.
constexpr double kMaxParameters = 1e15;
constexpr double kTiny = 1e-12, kHuge = 1e12;

int64_t size(const Fields& f, Names names, int64_t high) {
  return f.count(names, 1, high);
}

std::string choice(const Fields& f, const char* name, const std::string& fallback,
                   const std::vector<std::string>& known) {
  const std::string value = f.word({name}, fallback);
  if (std::find(known.begin(), known.end(), value) == known.end())
    f.fail(name, fmt::format("is '{}': this family supports {}", value, fmt::join(known, ", ")));
  return value;
}

// An option that changes the arithmetic of a family and that nothing here models: refused, never ignored.
void refuse_if_set(const Fields& f, const char* name) {
  if (f.has({name})) f.fail(name, "is set: it is not supported; leave it out or null");
}

// Grouped-query attention: the heads. Biases and q/k norms are the family's.
void read_gqa(const Fields& f, ModelConfig& c) {
  c.heads = size(f, {"num_attention_heads"}, kMaxHeads);
  c.kv_heads = size(f, {"num_key_value_heads"}, kMaxHeads);
  if (c.heads % c.kv_heads != 0)
    f.fail(
        "num_attention_heads",
        fmt::format("is {}: it must be a multiple of num_key_value_heads, which is {}", c.heads, c.kv_heads));
  if (f.has({"head_dim"})) {
    c.head_dim = size(f, {"head_dim"}, kMaxHeadDim);
  } else {
    if (c.hidden % c.heads != 0)
      f.fail("head_dim",
             fmt::format("is missing, and hidden_size {} is not a multiple of num_attention_heads {}",
                         c.hidden, c.heads));
    c.head_dim = c.hidden / c.heads;
  }
}

// Multi-head latent attention (DeepSeek-V2, -V3, Kimi-K2).
void read_mla(const Fields& f, ModelConfig& c) {
  c.attention = Attention::mla;
  c.heads = size(f, {"num_attention_heads"}, kMaxHeads);
  c.kv_heads = f.count({"num_key_value_heads"}, 1, kMaxHeads, c.heads);
  if (c.kv_heads != c.heads)
    f.fail("num_key_value_heads",
           fmt::format("is {}: latent attention has as many as num_attention_heads, which is {}", c.kv_heads,
                       c.heads));
  // A null q_lora_rank is a plain q projection (V2-Lite); an absent one is a size left out.
  c.q_lora_rank = f.is_null("q_lora_rank") ? 0 : size(f, {"q_lora_rank"}, kMaxHidden);
  c.kv_lora_rank = size(f, {"kv_lora_rank"}, kMaxHidden);
  c.qk_nope_dim = size(f, {"qk_nope_head_dim"}, kMaxHeadDim);
  c.qk_rope_dim = size(f, {"qk_rope_head_dim"}, kMaxHeadDim);
  c.v_head_dim = size(f, {"v_head_dim"}, kMaxHeadDim);
  c.qkv_bias = c.out_bias = f.flag({"attention_bias"}, false);
}

// rope_theta and rope_scaling (transformers 4), or both inside rope_parameters (5).
void read_rope(const Fields& f, ModelConfig& c, double default_theta, double default_fraction,
               const RopeScaling& default_scaling) {
  const Fields parameters = f.object("rope_parameters");
  const bool both_thetas = f.has({"rope_theta"}) && parameters.has({"rope_theta"});
  const Fields& theta_owner = parameters.has({"rope_theta"}) ? parameters : f;
  c.rope_theta = theta_owner.number({"rope_theta"}, 1, kHuge, default_theta);
  if (both_thetas && f.number({"rope_theta"}, 1, kHuge) != c.rope_theta)
    f.fail("rope_theta", fmt::format("disagrees with rope_parameters.rope_theta, which is {}", c.rope_theta));

  const Fields& fraction_owner = parameters.has({"partial_rotary_factor"}) ? parameters : f;
  if (c.attention == Attention::gqa)
    c.rotary_fraction = fraction_owner.number({"partial_rotary_factor"}, kTiny, 1, default_fraction);
  const int64_t rotated = c.rotary_dim();
  if (rotated < 2 || rotated % 2 != 0) {
    f.fail(c.attention == Attention::mla ? "qk_rope_head_dim" : "head_dim",
           fmt::format("makes {} rotary dimensions a head: they come in pairs", rotated));
  }

  // A rope_parameters that names a type wins; rope_scaling null or absent leaves the family's default.
  const bool in_parameters = parameters.has({"rope_type", "type"});
  const Fields scaling = in_parameters ? parameters : f.object("rope_scaling");
  if (!in_parameters && !f.has({"rope_scaling"})) {
    c.rope = default_scaling;
    return;
  }
  const std::string type = scaling.word({"rope_type", "type"});
  if (type == "default") return;
  if (type != "yarn") scaling.fail("rope_type", fmt::format("is '{}': supported are default and yarn", type));
  refuse_if_set(scaling, "attention_factor");
  c.rope.factor = scaling.number({"factor"}, 1, 1e6);
  c.rope.beta_fast = scaling.number({"beta_fast"}, kTiny, kHuge, 32);
  c.rope.beta_slow = scaling.number({"beta_slow"}, kTiny, kHuge, 1);
  c.rope.mscale = scaling.number({"mscale"}, 0, 1e6, 1);
  c.rope.mscale_all_dim = scaling.number({"mscale_all_dim"}, 0, 1e6, 0);
  c.rope.original_positions =
      scaling.count({"original_max_position_embeddings"}, 1, kMaxPositions, c.max_positions);
  c.rope.truncate = scaling.flag({"truncate"}, true);
}

// The window of each layer, from layer_types where it is given and else from `sliding`, which says whether a
// layer slides by the family's default.
template <typename Sliding>
void read_windows(const Fields& f, ModelConfig& c, std::optional<int64_t> default_window, Sliding sliding) {
  const std::vector<std::string> types = f.words("layer_types");
  if (!types.empty() && static_cast<int64_t>(types.size()) != c.layers)
    f.fail("layer_types", fmt::format("has {} entries: num_hidden_layers is {}", types.size(), c.layers));
  c.window.assign(static_cast<size_t>(c.layers), 0);
  for (size_t layer = 0; layer < c.window.size(); ++layer) {
    if (!types.empty() && types[layer] != "sliding_attention" && types[layer] != "full_attention")
      f.fail("layer_types", fmt::format("has '{}' for layer {}: known are full_attention, sliding_attention",
                                        types[layer], layer));
    const bool slides = types.empty() ? sliding(layer) : types[layer] == "sliding_attention";
    if (!slides) continue;
    if (f.is_null("sliding_window"))
      f.fail("sliding_window", fmt::format("is null, but layer {} slides (layer_types)", layer));
    c.window[layer] = f.count({"sliding_window"}, 1, kMaxPositions, default_window);
  }
}

void all_full(const Fields& f, ModelConfig& c) {
  read_windows(f, c, {}, [](size_t) { return false; });
}

void read_experts(const Fields& f, ModelConfig& c, Names intermediate) {
  c.experts = size(f, {"num_experts", "num_local_experts", "n_routed_experts"}, kMaxExperts);
  c.top_k = size(f, {"num_experts_per_tok", "experts_per_token"}, kMaxExperts);
  if (c.top_k > c.experts)
    f.fail("num_experts_per_tok", fmt::format("is {}: there are only {} experts", c.top_k, c.experts));
  c.expert_intermediate = size(f, intermediate, kMaxIntermediate);
}

// n_shared_experts, each as wide as a routed one, or the width of all of them as
// shared_expert_intermediate_size.
void read_shared_experts(const Fields& f, ModelConfig& c, bool required) {
  constexpr int64_t kMaxShared = 1024;
  if (f.has({"shared_expert_intermediate_size"})) {
    c.shared_intermediate = f.count({"shared_expert_intermediate_size"}, 0, kMaxIntermediate);
    c.shared_experts = f.count({"n_shared_experts"}, 0, kMaxShared, c.shared_intermediate > 0 ? 1 : 0);
    if ((c.shared_experts == 0) != (c.shared_intermediate == 0))
      f.fail("n_shared_experts", fmt::format("is {}, but shared_expert_intermediate_size is {}",
                                             c.shared_experts, c.shared_intermediate));
    return;
  }
  if (!required || f.is_null("n_shared_experts")) {
    c.shared_experts = f.count({"n_shared_experts"}, 0, kMaxShared, 0);
  } else {
    c.shared_experts = f.count({"n_shared_experts"}, 0, kMaxShared);
  }
  c.shared_intermediate = c.shared_experts * c.expert_intermediate;
  if (c.shared_intermediate > kMaxIntermediate)
    f.fail("n_shared_experts", fmt::format("is {}: together they are {} wide and the limit is {}",
                                           c.shared_experts, c.shared_intermediate, kMaxIntermediate));
}

// Which layers are mixtures of experts, and the width of those that are not.
template <typename IsMoe>
void read_layers(const Fields& f, ModelConfig& c, const char* chosen_by, IsMoe is_moe) {
  c.moe.resize(static_cast<size_t>(c.layers));
  for (int64_t layer = 0; layer < c.layers; ++layer) c.moe[static_cast<size_t>(layer)] = is_moe(layer);
  if (c.moe_layers() == 0) f.fail(chosen_by, "leaves no layer with experts: this is a dense model");
  if (c.moe_layers() < c.layers) c.dense_intermediate = size(f, {"intermediate_size"}, kMaxIntermediate);
}

void all_moe(const Fields& f, ModelConfig& c) {
  read_layers(f, c, "num_hidden_layers", [](int64_t) { return true; });
}

// The first k layers are dense; then every moe_layer_freq-th by index is a mixture (DeepSeek's own code;
// always 1 so far).
void read_first_dense(const Fields& f, ModelConfig& c) {
  const int64_t first = f.count({"first_k_dense_replace"}, 0, c.layers);
  const int64_t step = f.count({"moe_layer_freq"}, 1, kMaxLayers, 1);
  read_layers(f, c, "first_k_dense_replace",
              [&](int64_t layer) { return layer >= first && layer % step == 0; });
}

void read_mlp_only(const Fields& f, ModelConfig& c) {
  const int64_t step = f.count({"decoder_sparse_step"}, 1, kMaxLayers, 1);
  std::vector<bool> dense(static_cast<size_t>(c.layers), false);
  for (const int64_t layer : f.counts("mlp_only_layers", 0, c.layers - 1))
    dense[static_cast<size_t>(layer)] = true;
  read_layers(f, c, "mlp_only_layers",
              [&](int64_t layer) { return !dense[static_cast<size_t>(layer)] && (layer + 1) % step == 0; });
}

// Group-limited routing. A group's score is its best expert (V2) or the sum of its best two (V3), so
// `smallest` is the fewest experts a group can hold.
void read_groups(const Fields& f, ModelConfig& c, int64_t groups, int64_t top_groups, int64_t smallest) {
  c.router_groups = f.count({"n_group"}, 1, c.experts, groups);
  c.router_top_groups = f.count({"topk_group"}, 1, c.router_groups, top_groups);
  const int64_t group = c.experts / c.router_groups;
  if (c.experts % c.router_groups != 0 || (c.router_groups > 1 && group < smallest))
    f.fail("n_group", fmt::format("is {}: {} experts do not make that many equal groups of at least {}",
                                  c.router_groups, c.experts, smallest));
  if (c.top_k > c.router_top_groups * group)
    f.fail("topk_group", fmt::format("is {}: those groups hold {} experts and num_experts_per_tok is {}",
                                     c.router_top_groups, c.router_top_groups * group, c.top_k));
}

// Sigmoid scores, chosen with a bias that is corrected towards balance (DeepSeek-V3, Kimi-K2, GLM-4.5).
void read_sigmoid_router(const Fields& f, ModelConfig& c, int64_t groups, int64_t top_groups, double scale) {
  choice(f, "scoring_func", "sigmoid", {"sigmoid"});
  choice(f, "topk_method", "noaux_tc", {"noaux_tc"});
  c.scoring = Scoring::sigmoid;
  c.correction_bias = true;
  read_groups(f, c, groups, top_groups, 2);
  c.normalise_topk = f.flag({"norm_topk_prob"}, true);
  c.routed_scale = f.number({"routed_scaling_factor"}, kTiny, 1e6, scale);
}

// Absent means no loss for the families that balance by a bias; DeepSeek writes it as aux_loss_alpha.
void read_aux_loss(const Fields& f, ModelConfig& c, double fallback) {
  c.aux_loss_coefficient = f.number({"router_aux_loss_coef", "aux_loss_alpha"}, 0, 1e3, fallback);
}

void read_gpt_oss(const Fields& f, ModelConfig& c) {
  c.norm_eps = f.number({"rms_norm_eps"}, kTiny, 1, 1e-5);
  read_gqa(f, c);
  // The class default of head_dim is 64, while the rule elsewhere gives hidden / heads = 45: do not guess.
  if (!f.has({"head_dim"})) f.fail("head_dim", "is missing");
  c.qkv_bias = c.out_bias = f.flag({"attention_bias"}, true);
  c.sinks = true;
  RopeScaling yarn;
  yarn.factor = 32;
  yarn.original_positions = 4096;
  yarn.truncate = false;
  read_rope(f, c, 150000, 1, yarn);
  read_windows(f, c, 128, [](size_t layer) { return layer % 2 == 0; });
  read_experts(f, c, {"intermediate_size"});
  all_moe(f, c);
  c.expert_bias = c.router_bias = true;
  c.softmax_after_topk = true;
  c.activation = Activation::clamped_swiglu;
  c.swiglu_limit = f.number({"swiglu_limit"}, kTiny, 1e6, 7);
  c.swiglu_alpha = f.number({"swiglu_alpha"}, kTiny, 1e6, 1.702);
  read_aux_loss(f, c, 0.001);
}

void read_qwen3_moe(const Fields& f, ModelConfig& c) {
  c.norm_eps = f.number({"rms_norm_eps"}, kTiny, 1, 1e-6);
  read_gqa(f, c);
  c.qkv_bias = c.out_bias = f.flag({"attention_bias"}, false);
  c.qk_norm = QkNorm::per_head;
  read_rope(f, c, 10000, 1, {});
  const bool sliding = f.flag({"use_sliding_window"}, false);
  read_windows(f, c, 4096, [&](size_t) { return sliding; });
  read_experts(f, c, {"moe_intermediate_size"});
  read_shared_experts(f, c, /*required=*/false);
  read_mlp_only(f, c);
  c.normalise_topk = f.flag({"norm_topk_prob"}, false);
  read_aux_loss(f, c, 0.001);
}

void read_mixtral(const Fields& f, ModelConfig& c) {
  c.norm_eps = f.number({"rms_norm_eps"}, kTiny, 1, 1e-5);
  read_gqa(f, c);
  read_rope(f, c, 1e6, 1, {});
  const bool sliding = f.has({"sliding_window"});
  read_windows(f, c, {}, [&](size_t) { return sliding; });
  read_experts(f, c, {"intermediate_size"});
  all_moe(f, c);
  c.normalise_topk = true;
  read_aux_loss(f, c, 0.001);
}

void read_olmoe(const Fields& f, ModelConfig& c) {
  c.norm_eps = f.number({"rms_norm_eps"}, kTiny, 1, 1e-5);
  read_gqa(f, c);
  c.qkv_bias = c.out_bias = f.flag({"attention_bias"}, false);
  c.qk_norm = QkNorm::full;
  refuse_if_set(f, "clip_qkv");
  read_rope(f, c, 10000, 1, {});
  all_full(f, c);
  read_experts(f, c, {"intermediate_size"});
  all_moe(f, c);
  c.normalise_topk = f.flag({"norm_topk_prob"}, false);
  read_aux_loss(f, c, 0.01);
}

void read_deepseek_v3(const Fields& f, ModelConfig& c) {  // and kimi_k2
  c.norm_eps = f.number({"rms_norm_eps"}, kTiny, 1, 1e-6);
  read_mla(f, c);
  read_rope(f, c, 10000, 1, {});
  all_full(f, c);
  read_experts(f, c, {"moe_intermediate_size"});
  read_shared_experts(f, c, /*required=*/true);
  read_first_dense(f, c);
  read_sigmoid_router(f, c, 8, 4, 2.5);
  read_aux_loss(f, c, 0);
}

void read_deepseek_v2(const Fields& f, ModelConfig& c) {
  c.norm_eps = f.number({"rms_norm_eps"}, kTiny, 1, 1e-6);
  read_mla(f, c);
  if (f.flag({"mlp_bias"}, false)) f.fail("mlp_bias", "is true: it is not supported");
  read_rope(f, c, 10000, 1, {});
  all_full(f, c);
  read_experts(f, c, {"moe_intermediate_size"});
  read_shared_experts(f, c, /*required=*/true);
  read_first_dense(f, c);
  choice(f, "scoring_func", "softmax", {"softmax"});
  if (choice(f, "topk_method", "greedy", {"greedy", "group_limited_greedy"}) == "group_limited_greedy") {
    if (!f.has({"n_group"}) || !f.has({"topk_group"}))
      f.fail(f.has({"n_group"}) ? "topk_group" : "n_group", "is missing: group_limited_greedy needs it");
    read_groups(f, c, 1, 1, 1);
  }
  c.normalise_topk = f.flag({"norm_topk_prob"}, false);
  c.routed_scale = f.number({"routed_scaling_factor"}, kTiny, 1e6, 1);
  read_aux_loss(f, c, 0);
}

void read_glm4_moe(const Fields& f, ModelConfig& c) {
  c.norm_eps = f.number({"rms_norm_eps"}, kTiny, 1, 1e-5);
  read_gqa(f, c);
  c.qkv_bias = f.flag({"attention_bias"}, false);  // never on the output projection
  c.qk_norm = f.flag({"use_qk_norm"}, false) ? QkNorm::per_head : QkNorm::none;
  read_rope(f, c, 10000, 0.5, {});
  all_full(f, c);
  read_experts(f, c, {"moe_intermediate_size"});
  read_shared_experts(f, c, /*required=*/true);
  read_first_dense(f, c);
  read_sigmoid_router(f, c, 1, 1, 1);
  read_aux_loss(f, c, 0);
}

struct Family {
  const char* model_type;
  void (*read)(const Fields&, ModelConfig&);
};

constexpr std::array kFamilies{
    Family{"deepseek_v2", read_deepseek_v2},
    Family{"deepseek_v3", read_deepseek_v3},
    Family{"glm4_moe", read_glm4_moe},
    Family{"gpt_oss", read_gpt_oss},
    Family{"kimi_k2", read_deepseek_v3},
    Family{"mixtral", read_mixtral},
    Family{"olmoe", read_olmoe},
    Family{"qwen3_moe", read_qwen3_moe},
};

}  // namespace

ModelConfig parse_config(const std::string& json_text, const std::string& name) {
  const Fields f(json_text, name);
  ModelConfig c;
  c.name = name;
  c.model_type = f.word({"model_type"});
  const auto* family = std::find_if(kFamilies.begin(), kFamilies.end(),
                                    [&](const Family& known) { return c.model_type == known.model_type; });
  if (family == kFamilies.end()) {
    std::vector<std::string> known;
    for (const Family& each : kFamilies) known.emplace_back(each.model_type);
    throw UserError(fmt::format("{}: {}", name, unknown_name("model_type", c.model_type, known)));
  }

  c.layers = size(f, {"num_hidden_layers"}, kMaxLayers);
  c.hidden = size(f, {"hidden_size"}, kMaxHidden);
  c.vocab = size(f, {"vocab_size"}, kMaxVocab);
  c.max_positions = size(f, {"max_position_embeddings"}, kMaxPositions);
  c.tied_head = f.flag({"tie_word_embeddings"}, false);
  choice(f, "hidden_act", "silu", {"silu"});
  family->read(f, c);

  double parameters = 2.0 * static_cast<double>(c.vocab) * static_cast<double>(c.hidden);
  for (int64_t layer = 0; layer < c.layers; ++layer)
    parameters += static_cast<double>(count_layer(c, layer).total());
  if (parameters > kMaxParameters)
    throw UserError(fmt::format("{}: the sizes make {:.3g} parameters; the limit is {:.0e}", name, parameters,
                                kMaxParameters));
  return c;
}

}  // namespace mop::model
