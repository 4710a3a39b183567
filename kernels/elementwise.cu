#include <cub/block/block_reduce.cuh>

#include "kernels/elementwise.h"
#include "kernels/map.cuh"

namespace mop::kernels {
namespace {

// Rows without gaps are one row.
template <class M>
M flat(const M& m, bool together) {
  return m && together ? M{m.data, m.type, 1, m.rows * m.cols, m.rows * m.cols} : m;
}
bool gapless(const ConstMatrix& m) {
  return !m || m.ld == m.cols || m.rows <= 1;
}
// From column `first` on.
template <class M>
M columns(const M& m, int64_t first, int64_t count) {
  if (!m) return m;
  using Byte = std::conditional_t<std::is_same_v<M, ConstMatrix>, const char, char>;
  return {static_cast<Byte*>(m.data) + first * static_cast<int64_t>(size_of(m.type)), m.type, m.rows, count,
          m.ld};
}

// run(wide, operands...): of what is flat, a width that is not whole packs leaves a remainder.
template <class F, class... M>
void in_packs(F&& run, const M&... operands) {
  const bool together = (gapless(operands) && ...);
  [&](const auto&... m) {
    const int64_t cols = std::max({m.cols...}), whole = cols / kPack * kPack;
    const bool starts = (aligned(m.data) && ...);
    if (together && starts && whole > 0 && whole < cols) {
      run(true, columns(m, 0, whole)...);
      run(false, columns(m, whole, cols - whole)...);
    } else {
      run((packed(m) && ...), m...);
    }
  }(flat(operands, together)...);
}

template <int V>
struct Terms {
  Pack<V> a, b;
};

template <class A, class B, class C, int V>
struct Add {
  Rows<const A> a;
  Rows<const B> b;
  Rows<C> c;
  bool accumulate;

  __device__ Terms<V> load(int64_t row, int64_t col) const {
    Terms<V> in;
    in.a = kernels::load<V>(a.at(row, col));
    if (b.data != nullptr) in.b = kernels::load<V>(b.at(row, col));
    if (accumulate) {
      const Pack<V> before = kernels::load<V>(c.at(row, col));
#pragma unroll
      for (int i = 0; i < V; ++i) in.a[i] += before[i];
    }
    return in;
  }
  __device__ void store(int64_t row, int64_t col, Terms<V> in) const {
    if (b.data != nullptr) {
#pragma unroll
      for (int i = 0; i < V; ++i) in.a[i] += in.b[i];
    }
    kernels::store<V>(c.at(row, col), in.a);
  }
};

template <class From, class To, int V>
struct Copy {
  Rows<const From> from;
  Rows<To> to;

  __device__ Pack<V> load(int64_t row, int64_t col) const { return kernels::load<V>(from.at(row, col)); }
  __device__ void store(int64_t row, int64_t col, const Pack<V>& in) const {
    kernels::store<V>(to.at(row, col), in);
  }
};

// bf16 to fp32 by packs of 4: stores of 16 bytes side by side. By 8, a thread's two stores are half of a
// sector each.
struct Widen {
  static constexpr int kElements = 4;
  Rows<const bf16> from;
  Rows<float> to;

  __device__ uint2 load(int64_t row, int64_t col) const {
    return *reinterpret_cast<const uint2*>(from.at(row, col));
  }
  __device__ void store(int64_t row, int64_t col, uint2 in) const {
    const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
    const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000U); };
    *reinterpret_cast<float4*>(to.at(row, col)) = make_float4(low(in.x), high(in.x), low(in.y), high(in.y));
  }
};

template <class T, int V>
struct Scale {
  Rows<const T> x;
  Rows<T> y;
  const float* factor;

  __device__ Pack<V> load(int64_t row, int64_t col) const { return kernels::load<V>(x.at(row, col)); }
  __device__ void store(int64_t row, int64_t col, Pack<V> in) const {
    const float by = *factor;
#pragma unroll
    for (int i = 0; i < V; ++i) in[i] *= by;
    kernels::store<V>(y.at(row, col), in);
  }
};

template <class T, int V>
struct SumReplicas {
  Rows<const T> x;
  Rows<T> y;
  uint32_t replicas, width;

  __device__ Pack<V> load(int64_t row, int64_t col) const {
    const uint32_t head = static_cast<uint32_t>(col) / width, i = static_cast<uint32_t>(col) % width;
    const T* const from = x.at(row, int64_t{head} * replicas * width + i);
    Pack<V> sum = kernels::load<V>(from);
    for (uint32_t replica = 1; replica < replicas; ++replica) {
      const Pack<V> more = kernels::load<V>(from + replica * width);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += more[j];
    }
    return sum;
  }
  __device__ void store(int64_t row, int64_t col, const Pack<V>& in) const {
    kernels::store<V>(y.at(row, col), in);
  }
};

