#include "kernels/norm.h"
#include "kernels/partials.cuh"
#include "kernels/rms.cuh"

namespace mop::kernels {
namespace {

template <class T>
struct Forward {
  Rows<const T> x, residual;
  Rows<T> y, sum;
  const T* w;
};

template <class T, int V, int Packs>
__global__ void __launch_bounds__(kMostThreads<V>) forward(const Forward<T> a, const Groups groups) {
  const int threads = groups.threads, thread = threadIdx.x % threads, at_once = blockDim.x / threads;
  int turn = 0;
  for (uint32_t first = blockIdx.x * at_once; first < groups.count; first += gridDim.x * at_once) {
    const uint32_t group = first + threadIdx.x / threads;
    const bool there = group < groups.count;
    const uint32_t row = group / groups.each, col = group % groups.each * (groups.packs * V);
    Pack<V> x[Packs];
    float squares[1] = {0};
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = thread + i * threads;
      if (there && pack < groups.packs) x[i] = load<V>(a.x.at(row, col + pack * V));
    }
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = thread + i * threads;
      if (!there || pack >= groups.packs) continue;
      if (a.residual.data != nullptr) {
        const Pack<V> more = load<V>(a.residual.at(row, col + pack * V));
#pragma unroll
        for (int j = 0; j < V; ++j) x[i][j] += more[j];
      }
      if (a.sum.data != nullptr) {
        store<V>(a.sum.at(row, col + pack * V), x[i]);
#pragma unroll
        for (int j = 0; j < V; ++j) x[i][j] = rounded<T>(x[i][j]);  // backward sees the sum as it is stored
      }
#pragma unroll
      for (int j = 0; j < V; ++j) squares[0] += x[i][j] * x[i][j];
    }
    sum_over_group(squares, threads, turn);
    const float inverse = 1 / sqrtf(squares[0] / groups.d + groups.eps);
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = thread + i * threads;
      if (!there || pack >= groups.packs) continue;
      const Pack<V> w = load<V>(a.w + pack * V);
#pragma unroll
      for (int j = 0; j < V; ++j) x[i][j] = w[j] * (x[i][j] * inverse);
      store<V>(a.y.at(row, col + pack * V), x[i]);
    }
  }
}

template <class T, class Dy>
struct Backward {
  Rows<const Dy> dy;
  Rows<const T> x, d_sum;
  Rows<T> dx;
  const T* w;
  float* partials;  // (blocks, d)
};

template <class T, class Dy, int V, int Packs>
__global__ void __launch_bounds__(kMostThreads<V>) backward(const Backward<T, Dy> a, const Groups groups) {
  const int threads = groups.threads, thread = threadIdx.x % threads, at_once = blockDim.x / threads;
  const uint32_t step = gridDim.x * at_once;
  Pack<V> dw[Packs];
#pragma unroll
  for (int i = 0; i < Packs; ++i)
#pragma unroll
    for (int j = 0; j < V; ++j) dw[i][j] = 0;

  struct Loaded {
    Raw<V, T> x, d_sum;
    Raw<V, Dy> dy;
  } next[Packs];
  const auto load_group = [&](uint32_t group) {
    if (group >= groups.count) return;
    const uint32_t row = group / groups.each, col = group % groups.each * (groups.packs * V);
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = thread + i * threads;
      if (pack >= groups.packs) continue;
      next[i].x = load_raw<V>(a.x.at(row, col + pack * V));
      next[i].dy = load_raw<V>(a.dy.at(row, col + pack * V));
      if (a.d_sum.data != nullptr) next[i].d_sum = load_raw<V>(a.d_sum.at(row, col + pack * V));
    }
  };
  uint32_t first = blockIdx.x * at_once;
  load_group(first + threadIdx.x / threads);
  int turn = 0;
  for (; first < groups.count; first += step) {
    const uint32_t group = first + threadIdx.x / threads;
    const bool there = group < groups.count;
    const uint32_t row = group / groups.each, col = group % groups.each * (groups.packs * V);
    Loaded now[Packs];
#pragma unroll
    for (int i = 0; i < Packs; ++i) now[i] = next[i];
    load_group(group + step);  // under way while this one is worked on
    float sums[2] = {0, 0};    // of x^2, dy w x
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = thread + i * threads;
      if (!there || pack >= groups.packs) continue;
      const Pack<V> x = unpack(now[i].x), dy = unpack(now[i].dy), w = load<V>(a.w + pack * V);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sums[0] += x[j] * x[j];
        sums[1] += dy[j] * w[j] * x[j];
      }
    }
    sum_over_group(sums, threads, turn);
    const float inverse = 1 / sqrtf(sums[0] / groups.d + groups.eps),
                projection = sums[1] * inverse / groups.d;
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = thread + i * threads;
      if (!there || pack >= groups.packs) continue;
      const Pack<V> x = unpack(now[i].x), dy = unpack(now[i].dy), w = load<V>(a.w + pack * V);
      Pack<V> dx;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float x_hat = x[j] * inverse;
        dw[i][j] += dy[j] * x_hat;
        dx[j] = inverse * (dy[j] * w[j] - x_hat * projection);
      }
      if (a.d_sum.data != nullptr) {
        const Pack<V> d_sum = unpack(now[i].d_sum);
#pragma unroll
        for (int j = 0; j < V; ++j) dx[j] += d_sum[j];
      }
      store<V>(a.dx.at(row, col + pack * V), dx);
    }
  }
  store_weight_gradient<V>(dw, groups.packs, threads, Held{thread, threads},
                           a.partials + int64_t{blockIdx.x} * (groups.packs * V));
}

