// Parameters of a model by role, and where each lies in a Hugging Face checkpoint (safetensors). Every
// parameter is a matrix (rows, cols), row-major in our terms: weights are (out, in), vectors (1, n).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "sim/model/config.h"

namespace mop::model {

enum class Role : uint8_t {
  embedding,  // (V, H)
  head,       // (V, H)
  final_norm,
  attention_norm,
  q,  // (heads x qk, H)
  k,  // (kv heads x qk, H)
  v,
  o,  // (H, heads x v)
  q_bias,
  k_bias,
  v_bias,
  o_bias,
  q_norm,  // (1, head_dim), or the full width
  k_norm,
  sinks,  // (1, heads)
  q_a,    // mla: (q_lora, H)
  q_a_bias,
  q_a_norm,
  q_b,   // (heads x qk, q_lora); without q_lora the role is q
  kv_a,  // (kv_lora + rope, H)
  kv_a_bias,
  kv_a_norm,
  kv_b,  // (heads x (nope + v), kv_lora)
  feed_forward_norm,
  router,           // (E, H)
  router_bias,      // (1, E)
  correction_bias,  // (1, E): not trained by gradients
  shared_gate,      // (shared width, H)
  shared_up,
  shared_down,  // (H, shared width)
  dense_gate,
  dense_up,
  dense_down,
  expert_gate,  // (I, H)
  expert_up,
  expert_down,  // (H, I)
  expert_gate_bias,
  expert_up_bias,
  expert_down_bias,
};
const char* name(Role role);

enum class Kind : uint8_t {
  matrix,
  norm,  // scale of an RMSNorm, 1 in a new model
  bias,  // 0 in a new model; sinks and the correction bias too
};
Kind kind(Role role);

struct ParameterId {
  Role role;
  int32_t layer = -1, expert = -1;  // -1: none
  auto operator<=>(const ParameterId&) const = default;
};

// Every parameter that the model has, layer by layer.
std::vector<ParameterId> parameters(const ModelConfig& config);

struct MatrixShape {
  int64_t rows, cols;
};
MatrixShape shape(const ModelConfig& config, ParameterId id);

// Element (r, c) of the parameter is element offset + r x row_stride + c x col_stride of the tensor `name`,
// which has `shape`. Experts that a family stores fused (gpt-oss: gate and up interleaved, transposed) share
// a tensor.
struct Stored {
  std::string name;
  std::vector<int64_t> shape;
  int64_t offset = 0, row_stride = 0, col_stride = 1;
};
// Errors: UserError for a model that its family's checkpoints cannot hold.
Stored stored(const ModelConfig& config, ParameterId id);

}  // namespace mop::model
