// What the norm and the rotation with a norm share: the gradient of the weight, added up in registers over
// the rows that a group of threads visits.
#pragma once
#include "kernels/device.cuh"

namespace mop::kernels {

inline constexpr int kNormBlocks = 8 * kMultiprocessors;  // of backward kernels at most: rows of partial sums
inline constexpr int kNormPacks = 2;  // of 8 elements that a thread holds in backward kernels; twice as many
inline constexpr int64_t kWideNorm = 8192;                  // where a norm is over more elements than these
inline constexpr int kNormElements = 16;                    // that it holds where packs have one element
inline constexpr int kShortNorm = 32 * kPack * kNormPacks;  // elements, at most, of a norm that a warp holds

// Threads of a block for the widest norm.
template <int V>
inline constexpr int kMostThreads = V == kPack ? 512 : 1024;

// f(elements of a pack, packs a thread) for backward kernels.
template <class F>
void with_norm_packs(bool wide, int64_t d, F&& f) {
  using std::integral_constant;
  if (!wide) return f(integral_constant<int, 1>{}, integral_constant<int, kNormElements>{});
  if (d <= kWideNorm) return f(integral_constant<int, kPack>{}, integral_constant<int, kNormPacks>{});
  f(integral_constant<int, kPack>{}, integral_constant<int, 2 * kNormPacks>{});
}

struct Groups {  // `each` of them in a row, of `packs` packs, worked on by `threads` threads
  uint32_t count, each;
  int packs, threads;
  float d, eps;
};

inline Groups groups_of(const ConstMatrix& x, int64_t d, int packs, int threads, float eps) {
  return {static_cast<uint32_t>(x.rows * (x.cols / d)),
          static_cast<uint32_t>(x.cols / d),
          packs,
          threads,
          static_cast<float>(d),
          eps};
}

// Which packs of its group a thread holds.
struct Held {
  int first, apart;
  __device__ int operator()(int i) const { return first + i * apart; }
};

// partial (d) of this block = the sum over its groups of dw. Every thread of the block calls it. Most:
// elements of a norm of which a block works on several at a time.
template <int V, int Most = kShortNorm, int Packs>
__device__ inline void store_weight_gradient(const Pack<V> (&dw)[Packs], int packs, int threads,
                                             const Held& held, float* partial) {
  if (threads == static_cast<int>(blockDim.x)) {
#pragma unroll
    for (int i = 0; i < Packs; ++i)
      if (held(i) < packs) store<V>(partial + held(i) * V, dw[i]);
    return;
  }
  __shared__ float sums[Most];
  for (int group = 0; group < static_cast<int>(blockDim.x) / threads; ++group) {
    if (group == static_cast<int>(threadIdx.x) / threads) {
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        if (held(i) >= packs) continue;
        for (int j = 0; j < V; ++j) {
          float& sum = sums[held(i) * V + j];
          sum = group == 0 ? dw[i][j] : sum + dw[i][j];
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < packs * V; i += blockDim.x) partial[i] = sums[i];
}

// Blocks of a backward kernel over `groups` norms of d elements. The scratch memory: (blocks, d) fp32.
inline int64_t norm_blocks(int64_t groups, int64_t d) {
  const bool wide = d % kPack == 0;
  const Division division = divide(wide ? d / kPack : d, wide ? kNormPacks : kNormElements);
  return std::clamp<int64_t>(ceil_div(groups, division.groups()), 1, kNormBlocks);
}

}  // namespace mop::kernels
