#include <cuda_pipeline.h>

#include "kernels/map.cuh"
#include "kernels/norm.h"
#include "kernels/partials.cuh"
#include "kernels/rms.cuh"
#include "kernels/rope.h"

namespace mop::kernels {
namespace {

// Where a thread finds the partners of its elements.
enum class Partners {
  staged,      // in shared memory
  other_pack,  // of the thread's two packs, each has the other's
  same_pack,   // interleaved
};

struct Rotate {
  uint32_t width, first, rotated;
  bool interleaved;
  const float *cos, *sin;
  const int32_t* positions;
  uint32_t tokens;
  float direction;  // -1: the transposed rotation

  __device__ const int32_t* at(uint32_t row) const {
    return positions + (row < tokens ? row : row % tokens);  // no division where there is one sequence
  }
  __device__ int32_t position(uint32_t row) const { return *at(row); }

  // The packs of a group that this thread holds, rotated in place. position: of its row; it waits for memory,
  // and is asked for early. staged: memory for the whole group. Every thread of the block calls it.
  template <Partners P, int V, int Packs>
  __device__ void operator()(Pack<V> (&x)[Packs], float* staged, const Groups& groups, const Held& held,
                             int32_t position, bool there) const {
    const int64_t row = int64_t{position} * (rotated / 2);  // of the tables
    if constexpr (P == Partners::other_pack) {
      if (there) rotate_packs(x, row + (held.first & (held.apart - 1)) * V);
    } else {
      const int threads = groups.threads;
      if constexpr (P == Partners::staged) {
#pragma unroll
        for (int i = 0; i < Packs; ++i) {
          const int pack = held(i);
          if (there && pack < groups.packs) store<V>(staged + pack * V, x[i]);
        }
        sync_group(threads);
      }
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const int pack = held(i);
        if (!there || pack >= groups.packs) continue;
        const auto at = static_cast<uint32_t>(pack * V);
        const uint32_t in_head = at % width - first;  // below `first`: wraps around
        if (in_head >= rotated) continue;
        if constexpr (P == Partners::same_pack)
          rotate_neighbours(x[i], row + in_head / 2);
        else
          rotate_staged(x[i], staged, at, in_head, row);
      }
      if constexpr (P == Partners::staged) sync_group(threads);
    }
  }

 private:
  template <int V>
  __device__ void rotate_packs(Pack<V> (&x)[2], int64_t at) const {
    const Pack<V> c = load<V>(cos + at), s = load<V>(sin + at);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float sine = s[j] * direction, was = x[0][j];
      x[0][j] = was * c[j] - x[1][j] * sine;
      x[1][j] = x[1][j] * c[j] + was * sine;
    }
  }

  template <int V>
  __device__ void rotate_neighbours(Pack<V>& x, int64_t at) const {
    const float4 c = *reinterpret_cast<const float4*>(cos + at),
                 s = *reinterpret_cast<const float4*>(sin + at);
    const float cs[4] = {c.x, c.y, c.z, c.w}, ss[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      const float sine = ss[j / 2] * direction, was = x[j];
      x[j] = was * cs[j / 2] - x[j + 1] * sine;
      x[j + 1] = x[j + 1] * cs[j / 2] + was * sine;
    }
  }

  template <int V>
  __device__ void rotate_staged(Pack<V>& x, const float* staged, uint32_t at, uint32_t in_head,
                                int64_t row) const {
    const uint32_t half = rotated / 2, distance = interleaved ? 1 : half;
    const bool second = interleaved ? in_head % 2 == 1 : in_head >= half;
    const uint32_t pair = interleaved ? in_head / 2 : second ? in_head - half : in_head;
    const Pack<V> partner = load<V>(staged + (second ? at - distance : at + distance));
    const Pack<V> c = load<V>(cos + row + pair), s = load<V>(sin + row + pair);
    const float sign = second ? direction : -direction;
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = x[j] * c[j] + partner[j] * (s[j] * sign);
  }
};

// Of other_pack, packs that are partners are half a head apart: a power of two, as it divides the threads.
template <Partners P, int V>
__device__ inline Held held_by(int thread, int threads, const Rotate& rotate) {
  if constexpr (P == Partners::other_pack) {
    const int apart = static_cast<int>(rotate.width) / (2 * V);
    return {thread + (thread & -apart), apart};
  }
  return {thread, threads};
}

template <class T>
struct Forward {
  Rows<const T> x;
  Rows<T> y;
  const T* w;  // null: no norm
};

