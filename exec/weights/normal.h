// Normal random numbers by their index, as fast as vectors make them and the same bits on every processor:
// plain IEEE arithmetic on 64-bit lanes, without a branch, a table or a call, in a loop that the compiler
// vectorises for each instruction set. The build forbids what would make them differ: fused multiply-add.
// A model draws one for each parameter. Measured on one core, a number: 3 to 4 ns with AVX2 or AVX-512, 7 to
// 9 with SSE2; by std::log and std::cos it was 30 to 60.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace mop::weights {

// SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
[[gnu::always_inline]] constexpr uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// The centre of interval number `x` of the 2^32 of (0, 1): never 0, whose logarithm there is not. The bits of
// x become the last ones of 2^20, which weigh 2^-32 and up; the difference is exact.
[[gnu::always_inline]] constexpr double centre(uint64_t x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(0x1p20) | x) - (0x1p20 - 0x1p-33);
}

// c0 + c1 x + c2 x^2 + ... by Horner's rule.
template <typename... Rest>
[[gnu::always_inline]] constexpr double polynomial(double x, double c0, Rest... rest) {
  if constexpr (sizeof...(rest) == 0)
    return c0;
  else
    return polynomial(x, rest...) * x + c0;
}

// -2 log u for 0 < u < 1, to a relative error of 1e-13, near 1 too. u = m 2^e with m in [sqrt 1/2, sqrt 2),
// and -2 log m = -4 artanh s, s = (m - 1) / (m + 1): an odd function, minimax polynomial.
[[gnu::always_inline]] constexpr double minus_two_log(double u) {
  constexpr uint64_t kLowest = std::bit_cast<uint64_t>(std::numbers::sqrt2 / 2);
  constexpr uint64_t kBias = 1024, kMantissa = (uint64_t{1} << 52) - 1;
  const uint64_t above = std::bit_cast<uint64_t>(u) - kLowest + (kBias << 52);
  const double m = std::bit_cast<double>((above & kMantissa) + kLowest);
  const double e = std::bit_cast<double>(std::bit_cast<uint64_t>(0x1p52) | (above >> 52)) - (0x1p52 + kBias);
  const double s = (m - 1) / (m + 1);
  const double p = polynomial(s * s, -3.9999999999998935, -1.3333333335930273, -0.79999989744394608,
                              -0.57144336032093055, -0.44348354459354313, -0.39218168037700848);
  return e * (-2 * std::numbers::ln2) + s * p;
}

// cos(2 pi v) for 0 <= v <= 1, to a relative error of 3e-11, as sin(2 pi y) with y in [-1/4, 1/4]: an odd
// function, minimax polynomial.
[[gnu::always_inline]] inline double cosine_of_turns(double v) {
  const double y = std::fabs(v - 0.5) - 0.25;
  const double p = polynomial(y * y, 6.2831853070466955, -41.341702096924886, 81.605223690025909,
                              -76.704170250209965, 42.00779713890166, -14.381390951869754);
  return y * p;
}

// Standard normal number of 64 random bits: the Box-Muller transform of their halves.
[[gnu::always_inline]] inline double normal(uint64_t bits) {
  return std::sqrt(minus_two_log(centre(bits >> 32))) * cosine_of_turns(centre(bits & 0xffffffff));
}

// Instruction sets that normals() is compiled for.
enum class Simd : uint8_t { baseline, avx2, avx512 };
bool available(Simd simd);  // on this processor
Simd widest();              // of the available ones

// Number i is mean + std * normal(mix(start + i * step)).
struct Sequence {
  uint64_t start, step;
  double mean, std;
};

// The first `count` numbers. `simd` says how fast, and nothing else.
void normals(Sequence sequence, int64_t count, float* out, Simd simd = widest());

}  // namespace mop::weights
