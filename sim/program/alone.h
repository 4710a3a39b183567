// Which experts of a grouped product have a kernel each, the others sharing one: those that fill the GPU by
// themselves. kernels/grouped_matmul.cu decides by the same numbers.
#pragma once
#include <cmath>

namespace mop::program {

inline constexpr int kTileRows = 128, kTileColumns = 256;  // of a product, what a multiprocessor works on
inline constexpr int kLongGradient = 4096;                 // rows of a weight gradient
inline constexpr int kProcessors = 132;                    // of an H200
inline constexpr double kFull = 0.9;  // of whole waves of tiles, what a product has at least that fills it

// rows: of an expert; columns: of the product.
inline bool alone(double rows, double columns, bool gradient) {
  if (gradient) return rows >= kLongGradient;
  const double tiles = std::ceil(rows / kTileRows) * std::ceil(columns / kTileColumns),
               waves = std::ceil(tiles / kProcessors);
  return tiles >= kProcessors && tiles >= kFull * waves * kProcessors;
}

}  // namespace mop::program
