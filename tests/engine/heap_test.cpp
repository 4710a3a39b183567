#include "sim/engine/heap.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace mop::engine {
namespace {

TEST(Heap, AgreesWithASortedSetUnderRandomChanges) {
  constexpr uint32_t kSlots = 61;
  std::mt19937 random(7);
  Heap heap;
  heap.resize(kSlots);
  std::set<std::pair<Time, uint32_t>> expected;
  std::vector<Time> time(kSlots, -1);
  for (int i = 0; i < 20000; ++i) {
    if (random() % 3 != 0 || expected.empty()) {
      const uint32_t slot = static_cast<uint32_t>(random() % kSlots);
      const Time at = static_cast<Time>(random() % 50);
      if (time[slot] >= 0) expected.erase({time[slot], slot});
      expected.insert({at, slot});
      time[slot] = at;
      heap.set(slot, at);
    } else {
      time[expected.begin()->second] = -1;
      expected.erase(expected.begin());
      heap.pop();
    }
    ASSERT_EQ(heap.empty(), expected.empty());
    if (expected.empty()) continue;
    ASSERT_EQ(heap.top().time, expected.begin()->first);
    ASSERT_EQ(heap.top().slot, expected.begin()->second);
  }
}

}  // namespace
}  // namespace mop::engine
