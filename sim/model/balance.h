// The load-balancing loss of softmax routers (Fedus et al., arXiv 2101.03961), as transformers adds it to the
// language model's: over the rows of logits of all MoE layers together,
//   coefficient x E x sum over experts of (copies sent to it / rows) x (mean of its softmax probability).
// `load` (2 E): copies of each expert, then the sums of its probabilities; `rows`: MoE layers x tokens.
#pragma once
#include <span>

#include "sim/model/config.h"

namespace mop::model {

double balance_loss(const ModelConfig& config, std::span<const double> load, double rows);

// Adds weight x d loss / d logits of one row to d_logits (E), from the row's softmax (E). The copies count as
// constants.
void add_balance_gradient(const ModelConfig& config, std::span<const double> load, double rows, double weight,
                          std::span<const double> probabilities, std::span<double> d_logits);

}  // namespace mop::model