template <class T, int V, int Packs, Partners P>
__global__ void __launch_bounds__(kMostThreads<V>)
    forward(const Forward<T> a, const Rotate rotate, const Groups groups) {
  extern __shared__ __align__(16) float staged_all[];
  const int threads = groups.threads, thread = threadIdx.x % threads, at_once = blockDim.x / threads;
  const uint32_t width = groups.packs * V, group = blockIdx.x * at_once + threadIdx.x / threads;
  const bool there = group < groups.count;
  const Held held = held_by<P, V>(thread, threads, rotate);
  const uint32_t row = group / groups.each, col = group % groups.each * width;
  const int32_t position = there ? rotate.position(row) : 0;
  Pack<V> x[Packs];
#pragma unroll
  for (int i = 0; i < Packs; ++i) {
    const int pack = held(i);
    if (there && pack < groups.packs) x[i] = load<V>(a.x.at(row, col + pack * V));
  }
  if (a.w != nullptr) {
    float squares[1] = {0};
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      if (!there || held(i) >= groups.packs) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) squares[0] += x[i][j] * x[i][j];
    }
    int turn = 0;
    sum_over_group(squares, threads, turn);
    const float inverse = 1 / sqrtf(squares[0] / groups.d + groups.eps);
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = held(i);
      if (!there || pack >= groups.packs) continue;
      const Pack<V> w = load<V>(a.w + pack * V);
#pragma unroll
      for (int j = 0; j < V; ++j) x[i][j] = w[j] * (x[i][j] * inverse);
    }
  }
  rotate.operator()<P>(x, staged_all + threadIdx.x / threads * width, groups, held, position, there);
#pragma unroll
  for (int i = 0; i < Packs; ++i) {
    const int pack = held(i);
    if (there && pack < groups.packs) store<V>(a.y.at(row, col + pack * V), x[i]);
  }
}

template <class T>
struct Backward {
  Rows<const T> dy, x;
  Rows<T> dx;
  const T* w;
  float* partials;  // (blocks, d)
};

template <int V, Partners P>
inline constexpr int kMostThreadsOf = P == Partners::other_pack ? kThreads : kMostThreads<V>;

template <class T, int V, int Packs, Partners P>
__global__ void __launch_bounds__(kMostThreadsOf<V, P>)
    backward(const Backward<T> a, const Rotate rotate, const Groups groups) {
  extern __shared__ __align__(16) float staged_all[];
  const int threads = groups.threads, thread = threadIdx.x % threads, at_once = blockDim.x / threads;
  const uint32_t width = groups.packs * V, step = gridDim.x * at_once;
  const Held held = held_by<P, V>(thread, threads, rotate);
  Pack<V> dw[Packs];
#pragma unroll
  for (int i = 0; i < Packs; ++i)
#pragma unroll
    for (int j = 0; j < V; ++j) dw[i][j] = 0;

  struct Loaded {
    Raw<V, T> x, dy;
  } next[Packs];
  int32_t next_position = 0;
  const auto load_group = [&](uint32_t group) {
    if (group >= groups.count) return;
    const uint32_t row = group / groups.each, col = group % groups.each * width;
    next_position = rotate.position(row);
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = held(i);
      if (pack >= groups.packs) continue;
      next[i].dy = load_raw<V>(a.dy.at(row, col + pack * V));
      next[i].x = load_raw<V>(a.x.at(row, col + pack * V));
    }
  };
  uint32_t first = blockIdx.x * at_once;
  load_group(first + threadIdx.x / threads);
  int turn = 0;
  for (; first < groups.count; first += step) {
    const uint32_t group = first + threadIdx.x / threads;
    const bool there = group < groups.count;
    const uint32_t row = group / groups.each, col = group % groups.each * width;
    Raw<V, T> raw_x[Packs];
    Pack<V> dy[Packs];
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      raw_x[i] = next[i].x;
      dy[i] = unpack(next[i].dy);
    }
    const int32_t position = next_position;
    load_group(group + step);  // under way while this one is worked on
    rotate.operator()<P>(dy, staged_all + threadIdx.x / threads * width, groups, held, position, there);
    float sums[2] = {0, 0};  // of x^2, d(normalised) w x
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = held(i);
      if (!there || pack >= groups.packs) continue;
      const Pack<V> x = unpack(raw_x[i]), w = load<V>(a.w + pack * V);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sums[0] += x[j] * x[j];
        sums[1] += dy[i][j] * w[j] * x[j];
      }
    }
    sum_over_group(sums, threads, turn);
    const float inverse = 1 / sqrtf(sums[0] / groups.d + groups.eps),
                projection = sums[1] * inverse / groups.d;
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int pack = held(i);
      if (!there || pack >= groups.packs) continue;
      const Pack<V> x = unpack(raw_x[i]), w = load<V>(a.w + pack * V);
      Pack<V> dx;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float x_hat = x[j] * inverse;
        dw[i][j] += dy[i][j] * x_hat;
        dx[j] = inverse * (dy[i][j] * w[j] - x_hat * projection);
      }
      store<V>(a.dx.at(row, col + pack * V), dx);
    }
  }
  store_weight_gradient<V>(dw, groups.packs, threads, held, a.partials + int64_t{blockIdx.x} * width);
}

