#include "exec/cuda/adam_job.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace mop::cuda {
namespace {

float load(const std::byte* from, program::Type type, int64_t i) {
  if (type == program::Type::f32) return reinterpret_cast<const float*>(from)[i];
  return std::bit_cast<float>(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[i]) << 16);
}

void store(std::byte* to, program::Type type, int64_t i, float value) {
  if (type == program::Type::f32) {
    reinterpret_cast<float*>(to)[i] = value;
    return;
  }
  // Nearest, ties to even.
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

// As torch.optim.AdamW; a factor that is not finite leaves everything as it is.
void Rank::AdamJob::run() const {
  const float scale = clipped ? *reinterpret_cast<const float*>(factor.get()) : 1.0F;
  if (!std::isfinite(scale)) return;
  const auto f = [](double x) { return static_cast<float>(x); };
  const double t = static_cast<double>(adam.step);
  const float correction1 = f(1 / (1 - std::pow(adam.beta1, t))), beta1 = f(adam.beta1), beta2 = f(adam.beta2),
              correction2 = f(1 / std::sqrt(1 - std::pow(adam.beta2, t))), rate = f(adam.learning_rate),
              decay = f(1 - adam.learning_rate * adam.weight_decay), eps = f(adam.eps);
  const int64_t parts = master ? 3 : 2;
  for (const Pair& pair : pairs) {
    // Runs inside one block of the states.
    for (int64_t done = 0; done < pair.n;) {
      const int64_t element = pair.first + done, block = element / bucket, inner = element % bucket;
      const int64_t n = std::min(pair.n - done, bucket - inner);
      float* const base = states + block * bucket * parts + inner;
      float* const m = base + (master ? bucket : 0);
      float* const v = m + bucket;
#pragma omp parallel for simd schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        const float g = load(pair.gradient, pair.gradient_type, done + i) * scale;
        float w = master ? base[i] : reinterpret_cast<float*>(pair.weights)[done + i];
        w *= decay;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        w -= rate * m[i] * correction1 / (std::sqrt(v[i]) * correction2 + eps);
        if (master) base[i] = w;
        store(pair.weights, pair.weights_type, done + i, w);
      }
      done += n;
    }
  }
}

}  // namespace mop::cuda
