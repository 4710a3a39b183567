#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "exec/data/permutation.h"
#include "sim/base/error.h"

namespace mop::data {
namespace {

std::vector<int64_t> order(int64_t size, uint64_t seed) {
  const Permutation permutation(size, seed);
  std::vector<int64_t> elements;
  for (int64_t i = 0; i < size; ++i) elements.push_back(permutation(i));
  return elements;
}

TEST(Permutation, HasEveryElementOnce) {
  for (int64_t size = 1; size < 300; ++size) {
    std::vector<int64_t> elements = order(size, static_cast<uint64_t>(size));
    std::ranges::sort(elements);
    for (int64_t i = 0; i < size; ++i) ASSERT_EQ(elements[static_cast<size_t>(i)], i) << size;
  }
  for (const int64_t size : {65535, 65536, 65537, 1000003}) {
    std::vector<int64_t> elements = order(size, 1);
    std::ranges::sort(elements);
    EXPECT_EQ(std::ranges::adjacent_find(elements), elements.end());
    EXPECT_EQ(elements.front(), 0);
    EXPECT_EQ(elements.back(), size - 1);
  }
}

TEST(Permutation, WorksOnSizesThatNoMemoryHolds) {
  const int64_t size = (int64_t{1} << 61) + 12345;
  const Permutation permutation(size, 3);
  std::set<int64_t> seen;
  for (int64_t i = 0; i < 1000; ++i) {
    const int64_t element = permutation(size - 1 - i);
    EXPECT_GE(element, 0);
    EXPECT_LT(element, size);
    EXPECT_TRUE(seen.insert(element).second);
  }
}

TEST(Permutation, IsFixedBySizeAndSeed) {
  EXPECT_EQ(order(1000, 7), order(1000, 7));
  EXPECT_NE(order(1000, 7), order(1000, 8));
  EXPECT_THROW(Permutation(10, 0)(10), InternalError);
  EXPECT_THROW(Permutation(10, 0)(-1), InternalError);
}

// Over seeds, each element is at each place equally often: chi-square within six standard deviations.
TEST(Permutation, IsUniformOverSeeds) {
  for (const int64_t size : {10, 17}) {
    const int seeds = 20000;
    std::vector<double> count(static_cast<size_t>(size * size));
    for (int seed = 0; seed < seeds; ++seed) {
      const Permutation permutation(size, static_cast<uint64_t>(seed));
      for (int64_t i = 0; i < size; ++i) ++count[static_cast<size_t>(i * size + permutation(i))];
    }
    const double expected = static_cast<double>(seeds) / static_cast<double>(size);
    double chi = 0;
    for (const double c : count) chi += (c - expected) * (c - expected) / expected;
    const auto degrees = static_cast<double>((size - 1) * (size - 1));
    EXPECT_LT(chi, degrees + 6 * std::sqrt(2 * degrees)) << size;
    EXPECT_GT(chi, degrees - 6 * std::sqrt(2 * degrees)) << size;
  }
}

// Neighbours do not stay neighbours: of 100000 random pairs about one is a step apart in either direction.
TEST(Permutation, BreaksUpNeighbours) {
  const std::vector<int64_t> elements = order(100000, 5);
  int together = 0;
  for (size_t i = 1; i < elements.size(); ++i) together += std::abs(elements[i] - elements[i - 1]) == 1;
  EXPECT_LT(together, 15);
}

}  // namespace
}  // namespace mop::data
