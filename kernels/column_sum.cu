#include "kernels/column_sum.h"
#include "kernels/partials.cuh"

namespace mop::kernels {
namespace {

constexpr int kLanes = 8;  // rows that a block adds up side by side; 32 packs of columns
constexpr int64_t kTileRows = 128;

template <int Most>
struct Segments {  // rows that are added up together
  struct Segment {
    void* sum;
    int32_t first, rows, first_tile, tiles;
  } segment[Most];
  int count = 0;
};

template <class T, int V, int Most>
__global__ void __launch_bounds__(32 * kLanes)
    sum_tiles(const __grid_constant__ Segments<Most> segments, Rows<const T> x, int64_t cols,
              const float* weights, float* partials) {
  __shared__ float sums[kLanes][32 * V];
  const auto tile = static_cast<int32_t>(blockIdx.x);
  // The last segment that starts at or before the tile; those without rows end where they start.
  int low = 0, high = segments.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (segments.segment[middle].first_tile <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t done = (tile - segments.segment[low].first_tile) * kTileRows;
  const int64_t first = segments.segment[low].first + done;
  const int64_t last = first + min(kTileRows, segments.segment[low].rows - done);
  const int64_t begin = int64_t{blockIdx.y} * 32 * V, col = begin + threadIdx.x * V;
  Pack<V> sum;
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = 0;
  if (col < cols) {
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < last; row += kLanes) {
      const Pack<V> more = load<V>(x.at(row, col));
      const float weight = weights != nullptr ? weights[row] : 1;
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += weight * more[i];
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sums[threadIdx.y][threadIdx.x * V + i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.y * 32 + threadIdx.x; i < 32 * V; i += 32 * kLanes) {
    if (begin + i >= cols) continue;
    float all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all += sums[lane][i];
    partials[tile * cols + begin + i] = all;
  }
}

// Blocks (columns, segments).
template <int Most>
__global__ void __launch_bounds__(1024)
    finish(const __grid_constant__ Segments<Most> segments, const float* partials, int64_t cols, Type type,
           bool accumulate) {
  const auto& segment = segments.segment[blockIdx.y];
  sum_partial_columns(partials + segment.first_tile * cols, segment.tiles, cols, segment.sum, type,
                      accumulate);
}

template <int Most>
void run(const Segments<Most>& segments, int64_t tiles, const ConstMatrix& x, const float* weights, Type type,
         bool accumulate, float* partials, cudaStream_t stream) {
  if (segments.count == 0 || x.cols <= 0) return;
  with_type(x.type, [&](auto x_type) {
    using T = typename decltype(x_type)::type;
    with_pack(packed(x), [&](auto v) {
      const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(x.cols, 32 * v())));
      if (tiles > 0)
        sum_tiles<T, v(), Most>
            <<<grid, dim3(32, kLanes), 0, stream>>>(segments, Rows<const T>(x), x.cols, weights, partials);
    });
  });
  finish<Most><<<dim3(static_cast<unsigned>(ceil_div(x.cols, 32)), static_cast<unsigned>(segments.count)),
                 dim3(32, 32), 0, stream>>>(segments, partials, x.cols, type, accumulate);
  check_launch("column_sum");
}

template <int Most>
void append(Segments<Most>& segments, int64_t& tiles, void* sum, int64_t first, int64_t rows) {
  const int64_t own = ceil_div(rows, kTileRows);
  segments.segment[segments.count++] = {sum, static_cast<int32_t>(first), static_cast<int32_t>(rows),
                                        static_cast<int32_t>(tiles), static_cast<int32_t>(own)};
  tiles += own;
}

}  // namespace

void column_sum(const ColumnSumArgs& a, cudaStream_t stream) {
  require(a.x.cols == a.sum.cols, "a column sum is as wide as its matrix");
  Segments<1> segments;
  int64_t tiles = 0;
  append(segments, tiles, a.sum.data, 0, a.x.rows);
  run(segments, tiles, a.x, nullptr, a.sum.type, a.accumulate, a.scratch, stream);
}

void expert_bias_bwd(const ExpertBiasBwdArgs& a, cudaStream_t stream) {
  require(a.count <= kMostExperts, "a launch takes the biases of at most 1024 experts");
  Segments<kMostExperts> segments;
  int64_t tiles = 0;
  for (int e = 0; e < a.count; ++e) {
    const ExpertRows& rows = a.experts[e];
    require(rows.first >= 0 && rows.first + rows.rows <= a.dy.rows,
            "the rows of a round fit into its buffers");
    if (rows.rows > 0 || !a.accumulate) append(segments, tiles, a.d_biases[e], rows.first, rows.rows);
  }
  run(segments, tiles, a.dy, a.weights, a.type, a.accumulate, a.scratch, stream);
}

int64_t column_sum_scratch(int64_t rows, int64_t cols, int count) {
  return (rows / kTileRows + count) * cols * static_cast<int64_t>(sizeof(float));
}

}  // namespace mop::kernels
