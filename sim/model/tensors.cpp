#include "sim/model/tensors.h"

#include <fmt/format.h>

#include <array>

#include "sim/base/error.h"

namespace mop::model {
namespace {

struct RoleFacts {
  const char* name;
  Kind kind;
};

// In the order of Role.
constexpr std::array kRoles{
    RoleFacts{"embedding", Kind::matrix},
    RoleFacts{"head", Kind::matrix},
    RoleFacts{"final_norm", Kind::norm},
    RoleFacts{"attention_norm", Kind::norm},
    RoleFacts{"q", Kind::matrix},
    RoleFacts{"k", Kind::matrix},
    RoleFacts{"v", Kind::matrix},
    RoleFacts{"o", Kind::matrix},
    RoleFacts{"q_bias", Kind::bias},
    RoleFacts{"k_bias", Kind::bias},
    RoleFacts{"v_bias", Kind::bias},
    RoleFacts{"o_bias", Kind::bias},
    RoleFacts{"q_norm", Kind::norm},
    RoleFacts{"k_norm", Kind::norm},
    RoleFacts{"sinks", Kind::bias},
    RoleFacts{"q_a", Kind::matrix},
    RoleFacts{"q_a_bias", Kind::bias},
    RoleFacts{"q_a_norm", Kind::norm},
    RoleFacts{"q_b", Kind::matrix},
    RoleFacts{"kv_a", Kind::matrix},
    RoleFacts{"kv_a_bias", Kind::bias},
    RoleFacts{"kv_a_norm", Kind::norm},
    RoleFacts{"kv_b", Kind::matrix},
    RoleFacts{"feed_forward_norm", Kind::norm},
    RoleFacts{"router", Kind::matrix},
    RoleFacts{"router_bias", Kind::bias},
    RoleFacts{"correction_bias", Kind::bias},
    RoleFacts{"shared_gate", Kind::matrix},
    RoleFacts{"shared_up", Kind::matrix},
    RoleFacts{"shared_down", Kind::matrix},
    RoleFacts{"dense_gate", Kind::matrix},
    RoleFacts{"dense_up", Kind::matrix},
    RoleFacts{"dense_down", Kind::matrix},
    RoleFacts{"expert_gate", Kind::matrix},
    RoleFacts{"expert_up", Kind::matrix},
    RoleFacts{"expert_down", Kind::matrix},
    RoleFacts{"expert_gate_bias", Kind::bias},
    RoleFacts{"expert_up_bias", Kind::bias},
    RoleFacts{"expert_down_bias", Kind::bias},
};
static_assert(kRoles.size() == static_cast<size_t>(Role::expert_down_bias) + 1);

enum class Scope : uint8_t { model, layer, expert };

Scope scope(Role role) {
  if (role <= Role::final_norm) return Scope::model;
  return role < Role::expert_gate ? Scope::layer : Scope::expert;
}

void attention_roles(const ModelConfig& c, std::vector<Role>& roles) {
  if (c.attention == Attention::gqa) {
    roles.insert(roles.end(), {Role::q, Role::k, Role::v});
    if (c.qkv_bias) roles.insert(roles.end(), {Role::q_bias, Role::k_bias, Role::v_bias});
    if (c.qk_norm != QkNorm::none) roles.insert(roles.end(), {Role::q_norm, Role::k_norm});
  } else {
    if (c.q_lora_rank > 0) {
      roles.push_back(Role::q_a);
      if (c.qkv_bias) roles.push_back(Role::q_a_bias);
      roles.insert(roles.end(), {Role::q_a_norm, Role::q_b});
    } else {
      roles.push_back(Role::q);
    }
    roles.push_back(Role::kv_a);
    if (c.qkv_bias) roles.push_back(Role::kv_a_bias);
    roles.insert(roles.end(), {Role::kv_a_norm, Role::kv_b});
  }
  if (c.sinks) roles.push_back(Role::sinks);
  roles.push_back(Role::o);
  if (c.out_bias) roles.push_back(Role::o_bias);
}

void feed_forward_roles(const ModelConfig& c, size_t layer, std::vector<Role>& roles) {
  if (!c.moe[layer]) {
    roles.insert(roles.end(), {Role::dense_gate, Role::dense_up, Role::dense_down});
    return;
  }
  roles.push_back(Role::router);
  if (c.router_bias) roles.push_back(Role::router_bias);
  if (c.correction_bias) roles.push_back(Role::correction_bias);
  if (c.shared_intermediate > 0)
    roles.insert(roles.end(), {Role::shared_gate, Role::shared_up, Role::shared_down});
}

bool is_gpt_oss(const ModelConfig& c) {
  return c.model_type == "gpt_oss";
}

// What follows "model.layers.<layer>." for a parameter that is a tensor of its own.
std::string layer_suffix(const ModelConfig& c, ParameterId id) {
  const bool mixtral = c.model_type == "mixtral";
  const char* const block = mixtral ? "block_sparse_moe" : "mlp";
  const auto expert = [&](const char* usual, const char* mixtral_name) {
    return fmt::format("{}.experts.{}.{}.weight", block, id.expert, mixtral ? mixtral_name : usual);
  };
  switch (id.role) {
    case Role::attention_norm:
      return "input_layernorm.weight";
    case Role::q:
      return "self_attn.q_proj.weight";
    case Role::k:
      return "self_attn.k_proj.weight";
    case Role::v:
      return "self_attn.v_proj.weight";
    case Role::o:
      return "self_attn.o_proj.weight";
    case Role::q_bias:
      return "self_attn.q_proj.bias";
    case Role::k_bias:
      return "self_attn.k_proj.bias";
    case Role::v_bias:
      return "self_attn.v_proj.bias";
    case Role::o_bias:
      return "self_attn.o_proj.bias";
    case Role::q_norm:
      return "self_attn.q_norm.weight";
    case Role::k_norm:
      return "self_attn.k_norm.weight";
    case Role::sinks:
      return "self_attn.sinks";
    case Role::q_a:
      return "self_attn.q_a_proj.weight";
    case Role::q_a_bias:
      return "self_attn.q_a_proj.bias";
    case Role::q_a_norm:
      return "self_attn.q_a_layernorm.weight";
    case Role::q_b:
      return "self_attn.q_b_proj.weight";
    case Role::kv_a:
      return "self_attn.kv_a_proj_with_mqa.weight";
    case Role::kv_a_bias:
      return "self_attn.kv_a_proj_with_mqa.bias";
    case Role::kv_a_norm:
      return "self_attn.kv_a_layernorm.weight";
    case Role::kv_b:
      return "self_attn.kv_b_proj.weight";
    case Role::feed_forward_norm:
      return "post_attention_layernorm.weight";
    case Role::router:
      return fmt::format("{}.{}.weight", block, is_gpt_oss(c) ? "router" : "gate");
    case Role::router_bias:
      return "mlp.router.bias";
    case Role::correction_bias:
      return "mlp.gate.e_score_correction_bias";
    case Role::shared_gate:
      return "mlp.shared_experts.gate_proj.weight";
    case Role::shared_up:
      return "mlp.shared_experts.up_proj.weight";
    case Role::shared_down:
      return "mlp.shared_experts.down_proj.weight";
    case Role::dense_gate:
      return "mlp.gate_proj.weight";
    case Role::dense_up:
      return "mlp.up_proj.weight";
    case Role::dense_down:
      return "mlp.down_proj.weight";
    case Role::expert_gate:
      return expert("gate_proj", "w1");
    case Role::expert_up:
      return expert("up_proj", "w3");
    case Role::expert_down:
      return expert("down_proj", "w2");
    default:
      break;
  }
  ensure(false, "the role has a tensor of its own");
  return {};
}

// gpt-oss: all experts of a layer in one tensor, as (E, in, out), the columns of gate and up taking turns.
Stored stored_fused(const ModelConfig& c, ParameterId id) {
  const int64_t h = c.hidden, i = c.expert_intermediate, e = id.expert;
  const std::string prefix = fmt::format("model.layers.{}.mlp.experts.", id.layer);
  switch (id.role) {
    case Role::expert_gate:
      return {prefix + "gate_up_proj", {c.experts, h, 2 * i}, e * h * 2 * i, 2, 2 * i};
    case Role::expert_up:
      return {prefix + "gate_up_proj", {c.experts, h, 2 * i}, e * h * 2 * i + 1, 2, 2 * i};
    case Role::expert_down:
      return {prefix + "down_proj", {c.experts, i, h}, e * i * h, 1, h};
    case Role::expert_gate_bias:
      return {prefix + "gate_up_proj_bias", {c.experts, 2 * i}, e * 2 * i, 0, 2};
    case Role::expert_up_bias:
      return {prefix + "gate_up_proj_bias", {c.experts, 2 * i}, e * 2 * i + 1, 0, 2};
    case Role::expert_down_bias:
      return {prefix + "down_proj_bias", {c.experts, h}, e * h, 0, 1};
    default:
      break;
  }
  ensure(false, "an expert's role");
  return {};
}

void check(const ModelConfig& c, ParameterId id) {
  const Scope where = scope(id.role);
  ensure(where == Scope::model ? id.layer == -1 : id.layer >= 0 && id.layer < c.layers,
         "a layer's parameter names a layer of the model, any other none");
  ensure(where == Scope::expert ? id.expert >= 0 && id.expert < c.experts : id.expert == -1,
         "an expert's parameter names an expert of the model, any other none");
}

}  // namespace

const char* name(Role role) {
  return kRoles[static_cast<size_t>(role)].name;
}

Kind kind(Role role) {
  return kRoles[static_cast<size_t>(role)].kind;
}

std::vector<ParameterId> parameters(const ModelConfig& c) {
  std::vector<ParameterId> ids{{Role::embedding}};
  for (int32_t layer = 0; layer < c.layers; ++layer) {
    std::vector<Role> roles{Role::attention_norm};
    attention_roles(c, roles);
    roles.push_back(Role::feed_forward_norm);
    feed_forward_roles(c, static_cast<size_t>(layer), roles);
    for (const Role role : roles) ids.push_back({role, layer});
    if (!c.moe[static_cast<size_t>(layer)]) continue;
    std::vector<Role> each{Role::expert_gate, Role::expert_up, Role::expert_down};
    if (c.expert_bias)
      each.insert(each.end(), {Role::expert_gate_bias, Role::expert_up_bias, Role::expert_down_bias});
    for (int32_t expert = 0; expert < c.experts; ++expert)
      for (const Role role : each) ids.push_back({role, layer, expert});
  }
  ids.push_back({Role::final_norm});
  if (!c.tied_head) ids.push_back({Role::head});
  return ids;
}

MatrixShape shape(const ModelConfig& c, ParameterId id) {
  check(c, id);
  const int64_t q = c.heads * c.qk_dim(), o = c.heads * c.v_dim();
  const int64_t k = c.kv_heads * c.head_dim;
  const bool per_head = c.qk_norm == QkNorm::per_head;
  switch (id.role) {
    case Role::embedding:
    case Role::head:
      return {c.vocab, c.hidden};
    case Role::final_norm:
    case Role::attention_norm:
    case Role::feed_forward_norm:
    case Role::o_bias:
    case Role::expert_down_bias:
      return {1, c.hidden};
    case Role::q:
      return {q, c.hidden};
    case Role::k:
    case Role::v:
      return {k, c.hidden};
    case Role::o:
      return {c.hidden, o};
    case Role::q_bias:
      return {1, q};
    case Role::k_bias:
    case Role::v_bias:
      return {1, k};
    case Role::q_norm:
      return {1, per_head ? c.head_dim : q};
    case Role::k_norm:
      return {1, per_head ? c.head_dim : k};
    case Role::sinks:
      return {1, c.heads};
    case Role::q_a:
      return {c.q_lora_rank, c.hidden};
    case Role::q_a_bias:
    case Role::q_a_norm:
      return {1, c.q_lora_rank};
    case Role::q_b:
      return {q, c.q_lora_rank};
    case Role::kv_a:
      return {c.kv_lora_rank + c.qk_rope_dim, c.hidden};
    case Role::kv_a_bias:
      return {1, c.kv_lora_rank + c.qk_rope_dim};
    case Role::kv_a_norm:
      return {1, c.kv_lora_rank};
    case Role::kv_b:
      return {c.heads * (c.qk_nope_dim + c.v_head_dim), c.kv_lora_rank};
    case Role::router:
      return {c.experts, c.hidden};
    case Role::router_bias:
    case Role::correction_bias:
      return {1, c.experts};
    case Role::shared_gate:
    case Role::shared_up:
      return {c.shared_intermediate, c.hidden};
    case Role::shared_down:
      return {c.hidden, c.shared_intermediate};
    case Role::dense_gate:
    case Role::dense_up:
      return {c.dense_intermediate, c.hidden};
    case Role::dense_down:
      return {c.hidden, c.dense_intermediate};
    case Role::expert_gate:
    case Role::expert_up:
      return {c.expert_intermediate, c.hidden};
    case Role::expert_down:
      return {c.hidden, c.expert_intermediate};
    case Role::expert_gate_bias:
    case Role::expert_up_bias:
      return {1, c.expert_intermediate};
  }
  ensure(false, "a known role");
  return {};
}

Stored stored(const ModelConfig& c, ParameterId id) {
  const MatrixShape matrix = shape(c, id);
  if (is_gpt_oss(c) && scope(id.role) == Scope::expert) return stored_fused(c, id);
  const bool shared = id.role >= Role::shared_gate && id.role <= Role::shared_down;
  if (shared && c.model_type == "qwen3_moe")
    throw UserError(
        fmt::format("{}: qwen3_moe checkpoints have no shared experts: leave n_shared_experts and "
                    "shared_expert_intermediate_size out of config.json",
                    c.name));
  Stored result;
  switch (id.role) {
    case Role::embedding:
      result.name = "model.embed_tokens.weight";
      break;
    case Role::head:
      result.name = "lm_head.weight";
      break;
    case Role::final_norm:
      result.name = "model.norm.weight";
      break;
    default:
      result.name = fmt::format("model.layers.{}.{}", id.layer, layer_suffix(c, id));
  }
  result.shape = {matrix.cols};
  if (kind(id.role) == Kind::matrix) result.shape.insert(result.shape.begin(), matrix.rows);
  result.row_stride = matrix.cols;
  return result;
}

}  // namespace mop::model
