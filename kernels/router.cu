#include <cub/block/block_scan.cuh>

#include "kernels/device.cuh"
#include "kernels/partials.cuh"
#include "kernels/router.h"

namespace mop::kernels {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kRouterBlocks = 4 * kMultiprocessors;
constexpr float kSigmoidSum = 1e-20F;  // added to the sum of sigmoid scores that normalises them

__device__ float sigmoid(float x) {
  return 1 / (1 + expf(-x));
}

// Orders floats as unsigned integers; above 0 for every number.
__device__ uint32_t sortable(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000U ? ~bits : bits | 0x80000000U;
}

__device__ float max_of_warp(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}
__device__ float sum_of_warp(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// A warp has expert i x 32 + lane in item i. logits -> their softmax; returns (maximum, sum of exp).
template <int Items>
__device__ float2 softmax(const float (&logits)[Items], float (&probabilities)[Items]) {
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < Items; ++i) most = fmaxf(most, logits[i]);
  most = max_of_warp(most);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) sum += probabilities[i] = expf(logits[i] - most);
  sum = sum_of_warp(sum);
#pragma unroll
  for (int i = 0; i < Items; ++i) probabilities[i] /= sum;
  return {most, sum};
}

template <int Items>
__device__ void load_logits(const float* row, int experts, int lane, float (&logits)[Items]) {
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int e = i * 32 + lane;
    logits[i] = e < experts ? row[e] : -INFINITY;
  }
}

// Choices outside the best groups become -infinity. `shared`: (experts) of this warp.
template <int Items>
__device__ void keep_best_groups(const Router& router, int lane, float* shared, float (&choice)[Items]) {
#pragma unroll
  for (int i = 0; i < Items; ++i)
    if (i * 32 + lane < router.experts) shared[i * 32 + lane] = choice[i];
  __syncwarp();
  const int each = router.experts / router.groups;
  float best = -INFINITY, second = -INFINITY;  // of group `lane`
  if (lane < router.groups) {
    for (int j = 0; j < each; ++j) {
      const float c = shared[lane * each + (j + lane) % each];
      second = fmaxf(second, fminf(best, c));
      best = fmaxf(best, c);
    }
  }
  const float score = router.sigmoid && each > 1 ? best + second : best;
  int better = 0;
  for (int g = 0; g < router.groups; ++g) {
    const float other = __shfl_sync(kAllLanes, score, g);
    better += other > score || (other == score && g < lane);
  }
  const unsigned kept = __ballot_sync(kAllLanes, lane < router.groups && better < router.top_groups);
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int e = i * 32 + lane;
    if (e < router.experts && (kept >> (e / each) & 1) == 0) choice[i] = -INFINITY;
  }
  __syncwarp();
}

// Of the chosen expert that this lane holds (lane < choices): its score, before normalisation and scale.
__device__ float score_of(const Router& router, float logit, float2 softmax_of_all, float most_chosen) {
  if (router.softmax_after) return expf(logit - most_chosen);
  return router.sigmoid ? sigmoid(logit) : expf(logit - softmax_of_all.x) / softmax_of_all.y;
}

struct Weighing {
  float score, sum, weight;  // sum: of the chosen scores
};
__device__ Weighing weigh(const Router& router, int lane, float logit, float2 softmax_of_all) {
  const bool chosen = lane < router.choices;
  const float most = router.softmax_after ? max_of_warp(chosen ? logit : -INFINITY) : 0;
  const float score = chosen ? score_of(router, logit, softmax_of_all, most) : 0;
  const float sum = sum_of_warp(score) + (router.sigmoid && !router.softmax_after ? kSigmoidSum : 0);
  const bool divided = router.normalise || router.softmax_after;
  return {score, sum, score * (divided ? router.scale / sum : router.scale)};
}

