// Cross entropy over a block of the vocabulary's columns. Statistics of a row: (maximum, sum of exp(logit -
// maximum), the target's logit), fp32; those of blocks merge into those of the whole.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/matrix.h"

namespace mop::kernels {

inline constexpr int32_t kNoTarget = -100;

// Row r's target is targets[r / cols x ld + r % cols].
struct Targets {
  const int32_t* data = nullptr;
  int64_t cols = 0, ld = 0;
};

// Columns of the logits are those from `first` on of the vocabulary; what is beyond the vocabulary is left
// out.
struct VocabularyBlock {
  int64_t first = 0, vocabulary = 0;
};

// logits(m, columns) -> statistics(m, 3), merged with what is there if accumulate. A target that is neither
// kNoTarget nor inside the vocabulary is reported: *invalid = the lowest such row, if that is below what is
// there.
struct CrossEntropyArgs {
  ConstMatrix logits;
  VocabularyBlock block;
  Targets targets;
  float* statistics = nullptr;
  bool accumulate = false;
  int32_t* invalid = nullptr;  // may be missing
};
void cross_entropy(const CrossEntropyArgs& args, cudaStream_t stream);

// logits become their gradient, (softmax - one-hot) / *valid, zero in rows without target and beyond the
// vocabulary. statistics (blocks, m, 3) are merged. *loss (+)= the losses of rows [loss_first, loss_last) /
// *valid, in fp64 and a fixed order; 0 if there are none.
struct CrossEntropyBwdArgs {
  Matrix logits;
  VocabularyBlock block;
  Targets targets;
  const float* statistics = nullptr;
  int64_t blocks = 1;
  const double* valid = nullptr;
  double* loss = nullptr;  // may be missing
  int64_t loss_first = 0, loss_last = 0;
  bool accumulate = false;  // the loss
};
void cross_entropy_bwd(const CrossEntropyBwdArgs& args, cudaStream_t stream);

}  // namespace mop::kernels