// The same for bf16 and Partners::other_pack, of norms of a head that a warp holds. What is loaded ahead
// waits in shared memory, each thread's in its own part: registers hold enough warps to have the arithmetic
// of some beside the loads of others.
constexpr int kBlocksInWarps = 3;  // of a multiprocessor; there are no more of them: all run from the start

__global__ void __launch_bounds__(kThreads, kBlocksInWarps)
    backward_in_warps(const Backward<bf16> a, const Rotate rotate, const Groups groups) {
  constexpr int V = kPack, Packs = 2, kAhead = 2;
  __shared__ Raw<V, bf16> ahead_dy[kAhead][Packs][kThreads], ahead_x[kAhead][Packs][kThreads];
  __shared__ int32_t ahead_position[kAhead][kThreads];
  const int threads = groups.threads, thread = threadIdx.x % threads;
  const uint32_t width = groups.packs * V, step = gridDim.x * (blockDim.x / threads);
  // Of a row, the group `place`. The way to the thread's next group is without divisions: each is as many
  // instructions as the arithmetic on a pack.
  const uint32_t rows_on = step / groups.each, places_on = step % groups.each;
  struct Where {
    uint32_t group, row, place;
  };
  const auto go_on = [&](Where& at) {
    at.group += step, at.row += rows_on, at.place += places_on;
    if (at.place >= groups.each) at.place -= groups.each, ++at.row;
  };
  Where at;
  at.group = (blockIdx.x * blockDim.x + threadIdx.x) / threads;
  at.row = at.group / groups.each, at.place = at.group % groups.each;
  Where loaded = at;
  const auto load_group = [&](int stage) {
    if (loaded.group < groups.count) {
      __pipeline_memcpy_async(&ahead_position[stage][threadIdx.x], rotate.at(loaded.row), sizeof(int32_t));
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const uint32_t col = loaded.place * width + (thread + i * threads) * V;
        __pipeline_memcpy_async(&ahead_dy[stage][i][threadIdx.x], a.dy.at(loaded.row, col), sizeof(uint4));
        __pipeline_memcpy_async(&ahead_x[stage][i][threadIdx.x], a.x.at(loaded.row, col), sizeof(uint4));
      }
    }
    __pipeline_commit();
    go_on(loaded);
  };
  for (int stage = 0; stage < kAhead; ++stage) load_group(stage);

  Pack<V> dw[Packs];
#pragma unroll
  for (int i = 0; i < Packs; ++i)
#pragma unroll
    for (int j = 0; j < V; ++j) dw[i][j] = 0;
  const float share = 1 / groups.d;
  // A warp stays as long as one of its threads has a group: threads sum over their neighbours.
  for (int stage = 0; __any_sync(kAllLanes, at.group < groups.count); stage = (stage + 1) % kAhead) {
    __pipeline_wait_prior(kAhead - 1);
    const bool there = at.group < groups.count;
    Pack<V> dy[Packs];
    float sums[2] = {0, 0};  // of x^2, d(normalised) w x
    if (there) {
#pragma unroll
      for (int i = 0; i < Packs; ++i) dy[i] = unpack(ahead_dy[stage][i][threadIdx.x]);
      rotate.operator()<Partners::other_pack>(dy, nullptr, groups, Held{thread, threads},
                                              ahead_position[stage][threadIdx.x], true);
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const Pack<V> x = unpack(ahead_x[stage][i][threadIdx.x]),
                      w = load<V>(a.w + (thread + i * threads) * V);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sums[0] += x[j] * x[j];
          sums[1] += dy[i][j] * w[j] * x[j];
        }
      }
    }
    for (int offset = threads / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    const float inverse = rsqrtf(sums[0] * share + groups.eps),
                along_x = sums[1] * share * inverse * inverse * inverse;
    if (there) {
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const Pack<V> x = unpack(ahead_x[stage][i][threadIdx.x]),
                      w = load<V>(a.w + (thread + i * threads) * V);
        Pack<V> dx;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float scaled = dy[i][j] * inverse;
          dw[i][j] += scaled * x[j];
          dx[j] = scaled * w[j] - x[j] * along_x;
        }
        store<V>(a.dx.at(at.row, at.place * width + (thread + i * threads) * V), dx);
      }
    }
    load_group(stage);
    go_on(at);
  }
  store_weight_gradient<V>(dw, groups.packs, threads, Held{thread, threads},
                           a.partials + int64_t{blockIdx.x} * width);
}

