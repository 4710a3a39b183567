// What launchers take: pointers to device memory with sizes and strides. Every launcher only puts work on the
// stream: it allocates nothing and waits for nothing. Errors: std::invalid_argument for sizes that a kernel
// does not take, CudaError for a launch that CUDA refuses. Types are bf16 or f32 unless a launcher says
// otherwise.
#pragma once
#include <cstdint>

#include "kernels/type.h"

namespace mop::kernels {

// Row-major (rows, cols), `ld` elements from row to row. Null data: a missing optional operand. Kernels are
// fastest where data is aligned to 16 bytes, and cols and ld are multiples of 8.
struct ConstMatrix {
  const void* data = nullptr;
  Type type = Type::bf16;
  int64_t rows = 0, cols = 0, ld = 0;
  explicit operator bool() const { return data != nullptr; }
};
struct Matrix {
  void* data = nullptr;
  Type type = Type::bf16;
  int64_t rows = 0, cols = 0, ld = 0;
  explicit operator bool() const { return data != nullptr; }
  operator ConstMatrix() const { return {data, type, rows, cols, ld}; }
};

// Rows of one expert: [first, first + rows), ascending and without overlap over the experts of a list.
struct ExpertRows {
  int32_t first = 0, rows = 0;
};

inline constexpr int kMostExperts = 1024;  // that one launch takes

}  // namespace mop::kernels