template <int Items, bool Load>
__global__ void __launch_bounds__(kThreads) topk_kernel(const TopkArgs a) {
  __shared__ float shared[kWarps][Items * 32];
  const Router router = a.router;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float bias[Items];
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int e = i * 32 + lane;
    bias[i] = a.correction != nullptr && e < router.experts ? a.correction[e] : 0;
  }
  float copies[Items] = {}, sums[Items] = {};
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < a.rows; row += int64_t{gridDim.x} * kWarps) {
    const float* const from = a.logits + row * a.ld;
    float logits[Items], probabilities[Items], choice[Items];
    load_logits(from, router.experts, lane, logits);
    float2 of_all{};
    if (Load || !router.sigmoid) of_all = softmax(logits, probabilities);
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      if (router.sigmoid)
        choice[i] = sigmoid(logits[i]) + bias[i];
      else  // the order of the logits is that of their softmax, and no two of them underflow to the same
        choice[i] = a.correction != nullptr ? probabilities[i] + bias[i] : logits[i];
    }
    if (router.top_groups < router.groups) keep_best_groups(router, lane, shared[warp], choice);
    uint32_t keys[Items];
#pragma unroll
    for (int i = 0; i < Items; ++i) keys[i] = i * 32 + lane < router.experts ? sortable(choice[i]) : 0;
    int chosen = 0;  // by this lane, below k
    for (int k = 0; k < router.choices; ++k) {
      uint32_t most = keys[0];
#pragma unroll
      for (int i = 1; i < Items; ++i) most = max(most, keys[i]);
      most = __reduce_max_sync(kAllLanes, most);
      unsigned first = kMostRouterExperts;
#pragma unroll
      for (int i = Items - 1; i >= 0; --i)
        if (keys[i] == most) first = i * 32 + lane;
      first = __reduce_min_sync(kAllLanes, first);
      if (lane == k) chosen = static_cast<int>(first);
#pragma unroll
      for (int i = 0; i < Items; ++i) {
        if (first == static_cast<unsigned>(i * 32 + lane)) {
          keys[i] = 0;
          if (Load) copies[i] += 1;
        }
      }
    }
    const float logit = lane < router.choices ? from[chosen] : 0;
    const Weighing w = weigh(router, lane, logit, of_all);
    if (lane < router.choices) {
      a.ids[row * router.choices + lane] = chosen;
      a.weights[row * router.choices + lane] = w.weight;
    }
    if (Load) {
#pragma unroll
      for (int i = 0; i < Items; ++i) sums[i] += probabilities[i];
    }
  }
  if (!Load) return;
  float* const partial = a.scratch + int64_t{blockIdx.x} * 2 * router.experts;
  for (int part = 0; part < 2; ++part) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Items; ++i) shared[warp][i * 32 + lane] = part == 0 ? copies[i] : sums[i];
    __syncthreads();
    for (int e = threadIdx.x; e < router.experts; e += kThreads) {
      float sum = 0;
      for (int other = 0; other < kWarps; ++other) sum += shared[other][e];
      partial[part * router.experts + e] = sum;
    }
  }
}

template <int Items, class T>
__global__ void __launch_bounds__(kThreads) topk_bwd_kernel(const TopkBwdArgs a) {
  const Router router = a.router;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float copies[Items];
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int e = i * 32 + lane;
    copies[i] = a.load != nullptr && e < router.experts ? a.load[e] : 0;
  }
  const bool softmax_of_all = a.load != nullptr || (!router.sigmoid && !router.softmax_after);
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < a.rows; row += int64_t{gridDim.x} * kWarps) {
    const float* const from = a.logits + row * a.ld;
    const bool mine = lane < router.choices;
    const int chosen = mine ? a.ids[row * router.choices + lane] : -1;
    const float d_weight = mine ? a.d_weights[row * router.choices + lane] : 0;
    const float logit = mine ? from[chosen] : 0;
    float probabilities[Items] = {}, gradients[Items] = {};
    float2 of_all{};
    if (softmax_of_all) {
      float logits[Items];
      load_logits(from, router.experts, lane, logits);
      of_all = softmax(logits, probabilities);
    }
    const Weighing w = weigh(router, lane, logit, of_all);
    const float along = sum_of_warp(w.weight * d_weight);
    float gradient = 0;  // of this lane's chosen logit
    if (router.softmax_after) {
      gradient = w.weight * (d_weight - along / router.scale);
    } else {
      float d = router.scale * d_weight;  // of the score
      if (router.normalise) d = (d - along) / w.sum;
      if (!mine) d = 0;
      gradient = d * w.score;
      if (router.sigmoid) {
        gradient *= sigmoid(-logit);
      } else {
        const float projection = sum_of_warp(gradient);
#pragma unroll
        for (int i = 0; i < Items; ++i) gradients[i] = -probabilities[i] * projection;
      }
    }
    for (int k = 0; k < router.choices; ++k) {
      const int e = __shfl_sync(kAllLanes, chosen, k);
      const float g = __shfl_sync(kAllLanes, gradient, k);
#pragma unroll
      for (int i = 0; i < Items; ++i)
        if (e == i * 32 + lane) gradients[i] += g;
    }
    if (a.load != nullptr) {
      float mean = 0;
#pragma unroll
      for (int i = 0; i < Items; ++i) mean += copies[i] * probabilities[i];
      mean = sum_of_warp(mean);
#pragma unroll
      for (int i = 0; i < Items; ++i) gradients[i] += a.balance * probabilities[i] * (copies[i] - mean);
    }
    T* const to = static_cast<T*>(a.d_logits.data) + row * a.d_logits.ld;
#pragma unroll
    for (int i = 0; i < Items; ++i)
      if (i * 32 + lane < router.experts) store1(to + i * 32 + lane, gradients[i]);
  }
}

