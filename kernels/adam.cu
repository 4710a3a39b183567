#include <cmath>

#include "kernels/adam.h"
#include "kernels/device.cuh"

namespace mop::kernels {
namespace {

struct Update {
  float one_minus_beta1, one_minus_beta2, decay, step_size, inverse_root, eps;

  // One rounding each for the moments' and the weight's changes, which are small beside them.
  __device__ void operator()(float& weight, float& m, float& v, float gradient) const {
    m = fmaf(one_minus_beta1, gradient - m, m);
    v = fmaf(one_minus_beta2, fmaf(gradient, gradient, -v), v);
    weight -= fmaf(decay, weight, step_size * m / (sqrtf(v) * inverse_root + eps));
  }
};

template <class G, class W, bool Master, int V>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const Update update, float* states, int64_t bucket, int64_t first, int64_t packs,
                const G* gradient, W* weights, const float* factor) {
  const float scale = factor != nullptr ? *factor : 1;
  if (!isfinite(scale)) return;
  const int64_t pack = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pack >= packs) return;
  const int64_t i = pack * V, element = first + i, block = element / bucket;
  constexpr int kParts = Master ? 3 : 2;
  float* const state = states + block * bucket * kParts + (element - block * bucket);
  float* const moments = Master ? state + bucket : state;
  const Pack<V> g = load<V>(gradient + i);
  Pack<V> weight, m = load<V>(moments), v = load<V>(moments + bucket);
  if constexpr (Master)
    weight = load<V>(state);
  else
    weight = load<V>(weights + i);
#pragma unroll
  for (int j = 0; j < V; ++j) update(weight[j], m[j], v[j], g[j] * scale);
  store<V>(moments, m);
  store<V>(moments + bucket, v);
  if constexpr (Master) store<V>(state, weight);
  store<V>(weights + i, weight);
}

template <int V>
void launch(const AdamArgs& a, int64_t begin, int64_t n, cudaStream_t stream) {
  if (n <= 0) return;
  const double correction1 = 1 - std::pow(a.beta1, static_cast<double>(a.step)),
               correction2 = 1 - std::pow(a.beta2, static_cast<double>(a.step));
  const Update update{static_cast<float>(1 - a.beta1),
                      static_cast<float>(1 - a.beta2),
                      static_cast<float>(a.learning_rate * a.weight_decay),
                      static_cast<float>(a.learning_rate / correction1),
                      static_cast<float>(1 / std::sqrt(correction2)),
                      static_cast<float>(a.eps)};
  const int64_t packs = n / V;
  const auto blocks = static_cast<unsigned>(ceil_div(packs, kThreads));
  with_type(a.gradient_type, [&](auto gradient_type) {
    using G = typename decltype(gradient_type)::type;
    const auto* const gradient = static_cast<const G*>(a.gradient) + begin;
    if (!a.master) {
      adam_kernel<G, float, false, V>
          <<<blocks, kThreads, 0, stream>>>(update, a.states, a.bucket, a.first + begin, packs, gradient,
                                            static_cast<float*>(a.weights) + begin, a.factor);
      return;
    }
    with_type(a.weights_type, [&](auto weights_type) {
      using W = typename decltype(weights_type)::type;
      adam_kernel<G, W, true, V>
          <<<blocks, kThreads, 0, stream>>>(update, a.states, a.bucket, a.first + begin, packs, gradient,
                                            static_cast<W*>(a.weights) + begin, a.factor);
    });
  });
  check_launch("adam");
}

}  // namespace

void adam(const AdamArgs& a, cudaStream_t stream) {
  require(a.bucket > 0 && a.first >= 0, "optimizer states are whole blocks");
  require(a.master || a.weights_type == Type::f32, "weights that are their own master are fp32");
  const bool wide = a.bucket % kPack == 0 && a.first % kPack == 0 && aligned(a.states) &&
                    aligned(a.gradient) && aligned(a.weights);
  const int64_t whole = wide ? a.n / kPack * kPack : 0;
  launch<kPack>(a, 0, whole, stream);
  launch<1>(a, whole, a.n - whole, stream);
}

}  // namespace mop::kernels
