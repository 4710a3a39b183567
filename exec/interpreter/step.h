// What operations need to know of the step beside the program: the optimizer's settings and the data.
#pragma once
#include <cstdint>
#include <span>

namespace mop::interpreter {

// One AdamW update with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as
// torch.optim.AdamW: w *= 1 - learning_rate x weight_decay; then w -= learning_rate x m_hat / (sqrt(v_hat) +
// eps).
struct AdamW {
  int64_t step = 1;  // counts from 1: bias corrections
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
};

// A micro-batch as one rank sees it. Rows are tokens in the order of their sequences.
struct Batch {
  std::span<int32_t> ids, targets, positions;  // (t) of this rank; a target of -100 does not count
  std::span<int32_t> starts;  // (T) of its sequence group: the first row that each row's attention sees
};

class BatchSource {
 public:
  virtual ~BatchSource() = default;
  // Fills micro-batch `micro` of the current step. Allocates nothing. Called from one thread at a time.
  virtual void fill(int64_t micro, const Batch& batch) = 0;
};

struct Step {
  int64_t number = 0;   // from 0
  AdamW adam;           // of this step's update
  AdamW deferred;       // of the step before, which deferred operations finish
  double max_norm = 1;  // of clipping; infinity: none
  BatchSource* data = nullptr;
};

}  // namespace mop::interpreter
