#include <cub/block/block_reduce.cuh>

#include "kernels/device.cuh"
#include "kernels/loss.h"

namespace mop::kernels {
namespace {

constexpr float kLog2E = 1.4426950408889634F;
constexpr int kMostRowThreads = 1024;  // of the blocks of a multiprocessor at least
constexpr int kAtOnce = 4;             // packs that a thread has under way

struct Statistics {
  float highest = -INFINITY, sum = 0, target = 0;
};

__device__ Statistics merged(const Statistics& a, const Statistics& b) {
  Statistics out{a.highest, a.sum, a.target + b.target};
  if (b.sum == 0) return out;  // no columns
  if (a.sum == 0) {
    out.highest = b.highest, out.sum = b.sum;
    return out;
  }
  out.highest = fmaxf(a.highest, b.highest);
  out.sum = a.sum * expf(a.highest - out.highest) + b.sum * expf(b.highest - out.highest);
  return out;
}

__device__ Statistics load_statistics(const float* all, int64_t row) {
  return {all[3 * row], all[3 * row + 1], all[3 * row + 2]};
}

__device__ Statistics merged_statistics(const float* all, int64_t blocks, int64_t rows, int64_t row) {
  Statistics out;
  for (int64_t b = 0; b < blocks; ++b) out = merged(out, load_statistics(all, b * rows + row));
  return out;
}

__device__ int32_t target_of(const Targets& targets, int64_t row) {
  const auto r = static_cast<uint32_t>(row), cols = static_cast<uint32_t>(targets.cols);
  return targets.data[r / cols * targets.ld + r % cols];
}

// 2^x, without denormal results
__device__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds the values to (maximum, sum of exp(value - maximum)).
template <int V>
__device__ void add_exponentials(const Pack<V>& values, float& highest, float& sum) {
  float most = values[0];
#pragma unroll
  for (int i = 1; i < V; ++i) most = fmaxf(most, values[i]);
  if (most > highest) {
    sum *= power_of_2((highest - most) * kLog2E);
    highest = most;
  }
  const float base = highest == -INFINITY ? 0 : highest * kLog2E;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += power_of_2(values[i] * kLog2E - base);
}

// Rows may start anywhere: `head` elements before the first pack, `tail` after the last.
struct Parts {
  int64_t head, packs, tail;
};
template <class T>
__device__ Parts parts_of(const T* row, int64_t columns) {
  constexpr int64_t kBytes = sizeof(T);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16);
  const int64_t head = min(columns, past == 0 ? 0 : (16 - past) / kBytes);
  const int64_t packs = (columns - head) / kPack;
  return {head, packs, columns - head - packs * kPack};
}

// A block a row.
template <class T, int kRowThreads>
__global__ void __launch_bounds__(kRowThreads, kMostRowThreads / kRowThreads)
    cross_entropy_kernel(const CrossEntropyArgs a, Rows<const T> logits) {
  const int64_t row = blockIdx.x,
                columns = max(int64_t{0}, min(a.logits.cols, a.block.vocabulary - a.block.first));
  const T* const values = logits.at(row, 0);
  const Parts parts = parts_of(values, columns);
  const int thread = static_cast<int>(threadIdx.x);
  float highest = -INFINITY, sum = 0, at_target = 0;
  if (thread == 0) {  // on its way while the row is read
    const int32_t target = target_of(a.targets, row);
    if (target != kNoTarget && (target < 0 || target >= a.block.vocabulary)) {
      if (a.invalid != nullptr) atomicMin(a.invalid, static_cast<int32_t>(row));
    } else if (target >= a.block.first && target < a.block.first + columns) {
      at_target = load1(values + target - a.block.first);
    }
  }
  if (thread < parts.head) add_exponentials(load<1>(values + thread), highest, sum);
  const T* const packs = values + parts.head;
  for (int64_t begin = thread; begin < parts.packs; begin += kAtOnce * kRowThreads) {
    Raw<kPack, T> loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (begin + i * kRowThreads < parts.packs)
        loaded[i] = load_raw<kPack>(packs + (begin + i * kRowThreads) * kPack);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (begin + i * kRowThreads < parts.packs) add_exponentials(unpack(loaded[i]), highest, sum);
  }
  if (thread < parts.tail) add_exponentials(load<1>(packs + parts.packs * kPack + thread), highest, sum);

  using Reduce = cub::BlockReduce<Statistics, kRowThreads>;
  __shared__ typename Reduce::TempStorage storage;
  Statistics all =
      Reduce(storage).Reduce(Statistics{highest, sum, at_target},
                             [](const Statistics& x, const Statistics& y) { return merged(x, y); });
  if (thread != 0) return;
  if (a.accumulate) all = merged(all, load_statistics(a.statistics, row));
  a.statistics[3 * row] = all.highest;
  a.statistics[3 * row + 1] = all.sum;
  a.statistics[3 * row + 2] = all.target;
}

template <int V>
__device__ Pack<V> softmax(Pack<V> values, float log_sum, float factor) {
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = power_of_2((values[i] - log_sum) * kLog2E) * factor;
  return values;
}

// A block a row. One without target is not read: it becomes zero, whatever is in it.
template <class T, int kRowThreads>
__global__ void __launch_bounds__(kRowThreads, kMostRowThreads / kRowThreads)
    gradient_kernel(const CrossEntropyBwdArgs a, Rows<T> logits) {
  const int64_t row = blockIdx.x, all_columns = a.logits.cols;
  const int64_t columns = max(int64_t{0}, min(all_columns, a.block.vocabulary - a.block.first));
  T* const values = logits.at(row, 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t target = target_of(a.targets, row);
  const bool counts = target != kNoTarget;
  const Parts parts = parts_of(values, columns);
  T* const packs = values + parts.head;
  T* const rest = packs + parts.packs * kPack;
  Raw<kPack, T> loaded[kAtOnce] = {};
  const auto load_packs = [&](int64_t begin) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (counts && begin + i * kRowThreads < parts.packs)
        loaded[i] = load_raw<kPack>(packs + (begin + i * kRowThreads) * kPack);
  };
  load_packs(thread);  // on their way while one thread merges the statistics

  __shared__ float row_log_sum, row_factor;
  float at_target = 0;  // in thread 0: from the statistics, not from what is overwritten here
  if (counts && thread == 0) {
    const Statistics all = merged_statistics(a.statistics, a.blocks, a.logits.rows, row);
    row_log_sum = all.highest + logf(all.sum);
    row_factor = static_cast<float>(1 / *a.valid);
    at_target = (expf(all.target - all.highest - logf(all.sum)) - 1) * row_factor;
  }
  __syncthreads();
  const float log_sum = counts ? row_log_sum : 0, factor = counts ? row_factor : 0;
  const auto gradient = [&](auto pack) {
    if (counts) return softmax(pack, log_sum, factor);
    for (float& value : pack.v) value = 0;
    return pack;
  };
  if (thread < parts.head) store<1>(values + thread, gradient(load<1>(values + thread)));
  for (int64_t begin = thread; begin < parts.packs; begin += kAtOnce * kRowThreads) {
    if (begin != thread) load_packs(begin);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (begin + i * kRowThreads < parts.packs)
        store<kPack>(packs + (begin + i * kRowThreads) * kPack, gradient(unpack(loaded[i])));
  }
  if (thread < parts.tail) store<1>(rest + thread, gradient(load<1>(rest + thread)));
  for (int64_t col = columns + thread; col < all_columns; col += kRowThreads) store1(values + col, 0);
  __syncthreads();  // the target's element was written as any other
  if (thread == 0 && counts && target >= a.block.first && target < a.block.first + columns)
    store1(values + target - a.block.first, at_target);
}

// One block.
__global__ void __launch_bounds__(1024) loss_kernel(const CrossEntropyBwdArgs a) {
  double sum = 0;
  for (int64_t row = a.loss_first + threadIdx.x; row < a.loss_last; row += 1024) {
    if (target_of(a.targets, row) == kNoTarget) continue;
    const Statistics all = merged_statistics(a.statistics, a.blocks, a.logits.rows, row);
    sum += static_cast<double>(all.highest) + log(static_cast<double>(all.sum)) - all.target;
  }
  using Reduce = cub::BlockReduce<double, 1024>;
  __shared__ typename Reduce::TempStorage storage;
  sum = Reduce(storage).Sum(sum);
  // Without any target in the step there is no loss either.
  if (threadIdx.x == 0) *a.loss = (a.accumulate ? *a.loss : 0) + (sum == 0 ? 0 : sum / *a.valid);
}

// Threads a row. Few of them, so more rows at once, hide how a row begins and ends; many read and write
// longer runs of memory. On an H200, of the rate of a copy: forward 103 % from 19000 to 152000 columns, 91 %
// at 9500 (512 threads: 97 % at 152000, 73 % at 38000, 33 % at 9500); gradient 94 % at 152000 columns, 88 %
// at 38000, 85 % at 9500 (256 threads: 81 % at 38000; 512: 76 % at 9500).
constexpr int64_t kWideForward = 65536, kWideBackward = 24576;  // columns
template <int Few, int Many, class F>
void with_threads(bool many, F&& f) {
  many ? f(std::integral_constant<int, Many>{}) : f(std::integral_constant<int, Few>{});
}

void check_loss(const ConstMatrix& logits, const Targets& targets) {
  require(logits.rows == 0 || targets.cols > 0, "every row of the logits has a target");
  require(logits.rows < int64_t{1} << 31, "there are less than 2^31 rows of logits");
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& a, cudaStream_t stream) {
  check_loss(a.logits, a.targets);
  if (a.logits.rows <= 0) return;
  with_type(a.logits.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_threads<128, 256>(a.logits.cols > kWideForward, [&](auto threads) {
      cross_entropy_kernel<T, threads.value>
          <<<static_cast<unsigned>(a.logits.rows), threads.value, 0, stream>>>(a, Rows<const T>(a.logits));
    });
  });
  check_launch("cross_entropy");
}

void cross_entropy_bwd(const CrossEntropyBwdArgs& a, cudaStream_t stream) {
  check_loss(a.logits, a.targets);
  require(a.blocks > 0 && a.loss_first >= 0 && a.loss_last <= a.logits.rows, "every row has statistics");
  if (a.logits.rows > 0) {
    with_type(a.logits.type, [&](auto type) {
      using T = typename decltype(type)::type;
      with_threads<256, 512>(a.logits.cols > kWideBackward, [&](auto threads) {
        gradient_kernel<T, threads.value>
            <<<static_cast<unsigned>(a.logits.rows), threads.value, 0, stream>>>(a, Rows<T>(a.logits));
      });
    });
  }
  if (a.loss != nullptr) loss_kernel<<<1, 1024, 0, stream>>>(a);
  check_launch("cross_entropy_bwd");
}

}  // namespace mop::kernels
