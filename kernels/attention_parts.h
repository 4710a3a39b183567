// What attention needs beside the library.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/matrix.h"

namespace mop::kernels {

// Where documents are: of `documents` entries, those beyond the last document are empty ones at the end.
struct DocumentTable {
  int64_t documents = 0;
  int32_t* lengths = nullptr;  // (documents): rows
  int32_t* begins = nullptr;   // (documents + 1): first rows
  int64_t* offsets = nullptr;  // (operands, documents + 1): begins x the operand's ld
};
inline constexpr int kMostOffsets = 16;
struct RowStrides {
  int64_t ld[kMostOffsets];
  int count;
};

// starts(t): the first row that each row sees. Begins that do not fit into the table are an error of the
// caller's: the rows behind them belong to the last document.
void find_documents(const int32_t* starts, int64_t t, const DocumentTable& table, const RowStrides& strides,
                    cudaStream_t stream);

// to(heads) fp32 = values [first, first + heads).
void take_sinks(const ConstMatrix& values, int64_t first, int64_t heads, float* to, cudaStream_t stream);

// d_sinks[first + h] (+)= - sum over rows of exp(sink_h - lse) o . do; the others are zeroed unless added to.
// lse is at [row / context x sequence_stride + row % context x row_stride + head x head_stride].
struct SinkGradient {
  const void *o, *d_o;  // (t, heads x v) bf16
  int64_t o_ld, do_ld;
  const float *lse, *sinks;  // sinks: (heads)
  int64_t t, heads, v_dim;
  int64_t context, sequence_stride, row_stride, head_stride;
  Matrix d_sinks;  // (1, n)
  int64_t first;
  bool add;
  float* partials;  // sink_partials(t, heads) floats
};
int64_t sink_partials(int64_t t, int64_t heads);
void sink_gradient(const SinkGradient& args, cudaStream_t stream);

}  // namespace mop::kernels
