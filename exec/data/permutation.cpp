#include "exec/data/permutation.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "sim/base/error.h"

namespace mop::data {
namespace {

constexpr uint64_t kRounds = 6;
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;

// SplitMix64's finaliser (Steele, Lea and Flood, 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

Permutation::Permutation(int64_t size, uint64_t seed)
    : size_(static_cast<uint64_t>(size)), seed_(mix(seed + kGolden)) {
  ensure(size > 0, "a permutation has elements");
  half_ = std::max(1, (static_cast<int>(std::bit_width(size_ - 1)) + 1) / 2);
}

int64_t Permutation::operator()(int64_t index) const {
  const uint64_t mask = (uint64_t{1} << half_) - 1;
  auto x = static_cast<uint64_t>(index);
  ensure(x < size_, "a place of the permutation");
  do {
    uint64_t left = x >> half_, right = x & mask;
    for (uint64_t round = 1; round <= kRounds; ++round)
      left = std::exchange(right, left ^ (mix(mix(seed_ + round * kGolden) ^ right) & mask));
    x = left << half_ | right;
  } while (x >= size_);
  return static_cast<int64_t>(x);
}

}  // namespace mop::data
