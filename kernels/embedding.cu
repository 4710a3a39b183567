#include <cub/device/device_radix_sort.cuh>

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

// Backward: positions sorted by token, in chunks. A token's positions are a run; what a chunk has of a run
// that goes on beyond it is a partial sum: part 0 of the chunk if the run began before the chunk, else
// part 1.
constexpr int64_t kChunk = 32;

__global__ void count_up(int32_t* to, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) to[i] = static_cast<int32_t>(i);
}

template <class Dx, class Table>
struct Scatter {
  const int32_t *tokens, *positions;  // (n), sorted
  int64_t n, width;
  Rows<const Dx> dx;
  Rows<Table> table;
  float* partials;  // (chunks, 2, width)

  __device__ bool begins(int64_t i) const { return i == 0 || tokens[i - 1] != tokens[i]; }
  __device__ bool ends(int64_t i) const { return i + 1 == n || tokens[i + 1] != tokens[i]; }
  __device__ float* part(int64_t chunk, int which, int64_t col) const {
    return partials + (chunk * 2 + which) * width + col;
  }
};

template <int V, class T>
__device__ void add_to(T* to, const Pack<V>& sum) {
  Pack<V> all = load<V>(to);
#pragma unroll
  for (int i = 0; i < V; ++i) all[i] += sum[i];
  store<V>(to, all);
}

// Blocks (chunks, columns).
template <class Dx, class Table, int V>
__global__ void __launch_bounds__(kThreads) sum_chunks(const Scatter<Dx, Table> a) {
  const int64_t col = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (col >= a.width) return;
  const int64_t chunk = blockIdx.x, first = chunk * kChunk, last = min(first + kChunk, a.n);
  Pack<V> sum;
  bool began = false;  // the run in this chunk
  constexpr int kAtOnce = 4;
  for (int64_t begin = first; begin < last; begin += kAtOnce) {
    Pack<V> rows[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (begin + i < last) rows[i] = load<V>(a.dx.at(a.positions[begin + i], col));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = begin + i;
      if (at >= last) continue;
      if (at == first || a.begins(at)) {
        sum = rows[i];
        began = a.begins(at);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += rows[i][j];
      }
      const bool ends = a.ends(at);
      if (ends && began)
        add_to<V>(a.table.at(a.tokens[at], col), sum);
      else if (ends || at + 1 == last)
        store<V>(a.part(chunk, began ? 1 : 0, col), sum);
    }
  }
}

// For runs that go on beyond the chunk where they begin.
template <class Dx, class Table, int V>
__global__ void __launch_bounds__(kThreads) sum_long_runs(const Scatter<Dx, Table> a) {
  const int64_t col = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (col >= a.width) return;
  int64_t chunk = blockIdx.x;
  const int64_t end = (chunk + 1) * kChunk;
  if (end >= a.n || a.ends(end - 1)) return;  // nothing goes on
  const int32_t token = a.tokens[end - 1];
  // It begins here unless the whole chunk and the position before are of the same token.
  if (a.tokens[chunk * kChunk] == token && !a.begins(chunk * kChunk)) return;
  Pack<V> sum = load<V>(a.part(chunk, 1, col));
  const int64_t chunks = (a.n + kChunk - 1) / kChunk;
  constexpr int kAtOnce = 8;  // loads that are under way together
  for (bool goes_on = true; goes_on; chunk += kAtOnce) {
    Pack<V> parts[kAtOnce];
    bool same[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      same[i] = chunk + 1 + i < chunks && a.tokens[(chunk + 1 + i) * kChunk] == token;
      if (chunk + 1 + i < chunks) parts[i] = load<V>(a.part(chunk + 1 + i, 0, col));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      goes_on = goes_on && same[i];
      if (!goes_on) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += parts[i][j];
    }
  }
  add_to<V>(a.table.at(token, col), sum);
}

int64_t rounded_up(int64_t bytes) {
  return ceil_div(bytes, 256) * 256;
}

int bits_of(int64_t vocabulary) {
  return std::bit_width(static_cast<uint64_t>(vocabulary));
}

size_t sort_bytes(int64_t tokens, int64_t vocabulary) {
  size_t bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const int32_t*>(nullptr),
                                        static_cast<int32_t*>(nullptr), static_cast<const int32_t*>(nullptr),
                                        static_cast<int32_t*>(nullptr), tokens, 0, bits_of(vocabulary)),
        "embedding_bwd");
  return bytes;
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

int64_t embedding_bwd_scratch(int64_t tokens, int64_t cols, int64_t vocabulary) {
  if (tokens <= 0) return 0;
  const int64_t list = rounded_up(tokens * static_cast<int64_t>(sizeof(int32_t)));
  return 3 * list + rounded_up(ceil_div(tokens, kChunk) * 2 * cols * static_cast<int64_t>(sizeof(float))) +
         static_cast<int64_t>(sort_bytes(tokens, vocabulary));
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
  auto* const unsorted = reinterpret_cast<int32_t*>(take(list));
  auto* const partials =
      reinterpret_cast<float*>(take(chunks * 2 * a.dx.cols * static_cast<int64_t>(sizeof(float))));
  size_t bytes = sort_bytes(n, a.d_table.rows);
  count_up<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream>>>(unsorted, n);
  check(cub::DeviceRadixSort::SortPairs(at, bytes, a.ids, tokens, unsorted, positions, n, 0,
                                        bits_of(a.d_table.rows), stream),
        "embedding_bwd");
  with_type(a.dx.type, [&](auto dx_type) {
    with_type(a.d_table.type, [&](auto table_type) {
      using Dx = typename decltype(dx_type)::type;
      using Table = typename decltype(table_type)::type;
      with_pack(packed({a.dx, a.d_table}), [&](auto v) {
        constexpr int V = v();
        const Scatter<Dx, Table> scatter{
            tokens, positions, n, a.dx.cols, Rows<const Dx>(a.dx), Rows<Table>(a.d_table), partials};
        const dim3 grid(static_cast<unsigned>(chunks),
                        static_cast<unsigned>(ceil_div(a.dx.cols / V, kThreads)));
        sum_chunks<Dx, Table, V><<<grid, kThreads, 0, stream>>>(scatter);
        sum_long_runs<Dx, Table, V><<<grid, kThreads, 0, stream>>>(scatter);
      });
    });
  });
  check_launch("embedding_bwd");
}

}  // namespace mop::kernels
