// Which experts of a grouped product have a kernel each, the others sharing one: those that fill the GPU by
// themselves. kernels/grouped_matmul.cu decides by the same numbers.
#pragma once
#include <cmath>

namespace mop::program {

inline constexpr int kTileRows = 128, kTileColumns = 256;  // of a product, what a multiprocessor works on
inline constexpr int kLongGradient = 4096;                 // rows of a weight gradient
inline constexpr int kProcessors = 132;                    // of an H200

// rows: of an expert; columns: of the product.
inline bool alone(double rows, double columns, bool gradient) {
  return gradient ? rows >= kLongGradient
                  : std::ceil(rows / kTileRows) * std::ceil(columns / kTileColumns) >= kProcessors;
}

}  // namespace mop::program
