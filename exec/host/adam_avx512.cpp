// Includes nothing whose inline functions another file could share: this one is compiled for CPUs with
// AVX-512.
#include <immintrin.h>

#include "exec/host/adam_span.h"

namespace mop::host {
namespace {

constexpr int64_t kLanes = 16, kStep = 2 * kLanes;  // a step: one cache line of bf16
constexpr int64_t kLine = 64;                       // bytes
// Bytes of every stream that are on their way while a step computes: the hardware's own prefetcher stops at
// each page. On 15 cores of an H200 host, of the bandwidth of three arrays in place: without 90 %, with 512
// or 1024 95 to 100 %, with 256, 2048 or 4096 96 %.
constexpr int64_t kAhead = 1024;

using Mask = __mmask16;
constexpr Mask kAll = 0xffff;

struct Constants {
  __m512 scale, one_minus_beta1, one_minus_beta2, decay, step_size, inverse_root, eps;
  explicit Constants(const AdamUpdate& u)
      : scale(_mm512_set1_ps(u.scale)),
        one_minus_beta1(_mm512_set1_ps(u.one_minus_beta1)),
        one_minus_beta2(_mm512_set1_ps(u.one_minus_beta2)),
        decay(_mm512_set1_ps(u.decay)),
        step_size(_mm512_set1_ps(u.step_size)),
        inverse_root(_mm512_set1_ps(u.inverse_root)),
        eps(_mm512_set1_ps(u.eps)) {}
};

// program::settled.
inline __m512 settled(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const Mask halfway =
      _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff)), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_mask_sub_epi32(bits, halfway, bits, _mm512_set1_epi32(1)));
}

// The root and the quotient are exact to the last bit: they take some 40 cycles for 16 elements, a tenth of
// what a core's share of the memory bandwidth takes.
template <bool NarrowWeights>
inline void compute(const Constants& c, __m512 g, __m512& w, __m512& m, __m512& v) {
  g = _mm512_mul_ps(g, c.scale);
  m = _mm512_fmadd_ps(c.one_minus_beta1, _mm512_sub_ps(g, m), m);
  v = _mm512_fmadd_ps(c.one_minus_beta2, _mm512_fmsub_ps(g, g, v), v);
  const __m512 root = _mm512_fmadd_ps(_mm512_sqrt_ps(v), c.inverse_root, c.eps);
  const __m512 change = _mm512_div_ps(_mm512_mul_ps(c.step_size, m), root);
  w = _mm512_sub_ps(w, _mm512_fmadd_ps(c.decay, w, change));
  if constexpr (NarrowWeights) w = settled(w);
}

// Nearest, ties to even, by integers: not every CPU with AVX-512 has the instruction of AVX512_BF16.
inline __m256i narrow(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fff)));
}

inline __m512 wide(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// Elements of one type in memory.
template <bool Narrow>
struct Elements;
template <>
struct Elements<true> {
  static constexpr int64_t kBytes = 2;
  static __m512 load(const void* p, int64_t i) {
    return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i)));
  }
  static __m512 load(const void* p, int64_t i, Mask mask) {
    return wide(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i));
  }
  static void store(void* p, int64_t i, Mask mask, __m512 x) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, narrow(x));
  }
  // Two vectors, past the caches, as nothing of these lines is read: ordinary stores would fetch them first,
  // and took a tenth longer.
  static void stream(void* p, int64_t i, __m512 first, __m512 second) {
    const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(first)), narrow(second), 1);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<uint16_t*>(p) + i), line);
  }
};
template <>
struct Elements<false> {
  static constexpr int64_t kBytes = 4;
  static __m512 load(const void* p, int64_t i) { return _mm512_loadu_ps(static_cast<const float*>(p) + i); }
  static __m512 load(const void* p, int64_t i, Mask mask) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  }
  static void store(void* p, int64_t i, __m512 x) { _mm512_storeu_ps(static_cast<float*>(p) + i, x); }
  static void store(void* p, int64_t i, Mask mask, __m512 x) {
    _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, x);
  }
  static void stream(void* p, int64_t i, __m512 first, __m512 second) {
    _mm512_stream_ps(static_cast<float*>(p) + i, first);
    _mm512_stream_ps(static_cast<float*>(p) + i + kLanes, second);
  }
};
using Floats = Elements<false>;

