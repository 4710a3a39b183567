// The value in the middle; of an even number, the mean of the two. 0 of none.
#pragma once
#include <algorithm>
#include <vector>

namespace mop {

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

}  // namespace mop
