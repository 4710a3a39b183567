// Random weights. A generator without state: SplitMix64's finaliser over a counter (Steele, Lea and Flood,
// OOPSLA 2014), started at a hash of seed and name (FNV-1a), and the Box-Muller transform.
#include <cmath>
#include <numbers>
#include <string>
#include <utility>

#include "exec/weights/weights.h"
#include "sim/base/error.h"

namespace mop::weights {
namespace {

constexpr uint64_t kGamma = 0x9e3779b97f4a7c15;

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Where the sequence of a tensor starts.
uint64_t key(uint64_t seed, const std::string& tensor) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : tensor) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return mix(hash ^ mix(seed + kGamma));
}

// Standard normal number `index` of a sequence, in double precision.
double normal(uint64_t key, uint64_t index) {
  const uint64_t bits = mix(key + index * kGamma);
  // Halves of the bits as the centres of 2^32 intervals of (0, 1): never 0, whose logarithm there is not.
  const double u = (static_cast<double>(bits >> 32) + 0.5) * 0x1p-32;
  const double v = (static_cast<double>(bits & 0xffffffff) + 0.5) * 0x1p-32;
  return std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
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
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t index = stored.offset + (row + r) * stored.row_stride + (col + c) * stored.col_stride;
      const double z = std == 0 ? 0 : normal(start, static_cast<uint64_t>(index));
      out[r * ld + c] = static_cast<float>(mean + std * z);
    }
  }
}

}  // namespace mop::weights