// Fetches what the step at i + kAhead reads.
template <int64_t Bytes>
inline void prefetch(const void* p, int64_t i) {
  for (int64_t line = 0; line < kStep * Bytes; line += kLine)
    _mm_prefetch(static_cast<const char*>(p) + i * Bytes + kAhead + line, _MM_HINT_T0);
}

template <bool NarrowGradient, bool NarrowWeights, bool Master>
void update(const AdamUpdate& by, const AdamSpan& span) {
  using Gradient = Elements<NarrowGradient>;
  using Weights = Elements<NarrowWeights>;
  const Constants c(by);
  const int64_t n = span.n;
  const void* const gradient = span.gradient;
  void* const weights = span.weights;
  float *const m = span.m, *const v = span.v,
               *const master = Master ? span.master : static_cast<float*>(weights);

  const auto masked = [&](int64_t i, int64_t count) {
    const Mask mask = static_cast<Mask>(count >= kLanes ? kAll : (1U << count) - 1);
    __m512 w = Floats::load(master, i, mask), mi = Floats::load(m, i, mask), vi = Floats::load(v, i, mask);
    compute<NarrowWeights>(c, Gradient::load(gradient, i, mask), w, mi, vi);
    Floats::store(m, i, mask, mi);
    Floats::store(v, i, mask, vi);
    Floats::store(master, i, mask, w);
    if constexpr (Master) Weights::store(weights, i, mask, w);
  };
  // Whole lines of the weights begin after `head` elements.
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(weights) % kLine);
  const int64_t to_line = (kLine - past) % kLine / Weights::kBytes, head = n < to_line ? n : to_line;
  int64_t i = 0;
  for (; i < head; i += kLanes) masked(i, head - i);
  for (i = head; i + kStep <= n; i += kStep) {
    prefetch<Floats::kBytes>(m, i);
    prefetch<Floats::kBytes>(v, i);
    prefetch<Floats::kBytes>(master, i);
    prefetch<Gradient::kBytes>(gradient, i);
    const int64_t j = i + kLanes;
    __m512 w0 = Floats::load(master, i), m0 = Floats::load(m, i), v0 = Floats::load(v, i);
    __m512 w1 = Floats::load(master, j), m1 = Floats::load(m, j), v1 = Floats::load(v, j);
    compute<NarrowWeights>(c, Gradient::load(gradient, i), w0, m0, v0);
    compute<NarrowWeights>(c, Gradient::load(gradient, j), w1, m1, v1);
    // These lines were read, and are in the cache: streaming them, too, took a fifth longer.
    Floats::store(m, i, m0);
    Floats::store(m, j, m1);
    Floats::store(v, i, v0);
    Floats::store(v, j, v1);
    Floats::store(master, i, w0);
    Floats::store(master, j, w1);
    if constexpr (Master) Weights::stream(weights, i, w0, w1);
  }
  for (; i < n; i += kLanes) masked(i, n - i);
  _mm_sfence();  // what was streamed is there before anybody hears of the end
}

}  // namespace

void adam_avx512(const AdamUpdate& by, const AdamSpan& span) {
  if (span.master == nullptr)
    return span.narrow_gradient ? update<true, false, false>(by, span)
                                : update<false, false, false>(by, span);
  if (span.narrow_weights)
    return span.narrow_gradient ? update<true, true, true>(by, span) : update<false, true, true>(by, span);
  span.narrow_gradient ? update<true, false, true>(by, span) : update<false, false, true>(by, span);
}

}  // namespace mop::host