__global__ void balance_loss_kernel(const BalanceLossArgs a) {
  double sum = 0;
  for (int e = threadIdx.x; e < a.experts; e += 32)
    sum += static_cast<double>(a.load[e]) * a.load[a.experts + e];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x == 0) *a.sum = (a.accumulate ? *a.sum : 0) + a.balance * sum;
}

void check_router(const Router& r) {
  require(r.experts > 0 && r.experts <= kMostRouterExperts, "a router has at most 512 experts");
  require(r.choices > 0 && r.choices <= kMostChoices && r.choices <= r.experts,
          "a token has at most 32 experts");
  require(r.groups > 0 && r.groups <= kMostRouterGroups && r.experts % r.groups == 0 &&
              r.top_groups <= r.groups && r.choices <= r.experts / r.groups * r.top_groups,
          "the best groups, of at most 32, have enough experts");
}

// f(integral constant of the items a lane)
template <class F>
void with_items(int experts, F&& f) {
  if (experts <= 64) return f(std::integral_constant<int, 2>{});
  if (experts <= 128) return f(std::integral_constant<int, 4>{});
  if (experts <= 256) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, 16>{});
}

int64_t router_blocks(int64_t rows) {
  return std::clamp<int64_t>(ceil_div(rows, kWarps), 1, kRouterBlocks);
}

// ---- sort: tiles of copies, each warp a contiguous part of its tile

constexpr int64_t kTile = 4096, kWarpPart = kTile / kWarps;

