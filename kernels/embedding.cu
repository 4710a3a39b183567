#include <cub/block/block_scan.cuh>

#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/map.cuh"

namespace mop::kernels {
namespace {

template <class T, int V>
struct Lookup {
  const int32_t* ids;
  int64_t vocabulary;
  Rows<const T> table;
  Rows<T> x;
  int32_t* invalid;

  __device__ Pack<V> load(int64_t row, int64_t col) const {
    const int32_t id = ids[row];
    if (id >= 0 && id < vocabulary) return kernels::load<V>(table.at(id, col));
    if (col == 0 && invalid != nullptr) atomicMin(invalid, static_cast<int32_t>(row));
    Pack<V> zeros;
#pragma unroll
    for (int i = 0; i < V; ++i) zeros[i] = 0;
    return zeros;
  }
  __device__ void store(int64_t row, int64_t col, const Pack<V>& pack) const {
    kernels::store<V>(x.at(row, col), pack);
  }
};

// ---- backward: positions are sorted so that those of a token are a run, whose rows are added up in order

// Tokens that are equal in their lowest bits are a class; the order is that of classes, within one of tokens,
// within one of positions. A block sorts a class and reads all ids for it, of which it keeps few: one launch
// in the place of a radix sort's two or more a digit.
constexpr int kSortWarps = 16, kSortThreads = 32 * kSortWarps;
constexpr int kClassTokens = 640;  // of a class at most: 40 KiB of counts

int class_bits(int64_t vocabulary) {
  return std::bit_width(static_cast<uint64_t>(ceil_div(vocabulary, kClassTokens) - 1));
}

struct Sort {
  const int32_t* ids;  // (n)
  int64_t n;
  uint32_t last;  // token; that one is beyond it is the forward pass's to tell
  int bits, class_tokens;
  int32_t *tokens, *positions;  // (n), sorted
  int32_t* long_runs;           // becomes 0

  __device__ int32_t id(int64_t i) const {
    return static_cast<int32_t>(min(static_cast<uint32_t>(ids[i]), last));
  }
};

// Each warp has a contiguous part of the ids.
__global__ void __launch_bounds__(kSortThreads) sort_class(const Sort a) {
  extern __shared__ int32_t next[];  // (warps, tokens of the class): where the warp's next position goes
  __shared__ int32_t first;          // of the class
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.long_runs = 0;
  if (threadIdx.x == 0) first = 0;
  for (int i = threadIdx.x; i < kSortWarps * a.class_tokens; i += kSortThreads) next[i] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mask = (1 << a.bits) - 1;
  const auto of_class = static_cast<int>(blockIdx.x);
  int32_t* const mine = next + warp * a.class_tokens;
  const int64_t part = (a.n + kSortWarps - 1) / kSortWarps, begin = warp * part, end = min(begin + part, a.n);
  int32_t before = 0;  // positions of classes before this one
#pragma unroll 8
  for (int64_t i = begin + lane; i < end; i += 32) {
    const int32_t id = a.id(i);
    before += (id & mask) < of_class ? 1 : 0;
    if ((id & mask) == of_class) atomicAdd(&mine[id >> a.bits], 1);
  }
  before = __reduce_add_sync(kAllLanes, before);
  if (lane == 0) atomicAdd(&first, before);
  __syncthreads();
  constexpr int kItems = (kClassTokens + kSortThreads - 1) / kSortThreads;
  int32_t counts[kItems], starts[kItems];
  for (int i = 0; i < kItems; ++i) {
    const int token = threadIdx.x * kItems + i;
    counts[i] = 0;
    if (token >= a.class_tokens) continue;
    for (int w = 0; w < kSortWarps; ++w) counts[i] += next[w * a.class_tokens + token];
  }
  using Scan = cub::BlockScan<int32_t, kSortThreads>;
  __shared__ typename Scan::TempStorage storage;
  Scan(storage).ExclusiveSum(counts, starts);
  for (int i = 0; i < kItems; ++i) {
    const int token = threadIdx.x * kItems + i;
    if (token >= a.class_tokens) continue;
    int32_t at = first + starts[i];
    for (int w = 0; w < kSortWarps; ++w) {
      const int32_t count = next[w * a.class_tokens + token];
      next[w * a.class_tokens + token] = at;
      at += count;
    }
  }
  __syncthreads();
  constexpr int kAtOnce = 4;
  for (int64_t i = begin + lane; i - lane < end; i += 32 * kAtOnce) {
    int32_t ids[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) ids[j] = i + j * 32 < end ? a.id(i + j * 32) : -1;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const bool there = ids[j] >= 0 && (ids[j] & mask) == of_class;
      if (!__any_sync(kAllLanes, there)) continue;
      const unsigned same = __match_any_sync(kAllLanes, there ? ids[j] : -1);
      int32_t* const to = &mine[ids[j] >> a.bits];
      if (there) {
        const int32_t at = *to + __popc(same & ((1U << lane) - 1));
        a.tokens[at] = ids[j];
        a.positions[at] = static_cast<int32_t>(i + j * 32);
      }
      __syncwarp();
      if (there && lane == __ffs(same) - 1) *to += __popc(same);
      __syncwarp();
    }
  }
}

// The sorted positions in chunks. What a chunk has of a run that goes on beyond it is a partial sum: part 0
// of the chunk if the run began before the chunk, else part 1.
constexpr int kChunk = 32;

template <class Dx, class Table>
struct Scatter {
  const int32_t *tokens, *positions;  // (n), sorted
  int64_t n, width;
  Rows<const Dx> dx;
  Rows<Table> table;
  float* partials;     // (chunks, 2, width)
  int32_t* long_runs;  // how many go on beyond the chunk where they begin, and those chunks in any order

