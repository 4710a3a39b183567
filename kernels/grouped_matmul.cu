#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <string>

#include "kernels/check.h"
#include "kernels/elementwise.h"
#include "kernels/fallback.h"
#include "kernels/grouped_matmul.h"
#include "kernels/grouped_problem.h"

namespace mop::kernels {
namespace {

constexpr int kMost = GroupedMatmul::kMostGroups;

// Measured on an H200. Rows of an expert on average, up to which the tiles for few rows are faster; the same
// of weight gradients.
constexpr int64_t kFewRows = 192, kFewRowsOfGradients = 384;
// Tiles along the columns, row of tiles by row of tiles: an expert's weights stay in the L2, and its rows, of
// which there may be any number, are read once. Weights of more bytes than this do not stay: down the rows,
// they are read once. (H200: 33 MB do, 59 MB do not.)
constexpr int64_t kKeptWeights = int64_t{40} << 20;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Whether the tiles of one product, one wave after the other, fill the device.
bool fills(int64_t tiles, int64_t processors) {
  const int64_t waves = ceil_div(tiles, processors);
  return tiles >= processors &&
         static_cast<double>(tiles) >= GroupedMatmul::kFull * static_cast<double>(waves * processors);
}

int64_t row_bytes(const ConstMatrix& m) {
  return m.ld * static_cast<int64_t>(size_of(m.type));
}

const std::byte* at(const ConstMatrix& m, int64_t row) {
  return static_cast<const std::byte*>(m.data) + row * row_bytes(m);
}

std::byte* of(const ExpertMatrices& all, const ExpertGroup& expert, Type type) {
  const bool own = expert.own >= 0;
  const int64_t offset = own ? expert.own * all.stride : expert.slot * all.spilled_stride;
  return static_cast<std::byte*>(own ? all.own : all.spilled) + offset * static_cast<int64_t>(size_of(type));
}

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}
bool aligned(const ConstMatrix& m) {
  return aligned(m.data) && row_bytes(m) % 16 == 0;
}
bool aligned(const ExpertMatrices& all, Type type) {
  const auto size = static_cast<int64_t>(size_of(type));
  return aligned(all.own) && aligned(all.spilled) && all.ld * size % 16 == 0 && all.stride * size % 16 == 0 &&
         all.spilled_stride * size % 16 == 0;
}

// Experts of one call; arrays of a problem are computed from them on the device.
struct Groups {
  std::array<ExpertGroup, kMost> experts;
  int count = 0;

  void add(const ExpertGroup& expert) {
    if (count == kMost)
      throw CudaError("grouped matmul: at most " + std::to_string(kMost) + " experts a call");
    experts[static_cast<size_t>(count++)] = expert;
  }
  std::span<const ExpertGroup> all() const { return std::span(experts).first(static_cast<size_t>(count)); }
  int64_t rows() const {
    int64_t sum = 0;
    for (const ExpertGroup& expert : all()) sum += expert.last - expert.first;
    return sum;
  }
};

// Which experts share a kernel, and which have one of the library's for themselves.
struct Split {
  Groups together, alone;

  // is_alone(rows): of one expert.
  template <class F>
  Split(std::span<const ExpertGroup> experts, F is_alone) {
    for (const ExpertGroup& expert : experts)
      if (expert.last > expert.first) (is_alone(expert.last - expert.first) ? alone : together).add(expert);
  }
};

// An operand of every group: rows of a matrix, or the expert's own matrix. In bytes but for ld.
struct Operand {
  const std::byte *base = nullptr, *spilled = nullptr;
  int64_t row = 0, stride = 0, spilled_stride = 0;
  int64_t ld = 0;

