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

// See Master.
__device__ float settled(float master) {
  const uint32_t bits = __float_as_uint(master);
  return (bits & 0xffff) == 0x8000 ? __uint_as_float(bits - 1) : master;
}

template <class G, class W, Master M, int V>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const Update update, float* states, int64_t bucket, int64_t first, int64_t packs,
                const G* gradient, W* weights, const float* factor) {
  const float scale = factor != nullptr ? *factor : 1;
  if (!isfinite(scale)) return;
  const int64_t pack = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pack >= packs) return;
  const int64_t i = pack * V, element = first + i, block = element / bucket, inner = element - block * bucket;
  // In halves of a float, of which low bits take one.
  constexpr int64_t kHalves = M == Master::states ? 6 : M == Master::weights ? 4 : 5;
  float* const begin = states + block * bucket * kHalves / 2;
  float* const moments = begin + inner + (M == Master::states ? bucket : 0);
  auto* const low = reinterpret_cast<uint16_t*>(begin + 2 * bucket) + inner;
  const Pack<V> g = load<V>(gradient + i);
  Pack<V> weight, m = load<V>(moments), v = load<V>(moments + bucket);
  alignas(16) uint16_t rest[V];
  if constexpr (M == Master::states) {
    weight = load<V>(begin + inner);
  } else {
    weight = load<V>(weights + i);
  }
  if constexpr (M == Master::low) {
    if constexpr (V == 1)
      rest[0] = *low;
    else
      *reinterpret_cast<uint4*>(rest) = *reinterpret_cast<const uint4*>(low);
#pragma unroll
    for (int j = 0; j < V; ++j)
      weight[j] = __uint_as_float(__float_as_uint(weight[j]) +
                                  static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(rest[j]))));
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    update(weight[j], m[j], v[j], g[j] * scale);
    if constexpr (std::is_same_v<W, bf16>) weight[j] = settled(weight[j]);
  }
  store<V>(moments, m);
  store<V>(moments + bucket, v);
  if constexpr (M == Master::states) store<V>(begin + inner, weight);
  if constexpr (M == Master::low) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      rest[j] = isnan(weight[j]) ? 0 : static_cast<uint16_t>(__float_as_uint(weight[j]));
    if constexpr (V == 1)
      *low = rest[0];
    else
      *reinterpret_cast<uint4*>(low) = *reinterpret_cast<const uint4*>(rest);
  }
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
    const auto run = [&](auto master, auto weights_type) {
      using W = typename decltype(weights_type)::type;
      adam_kernel<G, W, master(), V>
          <<<blocks, kThreads, 0, stream>>>(update, a.states, a.bucket, a.first + begin, packs, gradient,
                                            static_cast<W*>(a.weights) + begin, a.factor);
    };
    if (a.master == Master::weights)
      run(std::integral_constant<Master, Master::weights>{}, Tag<float>{});
    else if (a.master == Master::low)
      run(std::integral_constant<Master, Master::low>{}, Tag<bf16>{});
    else
      with_type(a.weights_type,
                [&](auto type) { run(std::integral_constant<Master, Master::states>{}, type); });
  });
  check_launch("adam");
}

}  // namespace

void adam(const AdamArgs& a, cudaStream_t stream) {
  require(a.bucket > 0 && a.first >= 0, "optimizer states are whole blocks");
  require(a.master != Master::weights || a.weights_type == Type::f32,
          "weights that are their own master are fp32");
  require(a.master != Master::low || (a.weights_type == Type::bf16 && a.bucket % 2 == 0),
          "low bits are of bf16 weights, in even blocks");
  const bool wide = a.bucket % kPack == 0 && a.first % kPack == 0 && aligned(a.states) &&
                    aligned(a.gradient) && aligned(a.weights);
  const int64_t whole = wide ? a.n / kPack * kPack : 0;
  launch<kPack>(a, 0, whole, stream);
  launch<1>(a, whole, a.n - whole, stream);
}

}  // namespace mop::kernels