// Columns that one group of threads works on: a norm, or a head.
int64_t group_width(const ConstMatrix& w, const Rotation& rotation) {
  return w ? w.cols : rotation.width;
}

void check_rope(const ConstMatrix& x, const ConstMatrix& w, const Matrix& y, const Rotation& r,
                int64_t tokens) {
  require(r.width > 0 && r.first >= 0 && r.rotated > 0 && r.rotated % 2 == 0 &&
              r.first + r.rotated <= r.width && x.cols % r.width == 0,
          "rotated elements are pairs inside a head");
  require(!w || (w.cols > 0 && x.cols % w.cols == 0 && w.cols % r.width == 0 && w.type == x.type),
          "a norm before a rotation is over whole heads");
  require(group_width(w, r) <= kWidestRopeNorm,
          "a head, or a norm before a rotation, has at most 8192 elements");
  require(same_shape(x, y) && y.type == x.type, "a rotation keeps the shape");
  require(x.rows == 0 || (tokens > 0 && x.rows % tokens == 0), "every row has a position");
  require(x.rows * (x.cols / r.width) < int64_t{1} << 31, "a rotation has less than 2^31 heads");
}

// Whether packs of 8 lie wholly inside or outside of what is rotated, and so do their partners.
bool rotates_packs(const Rotation& r) {
  const int64_t unit = r.interleaved ? kPack : 2 * kPack;
  return r.width % kPack == 0 && r.first % kPack == 0 && r.rotated % unit == 0 && aligned(r.cos) &&
         aligned(r.sin);
}

// f(where partners are) for packs of V elements.
template <int V, class F>
void with_partners(const Rotation& r, int64_t group, const Division& division, F&& f) {
  using std::integral_constant;
  if constexpr (V == kPack) {
    if (r.interleaved) return f(integral_constant<Partners, Partners::same_pack>{});
    if (r.rotated == r.width && group == 2 * kPack * division.threads && division.threads <= kThreads)
      return f(integral_constant<Partners, Partners::other_pack>{});
  }
  f(integral_constant<Partners, Partners::staged>{});
}

Rotate rotate_of(const Rotation& r, const int32_t* positions, int64_t tokens, float direction) {
  return {static_cast<uint32_t>(r.width),
          static_cast<uint32_t>(r.first),
          static_cast<uint32_t>(r.rotated),
          r.interleaved,
          r.cos,
          r.sin,
          positions,
          static_cast<uint32_t>(tokens),
          direction};
}

size_t staged_bytes(Partners partners, const Division& division, int64_t width) {
  return partners == Partners::staged ? static_cast<size_t>(division.groups() * width) * sizeof(float) : 0;
}

void run_rotation(const RopeArgs& a, float direction, cudaStream_t stream) {
  if (a.x.rows <= 0) return;
  const int64_t width = group_width(a.w, a.rotation);
  with_type(a.x.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(packed({a.x, a.w, a.y}) && rotates_packs(a.rotation), [&](auto v) {
      constexpr int V = v(), Packs = V == kPack ? kNormPacks : kNormElements;
      const Division division = divide(width / V, Packs);
      const Groups groups = groups_of(a.x, width, static_cast<int>(width / V), division.threads, a.eps);
      const Forward<T> kernel{Rows<const T>(a.x), Rows<T>(a.y), static_cast<const T*>(a.w.data)};
      with_partners<V>(a.rotation, width, division, [&](auto partners) {
        forward<T, V, Packs, partners()>
            <<<static_cast<unsigned>(ceil_div(groups.count, division.groups())), division.block,
               staged_bytes(partners(), division, width), stream>>>(
                kernel, rotate_of(a.rotation, a.positions, a.tokens, direction), groups);
      });
    });
  });
  check_launch("rope");
}