  Operand() = default;
  explicit Operand(const ConstMatrix& m) : base(at(m, 0)), row(row_bytes(m)), ld(m.ld) {}
  Operand(const ExpertMatrices& all, Type type)
      : base(static_cast<std::byte*>(all.own)),
        spilled(static_cast<std::byte*>(all.spilled)),
        stride(all.stride * static_cast<int64_t>(size_of(type))),
        spilled_stride(all.spilled_stride * static_cast<int64_t>(size_of(type))),
        ld(all.ld) {}

  __device__ const std::byte* of(const ExpertGroup& expert) const {
    if (row != 0) return base + expert.first * row;
    return expert.own >= 0 ? base + expert.own * stride : spilled + expert.slot * spilled_stride;
  }
};

struct Filling {
  Groups groups;
  Operand a, b, c, bias;
  int m, n, k;  // -1: the rows of the group
  GroupedArrays arrays;
};

__global__ void fill(const __grid_constant__ Filling f) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= f.groups.count) return;
  const ExpertGroup expert = f.groups.experts[static_cast<size_t>(i)];
  const int rows = expert.last - expert.first;
  f.arrays.shapes[i] = {f.m < 0 ? rows : f.m, f.n < 0 ? rows : f.n, f.k < 0 ? rows : f.k};
  f.arrays.a[i] = f.a.of(expert);
  f.arrays.b[i] = f.b.of(expert);
  f.arrays.c[i] = const_cast<std::byte*>(f.c.of(expert));
  f.arrays.bias[i] = f.bias.of(expert);
  f.arrays.a_stride[i] = f.a.ld;
  f.arrays.b_stride[i] = f.b.ld;
  f.arrays.c_stride[i] = f.c.ld;
}

constexpr size_t kArrayBytes = (sizeof(GroupedArrays::Shape) + 7 * sizeof(void*)) * kMost;

GroupedArrays arrays_in(void* workspace) {
  auto* next = static_cast<std::byte*>(workspace);
  const auto take = [&]<class T>(T*& array) {
    array = reinterpret_cast<T*>(next);
    next += kMost * sizeof(T);
  };
  GroupedArrays arrays;
  take(arrays.a);
  take(arrays.b);
  take(arrays.c);
  take(arrays.bias);
  take(arrays.a_stride);
  take(arrays.b_stride);
  take(arrays.c_stride);
  take(arrays.shapes);
  return arrays;
}

GroupedProblem prepare(const Filling& filling, int processors, cudaStream_t stream) {
  fill<<<1, kMost, 0, stream>>>(filling);
  check_launch("grouped matmul: arguments");
  return {filling.groups.count, filling.arrays,
          filling.bias.base != nullptr || filling.bias.spilled != nullptr, processors,
          reinterpret_cast<std::byte*>(filling.arrays.a) + (kArrayBytes + 255) / 256 * 256};
}

// Blocks (parts of a matrix, experts).
template <class Word>
__global__ void zero(const __grid_constant__ Groups groups, Operand matrices, int64_t rows, int64_t row_words,
                     int64_t row_bytes) {
  std::byte* row = const_cast<std::byte*>(matrices.of(groups.experts[static_cast<size_t>(blockIdx.y)]));
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t r = 0; r < rows; ++r, row += row_bytes)
    for (int64_t i = first; i < row_words; i += step) reinterpret_cast<Word*>(row)[i] = Word{};
}

// dW(m, n) of all experts without rows = 0, in one launch: there may be many.
void clear_without_rows(std::span<const ExpertGroup> experts, int64_t m, int64_t n, const ExpertMatrices& dw,
                        Type type, int processors, cudaStream_t stream) {
  Groups groups;
  for (const ExpertGroup& expert : experts)
    if (expert.last == expert.first) groups.add(expert);
  if (groups.count == 0) return;
  const auto size = static_cast<int64_t>(size_of(type));
  const bool gapless = dw.ld == n;
  const int64_t rows = gapless ? 1 : m, bytes = (gapless ? m * n : n) * size;
  const auto run = [&]<class Word>(Word) {
    constexpr int kZeroThreads = 256, kBlocks = 8;  // of a multiprocessor
    const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t blocks =
        std::min(ceil_div(words, kZeroThreads), ceil_div(int64_t{kBlocks} * processors, groups.count));
    zero<Word><<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups.count)), kZeroThreads, 0,
                 stream>>>(groups, Operand(dw, type), rows, words, dw.ld * size);
    check_launch("weight gradients of experts without rows");
  };
  if (aligned(dw, type) && bytes % 16 == 0)
    run(uint4{});
  else
    run(uint16_t{});
}

