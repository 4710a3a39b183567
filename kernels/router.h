// Routers: which experts a token goes to, with what weight, the gradient of both, and the order of routed
// copies.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/matrix.h"

namespace mop::kernels {

inline constexpr int kMostRouterExperts = 512, kMostChoices = 32, kMostRouterGroups = 32;

// How scores become choices and weights; sim/model/config.h has the same options.
struct Router {
  int experts = 0, choices = 0;    // E, k
  bool sigmoid = false;            // scores: sigmoids of the logits, else their softmax
  bool softmax_after = false;      // weights: softmax of the chosen logits
  bool normalise = false;          // weights divided by their sum
  float scale = 1;                 // of the weights
  int groups = 1, top_groups = 1;  // choices come from the best groups; as good as their best expert, with
                                   // sigmoid scores as their two best together
};

// logits(n, E) fp32, [correction (E)] -> ids(n, k), weights(n, k), both contiguous; ties go to the lower
// index. load (2 E) (+)= copies of each expert, then sums of its probabilities (softmax over all experts), in
// a fixed order.
struct TopkArgs {
  Router router;
  const float* logits = nullptr;
  int64_t rows = 0, ld = 0;
  const float* correction = nullptr;
  int32_t* ids = nullptr;
  float* weights = nullptr;
  float* load = nullptr;  // may be missing
  bool accumulate = false;
  float* scratch = nullptr;  // topk_scratch bytes, with load only
};
void topk(const TopkArgs& args, cudaStream_t stream);
int64_t topk_scratch(int64_t rows, int experts);

// d_weights(n, k), ids, logits -> d_logits(n, E), bf16 or fp32. With load (2 E), of all ranks: adds the
// gradient of the balance loss, balance x probability x (copies of the expert - the token's mean of them).
struct TopkBwdArgs {
  Router router;
  const float* logits = nullptr;
  int64_t rows = 0, ld = 0;
  const int32_t* ids = nullptr;
  const float* d_weights = nullptr;
  const float* load = nullptr;
  float balance = 0;  // coefficient x E / rows of all MoE layers squared / micro-batches
  Matrix d_logits;
};
void topk_bwd(const TopkBwdArgs& args, cudaStream_t stream);

// sum (+)= balance x (copies . sums of probabilities)
struct BalanceLossArgs {
  const float* load = nullptr;
  int experts = 0;
  double balance = 0;  // as above; 0 on ranks that do not count it
  double* sum = nullptr;
  bool accumulate = false;
};
void balance_loss(const BalanceLossArgs& args, cudaStream_t stream);

// ids (copies) -> order (copies): indices of the copies by expert, then index; counts (E).
struct SortArgs {
  const int32_t* ids = nullptr;
  int64_t copies = 0;
  int experts = 0;
  int32_t *order = nullptr, *counts = nullptr;
  int32_t* scratch = nullptr;  // sort_scratch bytes
};
void sort(const SortArgs& args, cudaStream_t stream);
int64_t sort_scratch(int64_t copies, int experts);

}  // namespace mop::kernels
