// A pseudo-random order of 0 .. size - 1, computed element by element: a Feistel network over the next even
// power of two (Luby and Rackoff, 1988), walked until it lands below `size`. No memory, whatever the size.
#pragma once
#include <cstdint>

namespace mop::data {

class Permutation {
 public:
  Permutation(int64_t size, uint64_t seed);

  // The element at place `index`, 0 <= index < size.
  int64_t operator()(int64_t index) const;

 private:
  uint64_t size_, seed_;
  int half_;  // bits
};

}  // namespace mop::data