// One expert with each number of rows that Matmul::run_rows tells apart, up to `most`: those that share a
// grouped kernel are among them.
template <class F>
void with_every_plan(int64_t most, bool own, F run) {
  for (int64_t rows = 1; rows <= most;) {
    const int64_t planned = std::min(Matmul::planned_rows(rows), most);
    const ExpertGroup expert{0, static_cast<int32_t>(planned), own ? 0 : -1, own ? -1 : 0};
    run(std::span(&expert, 1));
    rows = planned + 1;
  }
}

}  // namespace

GroupedMatmul::GroupedMatmul(bool by_expert) : by_expert_(by_expert) {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
}

size_t GroupedMatmul::workspace_bytes() const {
  return std::max(Matmul::kWorkspaceBytes, (kArrayBytes + 255) / 256 * 256 + GroupedProblem::kScratchBytes);
}

void GroupedMatmul::multiply(std::span<const ExpertGroup> experts, const ConstMatrix& a,
                             const ExpertMatrices& w, bool transpose, const ExpertMatrices& bias,
                             const Matrix& c, void* workspace, cudaStream_t stream) {
  multiply(By::rows, experts, a, w, transpose, bias, c, workspace, stream);
}

void GroupedMatmul::multiply(By by, std::span<const ExpertGroup> experts, const ConstMatrix& a,
                             const ExpertMatrices& w, bool transpose, const ExpertMatrices& bias,
                             const Matrix& c, void* workspace, cudaStream_t stream) {
  const int64_t n = c.cols, k = a.cols;
  const Type type = c.type;
  if (a.type != type) throw CudaError("grouped matmul: operands are of one type");
  if (n == 0) return;
  const bool by_library = by_expert_ || type != Type::bf16 || n % 8 != 0 || k % 8 != 0 || !aligned(a) ||
                          !aligned(w, type) || !aligned(c) || (bias && !transpose);
  if (by_library && !by_expert_)
    fallback(
        "grouped products of experts run one by one through cuBLAS: they are not bf16, or their sizes or "
        "addresses are "
        "no multiples of 16 bytes");
  // A product that fills the device is faster by the library, but not if a bias is to be written first.
  const auto alone = [&](int64_t rows) {
    return by == By::rows ? fills(ceil_div(rows, kTileRows) * ceil_div(n, kTileColumns), processors_)
                          : by == By::library;
  };
  const Split split(experts, [&](int64_t rows) { return by_library || (!bias && alone(rows)); });
  if (const Groups& groups = split.together; groups.count > 0) {
    GroupedProblem problem = prepare({groups, Operand(a), Operand(w, type), Operand(c), Operand(bias, type),
                                      -1, static_cast<int>(n), static_cast<int>(k), arrays_in(workspace)},
                                     processors_, stream);
    problem.down_rows = n * k * static_cast<int64_t>(size_of(type)) > kKeptWeights;
    const bool few = groups.rows() <= kFewRows * groups.count;
    transpose ? grouped_forward(problem, few, stream) : grouped_data_gradient(problem, few, stream);
  }
  MatmulShape shape;
  shape.n = n, shape.k = k, shape.lda = a.ld, shape.ldb = w.ld, shape.ldc = c.ld;
  shape.transpose_b = transpose, shape.accumulate = static_cast<bool>(bias);
  shape.in = shape.out = type;
  for (const ExpertGroup& expert : split.alone.all()) {
    const int64_t rows = expert.last - expert.first;
    auto* const out = const_cast<std::byte*>(at(c, expert.first));
    if (bias) copy({{of(bias, expert, type), type, rows, n, 0}, {out, type, rows, n, c.ld}}, stream);
    shape.m = rows;
    library_.run_rows(shape, at(a, expert.first), of(w, expert, type), out, workspace, stream);
  }
}