  __device__ float* part(int64_t chunk, int which, int64_t col) const {
    return partials + (chunk * 2 + which) * width + col;
  }
};

template <int V, class T>
__device__ void store_sum(T* to, Pack<V> sum, const Raw<V, T>& before) {
  const Pack<V> more = unpack(before);
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += more[i];
  store<V>(to, sum);
}

// Blocks (chunks, columns).
template <class Dx, class Table, int V>
__global__ void __launch_bounds__(kThreads) sum_chunks(const Scatter<Dx, Table> a) {
  __shared__ int32_t tokens[kChunk + 2], positions[kChunk];  // tokens: with those beside the chunk, or -1
  const int64_t chunk = blockIdx.x, first = chunk * kChunk;
  const auto count = static_cast<int>(min(int64_t{kChunk}, a.n - first)),
             thread = static_cast<int>(threadIdx.x);
  if (thread < count + 2) {
    const int64_t at = first - 1 + thread;
    tokens[thread] = at >= 0 && at < a.n ? a.tokens[at] : -1;
  }
  if (thread < count) positions[thread] = a.positions[first + thread];
  __syncthreads();
  const int64_t col = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (col >= a.width) return;
  const auto token = [&](int i) { return tokens[i + 1]; };
  const auto ends = [&](int i) { return token(i + 1) != token(i); };  // its run
  const auto began = [&](int i) { return token(i) != token(-1); };    // in this chunk
  Pack<V> sum;
  constexpr int kAtOnce = 4;
  for (int begin = 0; begin < count; begin += kAtOnce) {
    Raw<V, Dx> rows[kAtOnce];
    Raw<V, Table> before[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j;
      if (i >= count) continue;
      rows[j] = load_raw<V>(a.dx.at(positions[i], col));
      if (ends(i) && began(i)) before[j] = load_raw<V>(a.table.at(token(i), col));
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j;
      if (i >= count) continue;
      const Pack<V> row = unpack(rows[j]);
      const bool starts = i == 0 || token(i - 1) != token(i);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] = starts ? row[k] : sum[k] + row[k];
      if (ends(i) && began(i))
        store_sum(a.table.at(token(i), col), sum, before[j]);
      else if (ends(i) || i + 1 == count)
        store<V>(a.part(chunk, began(i) ? 1 : 0, col), sum);
    }
  }
  if (blockIdx.y == 0 && thread == 0 && !ends(count - 1) && began(count - 1))
    a.long_runs[1 + atomicAdd(a.long_runs, 1)] = static_cast<int32_t>(chunk);
}

// Blocks (some of the long runs, columns); of a block's 32 packs of columns, each warp adds up some parts.
template <class Dx, class Table, int V>
__global__ void __launch_bounds__(kThreads) sum_long_runs(const Scatter<Dx, Table> a) {
  constexpr int kWarps = kThreads / 32, kAtOnce = 4;  // loads that are under way together
  __shared__ Pack<V> sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = (int64_t{blockIdx.y} * 32 + lane) * V, chunks = (a.n + kChunk - 1) / kChunk;
  const bool there = col < a.width;
  const int32_t runs = *a.long_runs;
  for (int32_t run = blockIdx.x; run < runs; run += gridDim.x) {
    const int64_t first = a.long_runs[1 + run];
    const int32_t token = a.tokens[(first + 1) * kChunk];
    Pack<V> sum;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0;
    if (warp == 0 && there) sum = load<V>(a.part(first, 1, col));
    bool goes_on = true;
    for (int64_t chunk = first + 1 + warp; goes_on; chunk += kAtOnce * kWarps) {
      Pack<V> parts[kAtOnce];
      bool same[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t at = chunk + i * kWarps;
        same[i] = at < chunks && a.tokens[at * kChunk] == token;
        if (same[i] && there) parts[i] = load<V>(a.part(at, 0, col));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!same[i] || !there) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += parts[i][j];
      }
      goes_on = same[kAtOnce - 1];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && there) {
      for (int w = 1; w < kWarps; ++w) {
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += sums[w][lane][j];
      }
      Table* const to = a.table.at(token, col);
      store_sum(to, sum, load_raw<V>(to));
    }
    __syncthreads();
  }
}