// ---- keys of latent attention

template <class T, int V>
struct Keys {
  Rows<const T> kv, k_rope;
  Rows<T> k, v;
  uint32_t heads, nope, value, rotary;

  __device__ Pack<V> load(int64_t row, int64_t at) const {
    const auto r = static_cast<uint32_t>(row);
    auto col = static_cast<uint32_t>(at);
    const uint32_t key = nope + rotary, all = nope + value;
    if (col < heads * key) {
      const uint32_t head = col / key, i = col % key;
      return kernels::load<V>(i < nope ? kv.at(r, head * all + i) : k_rope.at(r, i - nope));
    }
    col -= heads * key;
    return kernels::load<V>(kv.at(r, col / value * all + nope + col % value));
  }
  __device__ void store(int64_t row, int64_t at, const Pack<V>& pack) const {
    const auto r = static_cast<uint32_t>(row);
    const auto col = static_cast<uint32_t>(at);
    const uint32_t keys = heads * (nope + rotary);
    kernels::store<V>(col < keys ? k.at(r, col) : v.at(r, col - keys), pack);
  }
};

template <class T, int V>
struct KeysBackward {
  Rows<const T> dk, dv;
  Rows<T> dkv;
  uint32_t nope, value, rotary;

  __device__ Pack<V> load(int64_t row, int64_t at) const {
    const auto r = static_cast<uint32_t>(row);
    const auto col = static_cast<uint32_t>(at);
    const uint32_t head = col / (nope + value), i = col % (nope + value);
    return kernels::load<V>(i < nope ? dk.at(r, head * (nope + rotary) + i)
                                     : dv.at(r, head * value + i - nope));
  }
  __device__ void store(int64_t row, int64_t at, const Pack<V>& pack) const {
    kernels::store<V>(dkv.at(static_cast<uint32_t>(row), static_cast<uint32_t>(at)), pack);
  }
};

// A block a token: threads (packs of the rotary part, heads).
template <class T, int V>
__global__ void __launch_bounds__(kThreads) sum_rotary(Rows<const T> dk, Rows<T> dk_rope, uint32_t heads,
                                                       uint32_t nope, uint32_t rotary, bool accumulate) {
  __shared__ float sums[kThreads * V];
  const uint32_t row = blockIdx.x, at = threadIdx.x * V;
  Pack<V> sum;
  for (int j = 0; j < V; ++j) sum[j] = 0;
  if (at < rotary) {
    for (uint32_t head = threadIdx.y; head < heads; head += blockDim.y) {
      const Pack<V> more = load<V>(dk.at(row, head * (nope + rotary) + nope + at));
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += more[j];
    }
    for (int j = 0; j < V; ++j) sums[(threadIdx.y * blockDim.x + threadIdx.x) * V + j] = sum[j];
  }
  __syncthreads();
  for (uint32_t i = threadIdx.y * blockDim.x + threadIdx.x; i < rotary; i += blockDim.x * blockDim.y) {
    float all = accumulate ? load1(dk_rope.at(row, i)) : 0;
    for (uint32_t lane = 0; lane < blockDim.y; ++lane) all += sums[lane * blockDim.x * V + i];
    store1(dk_rope.at(row, i), all);
  }
}

}  // namespace

void rope(const RopeArgs& a, cudaStream_t stream) {
  check_rope(a.x, a.w, a.y, a.rotation, a.tokens);
  run_rotation(a, 1, stream);
}

