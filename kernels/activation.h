// Gated activations of feed-forwards: act = f(gate, up), the gate to the left of up.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/matrix.h"

namespace mop::kernels {

// Gate x sigmoid(gate) x up; or, clamped, with gate' = min(gate, limit) and up' = up within [-limit, limit],
// (up' + 1) x gate' x sigmoid(alpha x gate').
struct Activation {
  bool clamped = false;
  float limit = 0, alpha = 1;
};

// gate_up(r, 2 i) -> act(r, i), of one type
struct SwigluArgs {
  ConstMatrix gate_up;
  Matrix act;
  Activation activation;
};
void swiglu(const SwigluArgs& args, cudaStream_t stream);

// gate_up(r, 2 i), d_act(r, i) -> d_gate_up(r, 2 i), of one type; d_gate_up may be gate_up
struct SwigluBwdArgs {
  ConstMatrix gate_up, d_act;
  Matrix d_gate_up;
  Activation activation;
};
void swiglu_bwd(const SwigluBwdArgs& args, cudaStream_t stream);

// The same for rows of experts, where d_act is the gradient before the gate weights (r), fp32:
//   d_weights[j] = act[j] . d_act[j] + bias . dy[j];  then weighted[j] = weights[j] act[j], and d_gate_up
//   from weights[j] d_act[j].
// weighted may be act. dy(r, h) and the experts' biases (h), all of one type, are needed only if there are
// biases: then biases[e] is that of rows experts[e], at most kMostExperts of them, in host memory.
struct RoutedSwigluBwdArgs {
  ConstMatrix gate_up, d_act, act, dy;
  const float* weights = nullptr;
  Matrix d_gate_up, weighted;
  float* d_weights = nullptr;
  Activation activation;
  const ExpertRows* experts = nullptr;
  const void* const* biases = nullptr;
  int bias_count = 0;
};
void routed_swiglu_bwd(const RoutedSwigluBwdArgs& args, cudaStream_t stream);

}  // namespace mop::kernels
