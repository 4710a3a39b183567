#include "exec/weights/normal.h"

#include "sim/base/error.h"

namespace mop::weights {
namespace {

// A body without a target of its own takes on that of the function it is inlined into.
[[gnu::always_inline]] inline void loop(Sequence sequence, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, sequence.start += sequence.step)
    out[i] = static_cast<float>(sequence.mean + sequence.std * normal(mix(sequence.start)));
}

void baseline(Sequence sequence, int64_t count, float* out) {
  loop(sequence, count, out);
}

#ifdef __x86_64__
[[gnu::target("avx2")]] void avx2(Sequence sequence, int64_t count, float* out) {
  loop(sequence, count, out);
}

// DQ multiplies 64-bit lanes.
[[gnu::target("avx512f,avx512dq")]] void avx512(Sequence sequence, int64_t count, float* out) {
  loop(sequence, count, out);
}
#endif

}  // namespace

bool available(Simd simd) {
#ifdef __x86_64__
  if (simd == Simd::avx2) return __builtin_cpu_supports("avx2");
  if (simd == Simd::avx512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
#endif
  return simd == Simd::baseline;
}

Simd widest() {
  static const Simd result = available(Simd::avx512) ? Simd::avx512
                             : available(Simd::avx2) ? Simd::avx2
                                                     : Simd::baseline;
  return result;
}

void normals(Sequence sequence, int64_t count, float* out, Simd simd) {
  ensure(available(simd), "the processor has the instructions");
#ifdef __x86_64__
  if (simd == Simd::avx512) return avx512(sequence, count, out);
  if (simd == Simd::avx2) return avx2(sequence, count, out);
#endif
  baseline(sequence, count, out);
}

}  // namespace mop::weights
