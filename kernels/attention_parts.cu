#include "kernels/attention_parts.h"
#include "kernels/device.cuh"

namespace mop::kernels {
namespace {

constexpr int kScanThreads = 1024;
constexpr int64_t kSlab = 512;  // rows whose sum one block makes

// One block: every thread has a run of rows; how many documents begin in the runs before its own is a scan.
__global__ void __launch_bounds__(kScanThreads)
    find_documents_kernel(const int32_t* starts, int32_t t, DocumentTable table) {
  __shared__ int32_t counts[kScanThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t run = (t + kScanThreads - 1) / kScanThreads, first = min(thread * run, t),
                last = min(first + run, t);
  int32_t mine = 0;
  for (int32_t i = first; i < last; ++i) mine += starts[i] == i;
  counts[thread] = mine;
  __syncthreads();
  for (int distance = 1; distance < kScanThreads; distance *= 2) {
    const int32_t before = thread >= distance ? counts[thread - distance] : 0;
    __syncthreads();
    counts[thread] += before;
    __syncthreads();
  }
  int32_t next = counts[thread] - mine;
  for (int32_t i = first; i < last; ++i)
    if (starts[i] == i && next < table.documents) table.begins[next++] = i;
  const int32_t all = min(counts[kScanThreads - 1], static_cast<int32_t>(table.documents));
  for (int32_t i = all + thread; i <= table.documents; i += kScanThreads) table.begins[i] = t;
}

__global__ void scale_begins(DocumentTable table, RowStrides strides) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i > table.documents) return;
  const int32_t begin = table.begins[i];
  if (i < table.documents) table.lengths[i] = table.begins[i + 1] - begin;
  for (int operand = 0; operand < strides.count; ++operand)
    table.offsets[operand * (table.documents + 1) + i] = begin * strides.ld[operand];
}

__global__ void take_sinks_kernel(ConstMatrix values, int64_t first, int64_t heads, float* to) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < heads) to[i] = load1(values.data, values.type, first + i);
}

// A block has the rows of a slab for one head, a warp a row at a time.
template <int V>
__global__ void __launch_bounds__(kThreads) sink_partials_kernel(SinkGradient args) {
  const int64_t head = blockIdx.y, begin = int64_t{blockIdx.x} * kSlab, end = min(begin + kSlab, args.t);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const float sink = args.sinks[head];
  float sums[1] = {0};
  for (int64_t row = begin + warp; row < end; row += kThreads / 32) {
    const bf16* const o = static_cast<const bf16*>(args.o) + row * args.o_ld + head * args.v_dim;
    const bf16* const d_o = static_cast<const bf16*>(args.d_o) + row * args.do_ld + head * args.v_dim;
    float dot = 0;
    for (int64_t i = lane * V; i < args.v_dim; i += 32 * V) {
      const Pack<V> x = load<V>(o + i), y = load<V>(d_o + i);
#pragma unroll
      for (int j = 0; j < V; ++j) dot += x[j] * y[j];
    }
    const float lse = args.lse[row / args.context * args.sequence_stride +
                               row % args.context * args.row_stride + head * args.head_stride];
    sums[0] -= expf(sink - lse) * dot;
  }
  int turn = 0;
  sum_over_group(sums, kThreads, turn);
  if (threadIdx.x == 0) args.partials[head * gridDim.x + blockIdx.x] = sums[0];
}

__global__ void sink_gradient_kernel(SinkGradient args, int64_t slabs) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, head = i - args.first;
  if (i >= args.d_sinks.cols) return;
  float sum = 0;
  if (head >= 0 && head < args.heads)
    for (int64_t slab = 0; slab < slabs; ++slab) sum += args.partials[head * slabs + slab];
  if (args.add) sum += load1(args.d_sinks.data, args.d_sinks.type, i);
  store1(args.d_sinks.data, args.d_sinks.type, i, sum);
}

unsigned blocks(int64_t items) {
  return static_cast<unsigned>(ceil_div(items, kThreads));
}

}  // namespace

void find_documents(const int32_t* starts, int64_t t, const DocumentTable& table, const RowStrides& strides,
                    cudaStream_t stream) {
  find_documents_kernel<<<1, kScanThreads, 0, stream>>>(starts, static_cast<int32_t>(t), table);
  check_launch("find_documents");
  scale_begins<<<blocks(table.documents + 1), kThreads, 0, stream>>>(table, strides);
  check_launch("find_documents");
}

void take_sinks(const ConstMatrix& values, int64_t first, int64_t heads, float* to, cudaStream_t stream) {
  require(first >= 0 && first + heads <= values.cols, "every head of this rank has a sink");
  take_sinks_kernel<<<blocks(heads), kThreads, 0, stream>>>(values, first, heads, to);
  check_launch("take_sinks");
}

int64_t sink_partials(int64_t t, int64_t heads) {
  return heads * ceil_div(t, kSlab);
}

void sink_gradient(const SinkGradient& args, cudaStream_t stream) {
  const int64_t slabs = ceil_div(args.t, kSlab);
  const dim3 grid(static_cast<unsigned>(slabs), static_cast<unsigned>(args.heads));
  require(args.v_dim % kPack == 0 && args.o_ld % kPack == 0 && args.do_ld % kPack == 0,
          "heads are whole packs");
  sink_partials_kernel<kPack><<<grid, kThreads, 0, stream>>>(args);
  check_launch("sink_gradient");
  sink_gradient_kernel<<<blocks(args.d_sinks.cols), kThreads, 0, stream>>>(args, slabs);
  check_launch("sink_gradient");
}

}  // namespace mop::kernels