int64_t rounded_up(int64_t bytes) {
  return ceil_div(bytes, 256) * 256;
}

}  // namespace

void embedding(const EmbeddingArgs& a, cudaStream_t stream) {
  require(a.x.cols == a.table.cols && a.x.type == a.table.type && a.vocabulary <= a.table.rows,
          "every token has a row of the table");
  with_type(a.x.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(packed({a.x, a.table}), [&](auto v) {
      constexpr int V = v();
      const Lookup<T, V> lookup{a.ids, a.vocabulary, Rows<const T>(a.table), Rows<T>(a.x), a.invalid};
      map<V, 2>(lookup, a.x.rows, a.x.cols, stream);
    });
  });
}

int64_t embedding_bwd_scratch(int64_t tokens, int64_t cols) {
  if (tokens <= 0) return 0;
  const int64_t chunks = ceil_div(tokens, kChunk);
  const auto bytes = static_cast<int64_t>(sizeof(int32_t));
  return 2 * rounded_up(tokens * bytes) + rounded_up((1 + chunks) * bytes) +
         rounded_up(chunks * 2 * cols * static_cast<int64_t>(sizeof(float)));
}

void embedding_bwd(const EmbeddingBwdArgs& a, cudaStream_t stream) {
  require(a.dx.cols == a.d_table.cols, "every token has a gradient");
  if (!a.accumulate) clear({a.d_table}, stream);
  const int64_t n = a.dx.rows;
  if (n <= 0) return;
  auto* at = static_cast<std::byte*>(a.scratch);
  const auto take = [&](int64_t bytes) {
    std::byte* const taken = at;
    at += rounded_up(bytes);
    return taken;
  };
  const int64_t list = n * static_cast<int64_t>(sizeof(int32_t)), chunks = ceil_div(n, kChunk);
  auto* const tokens = reinterpret_cast<int32_t*>(take(list));
  auto* const positions = reinterpret_cast<int32_t*>(take(list));
  auto* const long_runs =
      reinterpret_cast<int32_t*>(take((1 + chunks) * static_cast<int64_t>(sizeof(int32_t))));
  auto* const partials =
      reinterpret_cast<float*>(take(chunks * 2 * a.dx.cols * static_cast<int64_t>(sizeof(float))));
  const int bits = class_bits(a.d_table.rows);
  const auto class_tokens = static_cast<int>(ceil_div(a.d_table.rows, int64_t{1} << bits));
  sort_class<<<1U << bits, kSortThreads, kSortWarps * static_cast<size_t>(class_tokens) * sizeof(int32_t),
               stream>>>({a.ids, n, static_cast<uint32_t>(a.d_table.rows - 1), bits, class_tokens, tokens,
                          positions, long_runs});
  with_type(a.dx.type, [&](auto dx_type) {
    with_type(a.d_table.type, [&](auto table_type) {
      using Dx = typename decltype(dx_type)::type;
      using Table = typename decltype(table_type)::type;
      with_pack(packed({a.dx, a.d_table}), [&](auto v) {
        constexpr int V = v();
        const Scatter<Dx, Table> scatter{
            tokens,   positions, n, a.dx.cols, Rows<const Dx>(a.dx), Rows<Table>(a.d_table),
            partials, long_runs};
        const int64_t packs = a.dx.cols / V;
        const auto across = [&](int64_t packs_of_block) {
          return static_cast<unsigned>(ceil_div(packs, packs_of_block));
        };
        sum_chunks<Dx, Table, V>
            <<<dim3(static_cast<unsigned>(chunks), across(kThreads)), kThreads, 0, stream>>>(scatter);
        const auto some = static_cast<unsigned>(std::min<int64_t>(chunks, kMultiprocessors));
        sum_long_runs<Dx, Table, V><<<dim3(some, across(32)), kThreads, 0, stream>>>(scatter);
      });
    });
  });
  check_launch("embedding_bwd");
}

}  // namespace mop::kernels
