#include "kernels/device.cuh"
#include "kernels/routing.h"

namespace mop::kernels {
namespace {

constexpr int kWarps = kThreads / 32;

struct Flows {  // 12 KiB of parameters
  Flow flow[kMostFlows];
  int count = 0;
  int32_t first_row = 0, rows = 0;  // all of them together
};

// Position in the order of a row that one of the flows covers.
__device__ inline int32_t position_of(const Flows& flows, int32_t row) {
  int low = 0, high = flows.count - 1;  // the last flow that starts at or before the row
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (flows.flow[middle].at <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return flows.flow[low].first_in_order + row - flows.flow[low].at;
}

// Calls launch(flows) for every kMostFlows of them.
template <class F>
void for_each_launch(const SentRows& sent, F&& launch) {
  require(sent.choices > 0 || sent.flow_count == 0, "a copy is one of a token's choices");
  Flows flows;
  const auto flush = [&] {
    if (flows.rows > 0) launch(flows);
    flows.first_row += flows.rows;
    flows.count = flows.rows = 0;
  };
  for (int64_t i = 0; i < sent.flow_count; ++i) {
    const Flow& flow = sent.flows[i];
    require(flow.at == flows.first_row + flows.rows, "flows follow one another");
    if (flow.rows == 0) continue;
    if (flows.count == kMostFlows) flush();
    flows.flow[flows.count++] = flow;
    flows.rows += flow.rows;
  }
  flush();
}

struct RowCopy {  // in units of the kernel's type
  const void* from = nullptr;
  void* to = nullptr;
  int64_t from_ld = 0, to_ld = 0, width = 0;
};

template <class Unit>
__device__ void copy_row(const RowCopy& copy, int64_t from_row, int64_t to_row, int lane) {
  const Unit* const from = static_cast<const Unit*>(copy.from) + from_row * copy.from_ld;
  Unit* const to = static_cast<Unit*>(copy.to) + to_row * copy.to_ld;
  constexpr int kAtOnce = 4;
  for (int64_t i = lane; i < copy.width; i += 32 * kAtOnce) {
    Unit units[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * 32 < copy.width) units[j] = from[i + j * 32];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * 32 < copy.width) to[i + j * 32] = units[j];
  }
}

// Blocks (flows, slices), a slice being as much of every flow; a warp a row. Flows are usually of ascending
// tokens, so that the copies of a token are read while it is in the cache: slices at work are of like tokens.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    permute_kernel(const __grid_constant__ Flows flows, const int32_t* order, const int32_t choices,
                   const RowCopy x, const RowCopy dy, const float* weights, float* to_weights) {
  const int lane = threadIdx.x % 32;
  const Flow flow = flows.flow[blockIdx.x];
  const int32_t slices = gridDim.y, slice = blockIdx.y;
  const int32_t least = flow.rows / slices, more = flow.rows % slices;  // so many slices have a row more
  const int32_t begin = slice * least + min(slice, more), end = begin + least + (slice < more ? 1 : 0);
  for (int32_t i = begin + threadIdx.x / 32; i < end; i += kWarps) {
    const int32_t row = flow.at + i, copy = order[flow.first_in_order + i], token = copy / choices;
    copy_row<Unit>(x, token, row, lane);
    if (dy.from != nullptr) copy_row<Unit>(dy, token, row, lane);
    if (weights != nullptr && lane == 0) to_weights[row] = weights[copy];
  }
}

// row_of (n k): the row of each copy that is in the round; and d_weights of those copies.
__global__ void __launch_bounds__(kThreads)
    place_copies(const __grid_constant__ Flows flows, const int32_t* order, int32_t* row_of,
                 const float* row_d_weights, float* d_weights) {
  const int32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= flows.rows) return;
  const int32_t row = flows.first_row + index, copy = order[position_of(flows, row)];
  row_of[copy] = row;
  if (d_weights != nullptr) d_weights[copy] = row_d_weights[row];
}

// A warp a token, lane j holding the row of choice j (of 32 at a time).
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const int32_t* row_of, const int choices, const float* weights, Rows<const T> rows,
                Rows<float> y, int64_t tokens, int64_t width) {
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  for (int first = 0; first < choices; first += 32) {
    const int64_t copy = token * choices + first + lane;
    const int32_t row = first + lane < choices ? row_of[copy] : -1;
    const float weight = weights != nullptr && row >= 0 ? weights[copy] : 1;
    const unsigned there = __ballot_sync(kAllLanes, row >= 0);
    if (there == 0) continue;
    constexpr int kAtOnce = 4;                                 // rows whose loads are under way together
    for (int64_t begin = 0; begin < width; begin += 32 * V) {  // all lanes stay for the shuffles
      const int64_t col = begin + lane * V;
      Pack<V> sum;
      if (col < width) sum = load<V>(y.at(token, col));
      for (unsigned left = there; left != 0;) {
        const int count = min(__popc(left), kAtOnce);
        Raw<V, T> more[kAtOnce];
        float factors[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (i >= count) continue;
          const int source = __ffs(left) - 1;
          const int32_t from = __shfl_sync(kAllLanes, row, source);
          factors[i] = __shfl_sync(kAllLanes, weight, source);
          if (col < width) more[i] = load_raw<V>(rows.at(from, col));
          left &= left - 1;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (i >= count || col >= width) continue;
          const Pack<V> values = unpack(more[i]);
#pragma unroll
          for (int j = 0; j < V; ++j) sum[j] += factors[i] * values[j];
        }
      }
      if (col < width) store<V>(y.at(token, col), sum);
    }
  }
}

