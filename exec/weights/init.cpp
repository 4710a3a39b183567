// Random weights. A generator without state: normal.h's numbers over a counter that starts at a hash of seed
// and name (FNV-1a).
#include <algorithm>
#include <string>
#include <utility>

#include "exec/weights/normal.h"
#include "exec/weights/weights.h"
#include "sim/base/error.h"

namespace mop::weights {
namespace {

constexpr uint64_t kGamma = 0x9e3779b97f4a7c15;

// Where the sequence of a tensor starts.
uint64_t key(uint64_t seed, const std::string& tensor) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : tensor) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return mix(hash ^ mix(seed + kGamma));
}

}  // namespace

RandomSource::RandomSource(model::ModelConfig model, uint64_t seed, double std, Vectors vectors)
    : model_(std::move(model)), seed_(seed), std_(std), vectors_(vectors) {}

void RandomSource::read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols,
                        float* out, int64_t ld) const {
  const model::MatrixShape shape = model::shape(model_, id);
  ensure(
      row >= 0 && rows >= 0 && row + rows <= shape.rows && col >= 0 && cols >= 0 && col + cols <= shape.cols,
      "a block lies inside its parameter");
  const model::Stored stored = model::stored(model_, id);
  const model::Kind kind = model::kind(id.role);
  const double mean = kind == model::Kind::norm ? 1 : 0;
  const double std = kind == model::Kind::matrix || vectors_ == Vectors::random ? std_ : 0;
  const uint64_t start = key(seed_, stored.name);
  // Number `index` of the sequence is that of the counter start + index x gamma, all modulo 2^64: a row
  // counts up by a constant, whatever its stride.
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = stored.offset + (row + r) * stored.row_stride + col * stored.col_stride;
    if (std == 0)
      std::fill_n(out + r * ld, cols, static_cast<float>(mean));
    else
      normals({.start = start + static_cast<uint64_t>(first) * kGamma,
               .step = static_cast<uint64_t>(stored.col_stride) * kGamma,
               .mean = mean,
               .std = std},
              cols, out + r * ld);
  }
}

}  // namespace mop::weights