void GroupedMatmul::prepare_multiply(const ConstMatrix& a, const ExpertMatrices& w, bool transpose,
                                     const ExpertMatrices& bias, const Matrix& c, void* workspace,
                                     cudaStream_t stream) {
  // Of rows that have one plan some may fill the device and others not.
  for (const By by : {By::kernel, By::library})
    with_every_plan(a.rows, w.own != nullptr, [&](std::span<const ExpertGroup> one) {
      multiply(by, one, a, w, transpose, bias, c, workspace, stream);
    });
}

void GroupedMatmul::weight_gradient(std::span<const ExpertGroup> experts, const ConstMatrix& a,
                                    const ConstMatrix& b, const ExpertMatrices& dw, Type type,
                                    bool accumulate, void* workspace, cudaStream_t stream) {
  const int64_t m = a.cols, n = b.cols;
  if (a.type != b.type || (type != a.type && type != Type::f32))
    throw CudaError("grouped matmul: A and B are of one type, their weight gradient of that or fp32");
  if (m == 0 || n == 0) return;
  const bool by_library = by_expert_ || a.type != Type::bf16 || m % 8 != 0 || n % 8 != 0 || !aligned(a) ||
                          !aligned(b) || !aligned(dw, type);
  if (by_library && !by_expert_)
    fallback(
        "weight gradients of experts run one by one through cuBLAS: they are not bf16, or their sizes or "
        "addresses are "
        "no multiples of 16 bytes");
  if (!accumulate) clear_without_rows(experts, m, n, dw, type, processors_, stream);
  const Split split(experts, [&](int64_t rows) { return by_library || rows >= kLongGradient; });
  if (const Groups& groups = split.together; groups.count > 0) {
    const Filling filling{groups,
                          Operand(a),
                          Operand(b),
                          Operand(dw, type),
                          {},
                          static_cast<int>(m),
                          static_cast<int>(n),
                          -1,
                          arrays_in(workspace)};
    GroupedProblem problem = prepare(filling, processors_, stream);
    problem.adds = accumulate;
    const bool few = groups.rows() <= kFewRowsOfGradients * groups.count;
    type == Type::bf16 ? grouped_weight_gradient_bf16(problem, few, stream)
                       : grouped_weight_gradient_f32(problem, few, stream);
  }
  MatmulShape shape;
  shape.m = m, shape.n = n, shape.lda = a.ld, shape.ldb = b.ld, shape.ldc = dw.ld;
  shape.transpose_a = true, shape.accumulate = accumulate;
  shape.in = a.type, shape.out = type;
  for (const ExpertGroup& expert : split.alone.all()) {
    shape.k = expert.last - expert.first;
    library_.run_rows(shape, at(a, expert.first), at(b, expert.first), of(dw, expert, type), workspace,
                      stream);
  }
}

void GroupedMatmul::prepare_weight_gradient(const ConstMatrix& a, const ConstMatrix& b,
                                            const ExpertMatrices& dw, Type type, void* workspace,
                                            cudaStream_t stream) {
  const bool own = dw.own != nullptr;
  const ExpertGroup without_rows{0, 0, own ? 0 : -1, own ? -1 : 0};
  weight_gradient({&without_rows, 1}, a, b, dw, type, false, workspace, stream);
  with_every_plan(a.rows, own, [&](std::span<const ExpertGroup> one) {
    for (const bool accumulate : {false, true})
      weight_gradient(one, a, b, dw, type, accumulate, workspace, stream);
  });
}

}  // namespace mop::kernels