template <class From, class To, int V>
struct SumPieces {
  std::array<const From*, kMostPieces> pieces;
  int count;
  Rows<To> y;
  bool accumulate;

  __device__ Pack<V> load(int64_t, int64_t col) const {
    Pack<V> sum = kernels::load<V>(pieces[0] + col);
#pragma unroll
    for (int piece = 1; piece < kMostPieces; ++piece) {
      if (piece >= count) break;
      const Pack<V> more = kernels::load<V>(pieces[piece] + col);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += more[i];
    }
    if (accumulate) {
      const Pack<V> before = kernels::load<V>(y.at(0, col));
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += before[i];
    }
    return sum;
  }
  __device__ void store(int64_t, int64_t col, const Pack<V>& in) const {
    kernels::store<V>(y.at(0, col), in);
  }
};

// ---- sums of squares

constexpr int kSumResident = 4, kSumBlocks = kSumResident * kMultiprocessors;  // all run from the start
static_assert(kSumBlocks * sizeof(double) == kSquareSumScratch);

// Packs of rows of `packs` each; a single row may have a `tail` of less than a pack.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kSumResident)
    square_sum_kernel(Rows<const T> x, int64_t rows, int64_t packs, int tail, double* partials) {
  const int64_t all = rows * packs, step = int64_t{gridDim.x} * kThreads;
  double sum = 0;
  constexpr int kAtOnce = sizeof(Raw<V, T>) > sizeof(uint4) ? 4 : 8;  // 128 bytes a thread under way
  for (int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x; begin < all; begin += kAtOnce * step) {
    Raw<V, T> raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t pack = begin + i * step;
      if (pack >= all) continue;
      const int64_t row = rows == 1 ? 0 : pack / packs;
      raw[i] = load_raw<V>(x.at(row, (pack - row * packs) * V));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i * step >= all) continue;
      const Pack<V> values = unpack(raw[i]);
      float of_pack = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) of_pack += values[j] * values[j];
      sum += of_pack;
    }
  }
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < tail) {
    const double value = load1(x.at(0, packs * V + threadIdx.x));
    sum += value * value;
  }
  using Reduce = cub::BlockReduce<double, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    finish_square_sum(const double* partials, int count, double replicas, double* to, bool accumulate) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  using Reduce = cub::BlockReduce<double, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) *to = (accumulate ? *to : 0) + sum / replicas;
}

__global__ void clip_factor_kernel(const ClipFactorArgs a) {
  const double norm = sqrt(*a.sum);
  const bool finite = isfinite(norm);
  *a.factor = finite ? static_cast<float>(fmin(1.0, a.max_norm / (norm + 1e-6))) : NAN;
  if (!finite && a.not_finite != nullptr) *a.not_finite = 1;
}

}  // namespace

void add(const AddArgs& args, cudaStream_t stream) {
  require(same_shape(args.a, args.b) && same_shape(args.a, args.c), "what is added has one shape");
  if (!args.b && !args.accumulate) return copy({args.a, args.c}, stream);
  const auto run = [&](bool wide, const ConstMatrix& a, const ConstMatrix& b, const Matrix& c) {
    with_type(a.type, [&](auto a_type) {
      with_type(b ? b.type : a.type, [&](auto b_type) {
        with_type(c.type, [&](auto c_type) {
          using A = typename decltype(a_type)::type;
          using B = typename decltype(b_type)::type;
          using C = typename decltype(c_type)::type;
          with_pack(wide, [&](auto v) {
            const Add<A, B, C, v()> operation{Rows<const A>(a), Rows<const B>(b), Rows<C>(c),
                                              args.accumulate};
            map<v(), 2>(operation, c.rows, c.cols, stream);
          });
        });
      });
    });
  };
  in_packs(run, args.a, args.b, args.c);
}

void copy(const CopyArgs& args, cudaStream_t stream) {
  require(same_shape(args.from, args.to), "a copy keeps the shape");
  const auto run = [&](bool wide, const ConstMatrix& from, const Matrix& to) {
    if (wide && from.type == Type::bf16 && to.type == Type::f32)
      return map<Widen::kElements, 8>(Widen{Rows<const bf16>(from), Rows<float>(to)}, to.rows, to.cols,
                                      stream);
    with_type(from.type, [&](auto from_type) {
      with_type(to.type, [&](auto to_type) {
        using From = typename decltype(from_type)::type;
        using To = typename decltype(to_type)::type;
        with_pack(wide, [&](auto v) {
          const Copy<From, To, v()> operation{Rows<const From>(from), Rows<To>(to)};
          map<v(), 4>(operation, to.rows, to.cols, stream);
        });
      });
    });
  };
  in_packs(run, args.from, args.to);
}

