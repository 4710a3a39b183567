// What the kernels share: packs of elements as fp32, sums over groups of threads, and the choice of
// instances.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/check.h"
#include "kernels/matrix.h"

namespace mop::kernels {

using bf16 = __nv_bfloat16;

inline constexpr int kPack =
    8;  // elements that a thread loads at once where alignment allows: 16 bytes of bf16
inline constexpr int kThreads = 256;
inline constexpr int kMultiprocessors = 132;  // of an H200; sizes grids that walk over their work

// ---- elements

__device__ inline float load1(const bf16* p) {
  return __bfloat162float(*p);
}
__device__ inline float load1(const float* p) {
  return *p;
}
__device__ inline void store1(bf16* p, float v) {
  *p = __float2bfloat16_rn(v);
}
__device__ inline void store1(float* p, float v) {
  *p = v;
}
__device__ inline float load1(const void* p, Type type, int64_t i) {
  return type == Type::bf16 ? load1(static_cast<const bf16*>(p) + i) : static_cast<const float*>(p)[i];
}
__device__ inline void store1(void* p, Type type, int64_t i, float v) {
  type == Type::bf16 ? store1(static_cast<bf16*>(p) + i, v) : store1(static_cast<float*>(p) + i, v);
}

template <class T>
__device__ inline float rounded(float v) {
  if constexpr (std::is_same_v<T, bf16>) return __bfloat162float(__float2bfloat16_rn(v));
  return v;
}

template <int V>
struct Pack {
  float v[V];
  __device__ float& operator[](int i) { return v[i]; }
  __device__ float operator[](int i) const { return v[i]; }
};

// A pack as it lies in memory: what is loaded ahead takes fewer registers this way.
template <int V, class T>
struct Raw {
  static constexpr int kWords = V * sizeof(T) / sizeof(uint4);
  uint4 words[kWords];
};
template <class T>
struct Raw<1, T> {
  T value;
};

template <int V, class T>
__device__ inline Raw<V, T> load_raw(const T* p) {
  Raw<V, T> out;
  if constexpr (V == 1) {
    out.value = *p;
  } else {
#pragma unroll
    for (int i = 0; i < Raw<V, T>::kWords; ++i) out.words[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  return out;
}

template <int V, class T>
__device__ inline Pack<V> unpack(const Raw<V, T>& raw) {
  Pack<V> out;
  if constexpr (V == 1) {
    out[0] = load1(&raw.value);
  } else {
#pragma unroll
    for (int i = 0; i < Raw<V, T>::kWords; ++i) {
      const uint32_t words[4] = {raw.words[i].x, raw.words[i].y, raw.words[i].z, raw.words[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (std::is_same_v<T, bf16>) {
          out[8 * i + 2 * j] = __uint_as_float(words[j] << 16);
          out[8 * i + 2 * j + 1] = __uint_as_float(words[j] & 0xffff0000U);
        } else {
          out[4 * i + j] = __uint_as_float(words[j]);
        }
      }
    }
  }
  return out;
}

template <int V, class T>
__device__ inline Pack<V> load(const T* p) {
  return unpack(load_raw<V>(p));
}

template <int V, class T>
__device__ inline void store(T* p, const Pack<V>& in) {
  if constexpr (V == 1) {
    store1(p, in[0]);
  } else if constexpr (std::is_same_v<T, bf16>) {
    static_assert(V == 8);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4)
      *reinterpret_cast<float4*>(p + i) = make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]);
  }
}

// A matrix as kernels take it.
template <class T>
struct Rows {
  T* data;
  int64_t ld;
  explicit Rows(const Matrix& m) : data(static_cast<T*>(m.data)), ld(m.ld) {}
  __device__ T* at(int64_t row, int64_t col) const { return data + row * ld + col; }
};
template <class T>
struct Rows<const T> {
  const T* data;
  int64_t ld;
  explicit Rows(const ConstMatrix& m) : data(static_cast<const T*>(m.data)), ld(m.ld) {}
  __device__ const T* at(int64_t row, int64_t col) const { return data + row * ld + col; }
};

// ---- groups: `threads` neighbours, a power of two; up to 32 of them share a warp, more are the whole block

inline constexpr unsigned kAllLanes = 0xffffffffU;

// Every thread of the block calls it. `turn` counts the block's calls: two in a row use different memory.
template <int N>
__device__ inline void sum_over_group(float (&values)[N], int threads, int& turn) {
  for (int offset = min(threads, 32) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
  }
  if (threads <= 32) return;
  __shared__ float parts[2][32][N];
  auto& part = parts[turn++ & 1];
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) part[threadIdx.x / 32][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0;
  for (int warp = 0; warp < threads / 32; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += part[warp][i];
  }
}

// Memory that a group shares is ready.
__device__ inline void sync_group(int threads) {
  threads <= 32 ? __syncwarp() : __syncthreads();
}

// How threads divide a group of `packs` packs: each takes packs `thread + i x threads`, i < per_thread.
struct Division {
  int threads, block;
  int groups() const { return block / threads; }  // a block works on at a time
};
inline Division divide(int64_t packs, int per_thread) {
  const auto threads = static_cast<int>(
      std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(1, (packs + per_thread - 1) / per_thread))));
  return {threads, threads <= 32 ? kThreads : threads};
}

// ---- launches

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("kernels: ") + what);
}

inline bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
// Whether packs of rows start at multiples of 16 bytes; true for what is missing.
inline bool packed(const ConstMatrix& m) {
  return !m || (aligned(m.data) && m.cols % kPack == 0 && (m.ld % kPack == 0 || m.rows <= 1));
}
inline bool packed(std::initializer_list<ConstMatrix> all) {
  return std::all_of(all.begin(), all.end(), [](const ConstMatrix& m) { return packed(m); });
}

inline bool same_shape(const ConstMatrix& x, const ConstMatrix& y) {
  return !y || (y.rows == x.rows && y.cols == x.cols);
}

template <class T>
struct Tag {
  using type = T;
};

// f(Tag<T>) for the type; f(integral constant) for packs of 8 or of 1.
template <class F>
void with_type(Type type, F&& f) {
  type == Type::bf16 ? f(Tag<bf16>{}) : f(Tag<float>{});
}
template <class F>
void with_pack(bool wide, F&& f) {
  wide ? f(std::integral_constant<int, kPack>{}) : f(std::integral_constant<int, 1>{});
}

}  // namespace mop::kernels
