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

// ---- backward for bf16 and Partners::other_pack: a block has kThreads threads, whatever the group

// The sum over `lanes` neighbours, a power of two up to Most.
template <int Most>
__device__ inline float2 sum_over_lanes(float2 sum, int lanes) {
#pragma unroll
  for (int offset = Most / 2; offset > 0; offset /= 2) {
    if (offset >= lanes) continue;
    sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
    sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
  }
  return sum;
}

// The sum over a group: a part of a warp, or warps that wait for each other, not for the block's other
// groups. parts: memory of the block that its groups' last call did not use.
__device__ inline float2 sum_of_group(float2 sum, int threads, float2 (&parts)[kThreads / 32]) {
  sum = sum_over_lanes<32>(sum, threads);
  if (threads <= 32) return sum;
  const int warps = threads / 32, warp = threadIdx.x / 32, first = warp & -warps, lane = threadIdx.x % 32;
  if (lane == 0) parts[warp] = sum;
  asm volatile("bar.sync %0, %1;" ::"r"(1 + first), "r"(threads) : "memory");  // 0 is the block's
  return sum_over_lanes<kThreads / 32>(parts[first + (lane & (warps - 1))], warps);
}

// The groups that a thread works on, without divisions on the way: each is as many instructions as the
// arithmetic on a pack.
struct Where {
  uint32_t group, row, place;  // the group `place` of the row
};
struct Walk {
  uint32_t step, rows, places, each;
  __device__ Walk(uint32_t step, uint32_t each)
      : step(step), rows(step / each), places(step % each), each(each) {}
  __device__ Where after(const Where& at) const {
    const uint32_t place = at.place + places;
    const bool next_row = place >= each;
    return {at.group + step, at.row + rows + next_row, next_row ? place - each : place};
  }
};

// What is loaded ahead waits in shared memory, each thread's in its own part: registers hold enough warps to
// have the arithmetic of some beside the loads of others.
constexpr int kAhead = 2;        // groups of each thread; 2 at least, for parts
constexpr int kBlocksAhead = 3;  // of a multiprocessor; there are no more of them: all run from the start

struct Ahead {
  Raw<kPack, bf16> dy[2][kThreads], x[2][kThreads];  // by pack
  int32_t position[kThreads];
  float2 parts[kThreads / 32];  // of sum_of_group
};

__global__ void __launch_bounds__(kThreads, kBlocksAhead)
    backward_ahead(const Backward<bf16> a, const Rotate rotate, const Groups groups) {
  constexpr int V = kPack, Packs = 2;
  __shared__ Ahead stages[kAhead];
  const int threads = groups.threads, thread = threadIdx.x % threads;
  const Held held = held_by<Partners::other_pack, V>(thread, threads, rotate);
  const uint32_t width = groups.packs * V, step = gridDim.x * (kThreads / threads);
  const Walk next(step, groups.each), ahead(kAhead * step, groups.each);
  const auto load_group = [&](Ahead& to, const Where& from) {
    if (from.group < groups.count) {
      const uint32_t col = from.place * width + held.first * V;
      const bf16 *const dy = a.dy.at(from.row, col), *const x = a.x.at(from.row, col);
      __pipeline_memcpy_async(&to.position[threadIdx.x], rotate.at(from.row), sizeof(int32_t));
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        __pipeline_memcpy_async(&to.dy[i][threadIdx.x], dy + i * held.apart * V, sizeof(uint4));
        __pipeline_memcpy_async(&to.x[i][threadIdx.x], x + i * held.apart * V, sizeof(uint4));
      }
    }
    __pipeline_commit();
  };
  const uint32_t group = (blockIdx.x * kThreads + threadIdx.x) / threads;
  Where at{group, group / groups.each, group % groups.each};
  Where later = at;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    load_group(stages[i], later);
    later = next.after(later);
  }
  Pack<V> dw[Packs];
#pragma unroll
  for (int i = 0; i < Packs; ++i)
#pragma unroll
    for (int j = 0; j < V; ++j) dw[i][j] = 0;
  const float share = 1 / groups.d;
  Raw<V, bf16> weights[Packs];
#pragma unroll
  for (int i = 0; i < Packs; ++i) weights[i] = load_raw<V>(a.w + held(i) * V);
  // A warp stays as long as one of its threads has a group: threads sum over their neighbours.
  for (int turn = 0; __any_sync(kAllLanes, at.group < groups.count); turn = (turn + 1) % kAhead) {
    Ahead& stage = stages[turn];
    __pipeline_wait_prior(kAhead - 1);
    const bool there = at.group < groups.count;
    Pack<V> dy[Packs];
    float2 sums{0, 0};  // of x^2, d(normalised) w x
    if (there) {
#pragma unroll
      for (int i = 0; i < Packs; ++i) dy[i] = unpack(stage.dy[i][threadIdx.x]);
      rotate.operator()<Partners::other_pack>(dy, nullptr, groups, held, stage.position[threadIdx.x], true);
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const Pack<V> x = unpack(stage.x[i][threadIdx.x]), w = unpack(weights[i]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sums.x += x[j] * x[j];
          sums.y += dy[i][j] * w[j] * x[j];
        }
      }
    }
    sums = sum_of_group(sums, threads, stage.parts);
    const float inverse = rsqrtf(sums.x * share + groups.eps),
                along_x = sums.y * share * inverse * inverse * inverse;
    if (there) {
      bf16* const to = a.dx.at(at.row, at.place * width + held.first * V);
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const Pack<V> x = unpack(stage.x[i][threadIdx.x]), w = unpack(weights[i]);
        Pack<V> dx;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float scaled = dy[i][j] * inverse;
          dw[i][j] += scaled * x[j];
          dx[j] = scaled * w[j] - x[j] * along_x;
        }
        store<V>(to + i * held.apart * V, dx);
      }
    }
    load_group(stage, ahead.after(at));
    at = next.after(at);
  }
  // Of norms of which a block works on several, the widest has half of its threads.
  store_weight_gradient<V, kThreads / 2 * Packs * V>(dw, groups.packs, threads, held,
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

// Returns how many blocks ran, each with its row of partial sums.
template <class T, int V, Partners P>
int64_t run_backward(const Backward<T>& kernel, const Rotate& rotate, const Groups& groups,
                     const Division& division, cudaStream_t stream) {
  if constexpr (P == Partners::other_pack && std::is_same_v<T, bf16>) {
    const int64_t blocks = std::clamp<int64_t>(ceil_div(groups.count, kThreads / division.threads), 1,
                                               kBlocksAhead * kMultiprocessors);
    backward_ahead<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(kernel, rotate, groups);
    return blocks;
  } else {
    constexpr int Packs = V == kPack ? kNormPacks : kNormElements;
    const int64_t width = groups.packs * V, blocks = norm_blocks(groups.count, width);
    backward<T, V, Packs, P>
        <<<static_cast<unsigned>(blocks), division.block, staged_bytes(P, division, width), stream>>>(
            kernel, rotate, groups);
    return blocks;
  }
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
  int64_t blocks = 0;
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
        blocks = run_backward<T, V, partners()>(kernel, rotate, groups, division, stream);
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