void clear(const ClearArgs& args, cudaStream_t stream) {
  const Matrix x = flat(args.x, gapless(args.x));
  const size_t bytes = size_of(x.type), width = static_cast<size_t>(x.cols) * bytes;
  if (x.rows <= 0 || x.cols <= 0) return;
  check(x.rows == 1 ? cudaMemsetAsync(x.data, 0, width, stream)
                    : cudaMemset2DAsync(x.data, static_cast<size_t>(x.ld) * bytes, 0, width,
                                        static_cast<size_t>(x.rows), stream),
        "clear");
}

void scale(const ScaleArgs& args, cudaStream_t stream) {
  require(same_shape(args.x, args.y) && args.x.type == args.y.type, "scaling keeps the shape and the type");
  const auto run = [&](bool wide, const ConstMatrix& x, const Matrix& y) {
    with_type(x.type, [&](auto type) {
      using T = typename decltype(type)::type;
      with_pack(wide, [&](auto v) {
        const Scale<T, v()> operation{Rows<const T>(x), Rows<T>(y), args.factor};
        map<v(), 4>(operation, y.rows, y.cols, stream);
      });
    });
  };
  in_packs(run, args.x, args.y);
}

void sum_replicas(const SumReplicasArgs& a, cudaStream_t stream) {
  require(a.width > 0 && a.replicas > 0 && a.x.cols == a.y.cols * a.replicas && a.y.cols % a.width == 0 &&
              a.x.rows == a.y.rows && a.x.type == a.y.type,
          "every head has as many replicas");
  with_type(a.x.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(packed({a.x, a.y}) && a.width % kPack == 0, [&](auto v) {
      const SumReplicas<T, v()> operation{Rows<const T>(a.x), Rows<T>(a.y), static_cast<uint32_t>(a.replicas),
                                          static_cast<uint32_t>(a.width)};
      map<v(), 2>(operation, a.y.rows, a.y.cols, stream);
    });
  });
}

void sum_pieces(const SumPiecesArgs& args, cudaStream_t stream) {
  require(args.y.rows == 1 && args.count >= 1 && args.count <= kMostPieces,
          "a row is the sum of a few pieces");
  bool wide = aligned(args.y.data);
  for (int i = 0; i < args.count; ++i) wide = wide && aligned(args.pieces[static_cast<size_t>(i)]);
  const int64_t n = args.y.cols, whole = wide ? n / kPack * kPack : 0;
  with_type(args.type, [&](auto from_type) {
    with_type(args.y.type, [&](auto to_type) {
      using From = typename decltype(from_type)::type;
      using To = typename decltype(to_type)::type;
      const auto run = [&](auto v, int64_t first, int64_t count) {
        SumPieces<From, To, v()> operation{
            {}, args.count, Rows<To>(columns(args.y, first, count)), args.accumulate};
        for (size_t i = 0; i < static_cast<size_t>(args.count); ++i)
          operation.pieces[i] = static_cast<const From*>(args.pieces[i]) + first;
        map<v(), 2>(operation, 1, count, stream);
      };
      run(std::integral_constant<int, kPack>{}, 0, whole);
      run(std::integral_constant<int, 1>{}, whole, n - whole);
    });
  });
}

void square_sum(const SquareSumArgs& args, cudaStream_t stream) {
  const ConstMatrix x = flat(args.x, gapless(args.x));
  const bool wide = aligned(x.data) && (x.rows <= 1 || packed(x));
  int64_t blocks = 0;
  with_type(x.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(wide, [&](auto v) {
      const int64_t packs = x.cols / v();
      blocks = std::clamp<int64_t>(ceil_div(x.rows * packs, kThreads), 1, kSumBlocks);
      square_sum_kernel<T, v()><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
          Rows<const T>(x), x.rows, packs, x.rows == 1 ? static_cast<int>(x.cols % v()) : 0, args.scratch);
    });
  });
  finish_square_sum<<<1, kThreads, 0, stream>>>(args.scratch, static_cast<int>(blocks), args.replicas,
                                                args.sum, args.accumulate);
  check_launch("square_sum");
}

void clip_factor(const ClipFactorArgs& args, cudaStream_t stream) {
  clip_factor_kernel<<<1, 1, 0, stream>>>(args);
  check_launch("clip_factor");
}

}  // namespace mop::kernels