// scratch: (tiles, E): copies of each expert in a tile, then where they go
__global__ void __launch_bounds__(kThreads) count_tiles(const SortArgs a) {
  extern __shared__ int32_t tile_counts[];
  for (int e = threadIdx.x; e < a.experts; e += kThreads) tile_counts[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * kTile, end = min(begin + kTile, a.copies);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) atomicAdd(&tile_counts[a.ids[i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < a.experts; e += kThreads)
    a.scratch[int64_t{blockIdx.x} * a.experts + e] = tile_counts[e];
}

// One block, a thread an expert.
__global__ void __launch_bounds__(kMostRouterExperts) place_tiles(const SortArgs a, int64_t tiles) {
  const int e = threadIdx.x;
  int32_t count = 0;
  if (e < a.experts) {
#pragma unroll 8
    for (int64_t tile = 0; tile < tiles; ++tile) count += a.scratch[tile * a.experts + e];
    a.counts[e] = count;
  }
  using Scan = cub::BlockScan<int32_t, kMostRouterExperts>;
  __shared__ typename Scan::TempStorage storage;
  int32_t start = 0;
  Scan(storage).ExclusiveSum(count, start);
  if (e >= a.experts) return;
  constexpr int kAtOnce = 16;  // loads that are under way together
  for (int64_t tile = 0; tile < tiles; tile += kAtOnce) {
    int32_t of_tile[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      of_tile[i] = tile + i < tiles ? a.scratch[(tile + i) * a.experts + e] : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (tile + i < tiles) a.scratch[(tile + i) * a.experts + e] = start;
      start += of_tile[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) scatter_tiles(const SortArgs a) {
  extern __shared__ int32_t next[];  // (warps, E): where the warp's next copy of an expert goes
  for (int i = threadIdx.x; i < kWarps * a.experts; i += kThreads) next[i] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* const mine = next + warp * a.experts;
  const int64_t begin = blockIdx.x * kTile + warp * kWarpPart, end = min(begin + kWarpPart, a.copies);
  for (int64_t i = begin + lane; i < end; i += 32) atomicAdd(&mine[a.ids[i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < a.experts; e += kThreads) {
    int32_t at = a.scratch[int64_t{blockIdx.x} * a.experts + e];
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = next[w * a.experts + e];
      next[w * a.experts + e] = at;
      at += count;
    }
  }
  __syncthreads();
  for (int64_t i = begin; i < end; i += 32) {
    const bool there = i + lane < end;
    const int32_t id = there ? a.ids[i + lane] : -1;
    const unsigned same = __match_any_sync(kAllLanes, id);
    if (there) a.order[mine[id] + __popc(same & ((1U << lane) - 1))] = static_cast<int32_t>(i + lane);
    __syncwarp();
    if (there && lane == __ffs(same) - 1) mine[id] += __popc(same);
    __syncwarp();
  }
}

}  // namespace

void topk(const TopkArgs& a, cudaStream_t stream) {
  check_router(a.router);
  const auto blocks = static_cast<unsigned>(router_blocks(a.rows));
  with_items(a.router.experts, [&](auto items) {
    if (a.load != nullptr)
      topk_kernel<items(), true><<<blocks, kThreads, 0, stream>>>(a);
    else
      topk_kernel<items(), false><<<blocks, kThreads, 0, stream>>>(a);
  });
  check_launch("topk");
  if (a.load != nullptr)
    sum_partials(a.scratch, blocks, 2 * a.router.experts, a.load, Type::f32, a.accumulate, stream);
}

int64_t topk_scratch(int64_t rows, int experts) {
  return router_blocks(rows) * 2 * experts * static_cast<int64_t>(sizeof(float));
}

void topk_bwd(const TopkBwdArgs& a, cudaStream_t stream) {
  check_router(a.router);
  require(a.d_logits.rows == a.rows && a.d_logits.cols == a.router.experts,
          "logits and their gradient have one shape");
  if (a.rows <= 0) return;
  const auto blocks =
      static_cast<unsigned>(std::min(ceil_div(a.rows, kWarps), int64_t{8} * kMultiprocessors));
  with_items(a.router.experts, [&](auto items) {
    with_type(a.d_logits.type, [&](auto type) {
      topk_bwd_kernel<items(), typename decltype(type)::type><<<blocks, kThreads, 0, stream>>>(a);
    });
  });
  check_launch("topk_bwd");
}

void balance_loss(const BalanceLossArgs& a, cudaStream_t stream) {
  balance_loss_kernel<<<1, 32, 0, stream>>>(a);
  check_launch("balance_loss");
}

void sort(const SortArgs& a, cudaStream_t stream) {
  require(a.experts > 0 && a.experts <= kMostRouterExperts, "a router has at most 512 experts");
  require(a.copies < int64_t{1} << 31, "there are less than 2^31 routed copies");
  const int64_t tiles = ceil_div(a.copies, kTile);
  const auto bytes = static_cast<size_t>(a.experts) * sizeof(int32_t);
  if (tiles > 0) count_tiles<<<static_cast<unsigned>(tiles), kThreads, bytes, stream>>>(a);
  place_tiles<<<1, kMostRouterExperts, 0, stream>>>(a, tiles);
  if (tiles > 0) scatter_tiles<<<static_cast<unsigned>(tiles), kThreads, kWarps * bytes, stream>>>(a);
  check_launch("sort");
}

int64_t sort_scratch(int64_t copies, int experts) {
  return std::max<int64_t>(1, ceil_div(copies, kTile)) * experts * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace mop::kernels