void rope_bwd(const RopeBwdArgs& a, cudaStream_t stream) {
  check_rope(a.dy, a.w, a.dx, a.rotation, a.tokens);
  if (!a.w) {
    run_rotation({a.dy, {}, a.dx, a.positions, a.tokens, a.rotation, 0}, -1, stream);
    return;
  }
  require(same_shape(a.dy, a.x) && a.x.type == a.dy.type && a.dw.cols == a.w.cols,
          "a rotation keeps the shape");
  const int64_t d = a.w.cols;
  int64_t blocks = norm_blocks(a.dy.rows * (a.dy.cols / d), d);
  with_type(a.dy.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(packed({a.dy, a.x, a.w, a.dx}) && rotates_packs(a.rotation) && aligned(a.scratch), [&](auto v) {
      constexpr int V = v(), Packs = V == kPack ? kNormPacks : kNormElements;
      const Division division = divide(d / V, Packs);
      const Backward<T> kernel{Rows<const T>(a.dy), Rows<const T>(a.x), Rows<T>(a.dx),
                               static_cast<const T*>(a.w.data), a.scratch};
      const Rotate rotate = rotate_of(a.rotation, a.positions, a.tokens, -1);
      const Groups groups = groups_of(a.dy, d, static_cast<int>(d / V), division.threads, a.eps);
      with_partners<V>(a.rotation, d, division, [&](auto partners) {
        if constexpr (partners() == Partners::other_pack && std::is_same_v<T, bf16>) {
          if (d == a.rotation.width && division.threads <= 32) {
            blocks = std::min<int64_t>(blocks, kBlocksInWarps * kMultiprocessors);
            return backward_in_warps<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
                {Rows<const bf16>(a.dy), Rows<const bf16>(a.x), Rows<bf16>(a.dx),
                 static_cast<const bf16*>(a.w.data), a.scratch},
                rotate, groups);
          }
        }
        backward<T, V, Packs, partners()>
            <<<static_cast<unsigned>(blocks), division.block, staged_bytes(partners(), division, d),
               stream>>>(kernel, rotate, groups);
      });
    });
  });
  check_launch("rope_bwd");
  sum_partials(a.scratch, blocks, d, a.dw.data, a.dw.type, a.accumulate, stream);
}

void mla_keys(const MlaKeysArgs& a, cudaStream_t stream) {
  const int64_t heads = a.kv.cols / (a.nope + a.value), keys = heads * (a.nope + a.rotary);
  require(a.kv.cols == heads * (a.nope + a.value) && a.k.cols == keys && a.v.cols == heads * a.value &&
              a.k_rope.cols == a.rotary && a.k.rows == a.kv.rows && a.v.rows == a.kv.rows &&
              a.k_rope.rows == a.kv.rows,
          "keys and values have the widths of their parts");
  const bool wide = packed({a.kv, a.k_rope, a.k, a.v}) && a.nope % kPack == 0 && a.value % kPack == 0;
  with_type(a.kv.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(wide, [&](auto v) {
      constexpr int V = v();
      const Keys<T, V> keys_op{Rows<const T>(a.kv),
                               Rows<const T>(a.k_rope),
                               Rows<T>(a.k),
                               Rows<T>(a.v),
                               static_cast<uint32_t>(heads),
                               static_cast<uint32_t>(a.nope),
                               static_cast<uint32_t>(a.value),
                               static_cast<uint32_t>(a.rotary)};
      map<V, 2>(keys_op, a.kv.rows, keys + heads * a.value, stream);
    });
  });
}

void mla_keys_bwd(const MlaKeysBwdArgs& a, cudaStream_t stream) {
  const int64_t heads = a.dkv.cols / (a.nope + a.value);
  require(a.dkv.cols == heads * (a.nope + a.value) && a.dk.cols == heads * (a.nope + a.rotary) &&
              a.dv.cols == heads * a.value && a.dk_rope.cols == a.rotary && a.dk.rows == a.dkv.rows &&
              a.dv.rows == a.dkv.rows && a.dk_rope.rows == a.dkv.rows,
          "keys and values have the widths of their parts");
  require(a.rotary <= kThreads, "the rotary part of a key has at most 256 elements");
  if (a.dkv.rows <= 0) return;
  const bool wide =
      packed({a.dk, a.dv, a.dkv}) && a.nope % kPack == 0 && a.value % kPack == 0 && a.rotary % kPack == 0;
  with_type(a.dk.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_pack(wide, [&](auto v) {
      constexpr int V = v();
      const KeysBackward<T, V> keys_op{Rows<const T>(a.dk),
                                       Rows<const T>(a.dv),
                                       Rows<T>(a.dkv),
                                       static_cast<uint32_t>(a.nope),
                                       static_cast<uint32_t>(a.value),
                                       static_cast<uint32_t>(a.rotary)};
      map<V, 2>(keys_op, a.dkv.rows, a.dkv.cols, stream);
      const auto x = static_cast<unsigned>(std::bit_ceil(static_cast<uint64_t>(a.rotary / V)));
      sum_rotary<T, V><<<static_cast<unsigned>(a.dkv.rows), dim3(x, kThreads / x), 0, stream>>>(
          Rows<const T>(a.dk), Rows<T>(a.dk_rope), static_cast<uint32_t>(heads),
          static_cast<uint32_t>(a.nope), static_cast<uint32_t>(a.rotary), a.accumulate);
    });
  });
  check_launch("mla_keys_bwd");
}

}  // namespace mop::kernels
