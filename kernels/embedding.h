// Input embedding.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/matrix.h"

namespace mop::kernels {

// ids (tokens), table(V, c) -> x(tokens, c), of one type. A token at or beyond `vocabulary` (or below 0)
// gives zeros and is reported: *invalid = the lowest such position, if that is below what is there.
struct EmbeddingArgs {
  const int32_t* ids = nullptr;
  int64_t vocabulary = 0;
  ConstMatrix table;
  Matrix x;
  int32_t* invalid = nullptr;
};
void embedding(const EmbeddingArgs& args, cudaStream_t stream);

// d_table(V, c)[ids[i]] += dx(i) in fp32, rounded once a row; without accumulate d_table is cleared first.
// ids are valid. The order of the sums is fixed.
struct EmbeddingBwdArgs {
  const int32_t* ids = nullptr;
  ConstMatrix dx;
  Matrix d_table;
  bool accumulate = false;
  void* scratch = nullptr;  // embedding_bwd_scratch bytes, on a 256-byte boundary
};
void embedding_bwd(const EmbeddingBwdArgs& args, cudaStream_t stream);
int64_t embedding_bwd_scratch(int64_t tokens, int64_t cols);

}  // namespace mop::kernels