void check_norm(const ConstMatrix& x, const ConstMatrix& w) {
  require(w.cols > 0 && x.cols % w.cols == 0, "a norm's columns are whole groups");
  require(w.cols <= kWidestNorm, "a norm is over at most 16384 columns");
  require(x.rows * (x.cols / w.cols) < int64_t{1} << 31, "a norm has less than 2^31 groups");
  require(w.type == x.type, "a norm's weight has the type of its input");
}

template <class T, int V, int Packs>
void launch_forward(const RmsNormArgs& a, cudaStream_t stream) {
  const int64_t packs = a.w.cols / V;
  const Division division = divide(packs, Packs);
  const Groups groups = groups_of(a.x, a.w.cols, static_cast<int>(packs), division.threads, a.eps);
  const Forward<T> kernel{Rows<const T>(a.x), Rows<const T>(a.residual), Rows<T>(a.y), Rows<T>(a.sum),
                          static_cast<const T*>(a.w.data)};
  forward<T, V, Packs>
      <<<static_cast<unsigned>(ceil_div(groups.count, division.groups())), division.block, 0, stream>>>(
          kernel, groups);
  check_launch("rms_norm");
}

}  // namespace

void rms_norm(const RmsNormArgs& a, cudaStream_t stream) {
  check_norm(a.x, a.w);
  require(same_shape(a.x, a.residual) && same_shape(a.x, a.y) && same_shape(a.x, a.sum),
          "a norm keeps the shape");
  if (a.x.rows <= 0) return;
  const bool wide = packed({a.x, a.w, a.residual, a.y, a.sum}) && a.w.cols % kPack == 0;
  with_type(a.x.type, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!wide) return launch_forward<T, 1, kNormElements>(a, stream);
    const int64_t packs = a.w.cols / kPack;
    // A warp holds a row as long as it fits; all of a thread's loads are under way at once.
    if (packs <= 32) return launch_forward<T, kPack, 1>(a, stream);
    if (packs <= 64) return launch_forward<T, kPack, 2>(a, stream);
    launch_forward<T, kPack, 4>(a, stream);
  });
}

void rms_norm_bwd(const RmsNormBwdArgs& a, cudaStream_t stream) {
  check_norm(a.x, a.w);
  require(same_shape(a.x, a.dy) && same_shape(a.x, a.d_sum) && same_shape(a.x, a.dx) && a.dw.cols == a.w.cols,
          "a norm keeps the shape");
  require(a.dy.type == a.x.type || a.dy.type == Type::f32, "a norm's output gradient is of its type or fp32");
  const int64_t d = a.w.cols, blocks = norm_blocks(a.x.rows * (a.x.cols / d), d);
  const bool wide = packed({a.dy, a.x, a.w, a.d_sum, a.dx}) && d % kPack == 0 && aligned(a.scratch);
  const auto launch = [&](auto type, auto dy_type) {
    using T = typename decltype(type)::type;
    using Dy = typename decltype(dy_type)::type;
    with_norm_packs(wide, d, [&](auto v, auto per_thread) {
      constexpr int V = v(), Packs = per_thread();
      const Division division = divide(d / V, Packs);
      const Backward<T, Dy> kernel{Rows<const Dy>(a.dy),
                                   Rows<const T>(a.x),
                                   Rows<const T>(a.d_sum),
                                   Rows<T>(a.dx),
                                   static_cast<const T*>(a.w.data),
                                   a.scratch};
      backward<T, Dy, V, Packs><<<static_cast<unsigned>(blocks), division.block, 0, stream>>>(
          kernel, groups_of(a.x, d, static_cast<int>(d / V), division.threads, a.eps));
    });
  };
  if (a.x.type == Type::f32)
    launch(Tag<float>{}, Tag<float>{});
  else if (a.dy.type == Type::f32)
    launch(Tag<bf16>{}, Tag<float>{});
  else
    launch(Tag<bf16>{}, Tag<bf16>{});
  check_launch("rms_norm_bwd");
  sum_partials(a.scratch, blocks, d, a.dw.data, a.dw.type, a.accumulate, stream);
}

int64_t rms_norm_bwd_scratch(int64_t rows, int64_t cols, int64_t d) {
  return norm_blocks(rows * (cols / d), d) * d * static_cast<int64_t>(sizeof(float));
}

}  // namespace mop::kernels
