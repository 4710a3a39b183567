// Parameters and FLOPs of a model by component. Closed forms over ModelConfig; nothing of parallelism.
#pragma once
#include <cstdint>
#include <vector>

#include "sim/model/config.h"

namespace mop::model {

// Parameters of one layer, in elements.
struct LayerParameters {
  int64_t attention = 0;  // projections, biases, sinks, q/k norms, latent norms
  int64_t norms = 0;      // the two block norms
  int64_t router = 0;     // weight, bias and correction bias (the checkpoint holds all); 0 on a dense layer
  int64_t shared = 0;     // shared experts
  int64_t dense_mlp = 0;  // dense layers' feed-forward
  int64_t expert = 0;     // one routed expert; 0 on a dense layer
  int64_t experts = 0;    // all routed experts: E x expert
  // The paper's Theta_dns of a layer.
  int64_t dense() const { return attention + norms + router + shared + dense_mlp; }
  int64_t total() const { return dense() + experts; }
};

LayerParameters count_layer(const ModelConfig& config, int64_t layer);

struct Parameters {
  std::vector<LayerParameters> layers;              // (L)
  int64_t embedding = 0, head = 0, final_norm = 0;  // head is 0 when tied
  int64_t total = 0;
  int64_t active = 0;                    // a token's: routed experts counted top_k/E
  int64_t active_without_embedding = 0;  // a tied head's matrix stays: it is the head
};

Parameters count_parameters(const ModelConfig& config);

// Model FLOPs a token, forward + backward (3 x forward), at `context` tokens: multiply-adds count 2, causal
// attention halved, true windows, input embedding excluded, recompute not counted (the numerator of MFU).
struct Flops {
  double attention = 0;    // scores and values
  double projections = 0;  // attention projections
  double router = 0, experts = 0, shared = 0, dense_mlp = 0, head = 0;
  double total() const { return attention + projections + router + experts + shared + dense_mlp + head; }
};
Flops flops_per_token(const ModelConfig& config, int64_t context);

// Mean number of keys that a query of a causal layer sees: (S+1)/2 when full, fewer with a window. The unit
// of attention work everywhere: forward FLOPs of a token are 2 x heads x (qk + v) x this. A window counts the
// query itself, as in transformers: window 128 is the token and the 127 before it. window 0 = full.
double mean_keys(int64_t context, int64_t window);

}  // namespace mop::model