void gather(const SentRows& sent, const ConstMatrix& rows, const float* weights, const Matrix& y,
            const float* row_d_weights, float* d_weights, int32_t* scratch, cudaStream_t stream) {
  require(y.type == Type::f32, "rows are added up in fp32");
  require(rows.cols == y.cols, "rows that are added have one width");
  if (y.rows <= 0 || sent.flow_count == 0) return;
  check(cudaMemsetAsync(scratch, 0xff, static_cast<size_t>(unpermute_scratch(y.rows, sent.choices)), stream),
        "unpermute");
  for_each_launch(sent, [&](const Flows& flows) {
    require(flows.first_row + flows.rows <= rows.rows, "the rows of a round fit into its buffers");
    place_copies<<<static_cast<unsigned>(ceil_div(flows.rows, kThreads)), kThreads, 0, stream>>>(
        flows, sent.order, scratch, row_d_weights, d_weights);
  });
  with_type(rows.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(packed({rows, y}), [&](auto v) {
      gather_rows<T, v()><<<static_cast<unsigned>(ceil_div(y.rows, kWarps)), kThreads, 0, stream>>>(
          scratch, static_cast<int>(sent.choices), weights, Rows<const T>(rows), Rows<float>(y), y.rows,
          y.cols);
    });
  });
  check_launch("unpermute");
}

// Of every flow: so many that a block has a row a warp, but of flows much longer than others several.
int64_t slices_of(const Flows& flows) {
  int32_t longest = 0;
  for (int i = 0; i < flows.count; ++i) longest = std::max(longest, flows.flow[i].rows);
  const int64_t even = ceil_div(flows.rows, int64_t{flows.count} * kWarps);
  return std::min({ceil_div(longest, kWarps), 4 * even, int64_t{65535}});
}

// In bytes, or whatever units all of it is aligned to.
RowCopy row_copy(const ConstMatrix& from, const Matrix& to, int64_t unit) {
  if (!from) return {};
  const auto bytes = static_cast<int64_t>(size_of(from.type));
  return {from.data, to.data, from.ld * bytes / unit, to.ld * bytes / unit, from.cols * bytes / unit};
}

bool divisible(const ConstMatrix& m, int64_t unit) {
  const auto bytes = static_cast<int64_t>(size_of(m.type));
  return !m || (reinterpret_cast<uintptr_t>(m.data) % unit == 0 && m.cols * bytes % unit == 0 &&
                m.ld * bytes % unit == 0);
}

}  // namespace

void permute(const PermuteArgs& a, cudaStream_t stream) {
  require(bool(a.dy) == bool(a.to_dy) && (a.weights == nullptr) == (a.to_weights == nullptr),
          "what is permuted comes and goes");
  require(a.x.type == a.to_x.type && a.x.cols == a.to_x.cols && a.dy.type == a.to_dy.type &&
              a.dy.cols == a.to_dy.cols,
          "rows are copied as they are");
  const auto run = [&](auto unit) {
    using Unit = decltype(unit);
    constexpr auto kBytes = static_cast<int64_t>(sizeof(Unit));
    for_each_launch(a.sent, [&](const Flows& flows) {
      require(flows.first_row + flows.rows <= a.to_x.rows, "the rows of a round fit into its buffers");
      const dim3 grid(static_cast<unsigned>(flows.count), static_cast<unsigned>(slices_of(flows)));
      permute_kernel<Unit><<<grid, kThreads, 0, stream>>>(
          flows, a.sent.order, static_cast<int32_t>(a.sent.choices), row_copy(a.x, a.to_x, kBytes),
          row_copy(a.dy, a.to_dy, kBytes), a.weights, a.to_weights);
    });
  };
  const auto fits = [&](int64_t unit) {
    return divisible(a.x, unit) && divisible(a.to_x, unit) && divisible(a.dy, unit) &&
           divisible(a.to_dy, unit);
  };
  if (fits(16))
    run(uint4{});
  else if (fits(4))
    run(uint32_t{});
  else
    run(uint16_t{});
  check_launch("permute");
}

void unpermute(const UnpermuteArgs& a, cudaStream_t stream) {
  gather(a.sent, a.rows, a.weights, a.y, nullptr, nullptr, a.scratch, stream);
}

void unpermute_bwd(const UnpermuteBwdArgs& a, cudaStream_t stream) {
  gather(a.sent, a.rows, nullptr, a.dx, a.row_d_weights, a.d_weights, a.scratch, stream);
}

int64_t unpermute_scratch(int64_t tokens, int64_t choices) {
  return tokens * choices * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace mop::kernels
