#include "sim/engine/sharing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "sim/engine/tasks.h"

namespace mop::engine {
namespace {

struct Flow {
  uint32_t weight;
  std::vector<std::pair<uint32_t, int64_t>> uses;  // resource, amount
};

std::vector<uint32_t> rates(uint32_t resources, const std::vector<Flow>& flows) {
  Sharing sharing;
  for (uint32_t r = 0; r < resources; ++r) sharing.add_resource();
  for (const Flow& flow : flows) {
    sharing.add_flow(flow.weight);
    for (const auto& [resource, amount] : flow.uses) sharing.add_use(resource, amount);
  }
  sharing.solve();
  std::vector<uint32_t> rates;
  for (uint32_t i = 0; i < flows.size(); ++i) rates.push_back(sharing.rate(i));
  return rates;
}

uint32_t part(double of_full) {
  return static_cast<uint32_t>(of_full * kFull);
}

TEST(Sharing, EqualFlowsHalveALink) {
  EXPECT_EQ(rates(1, {{1, {{0, kFull}}}, {1, {{0, kFull}}}}), (std::vector{part(0.5), part(0.5)}));
}

TEST(Sharing, WeightsDivideALink) {
  EXPECT_EQ(rates(1, {{3, {{0, kFull}}}, {1, {{0, kFull}}}}), (std::vector{part(0.75), part(0.25)}));
}

// A flow that needs little is served in full, the rest goes to the others.
TEST(Sharing, BoundedFlowLeavesTheRest) {
  // Weights undo the unequal shares, so that bytes are shared fairly: 1/4 each would be fair, one asks for
  // 1/8.
  const auto got = rates(1, {{8, {{0, kFull / 8}}}, {1, {{0, kFull}}}, {1, {{0, kFull}}}});
  EXPECT_EQ(got[0], kFull);
  EXPECT_EQ(got[1], part(7.0 / 16));
  EXPECT_EQ(got[2], part(7.0 / 16));
}

// The parking lot: one long flow over all links, one short flow on each.
TEST(Sharing, ParkingLot) {
  std::vector<Flow> flows{{1, {{0, kFull}, {1, kFull}, {2, kFull}}}};
  for (uint32_t link = 0; link < 3; ++link) flows.push_back({1, {{link, kFull}}});
  for (const uint32_t rate : rates(3, flows)) EXPECT_EQ(rate, part(0.5));
}

// Bertsekas and Gallager: the bottleneck of some leaves others more than an equal part elsewhere.
TEST(Sharing, SecondBottleneckFillsUp) {
  // Link 0 carries four flows, link 1 one of them and another flow.
  std::vector<Flow> flows{{1, {{0, kFull}, {1, kFull}}}};
  for (int i = 0; i < 3; ++i) flows.push_back({1, {{0, kFull}}});
  flows.push_back({1, {{1, kFull}}});
  const auto got = rates(2, flows);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(got[static_cast<size_t>(i)], part(0.25));
  EXPECT_EQ(got[4], part(0.75));
}

TEST(Sharing, AmountsBeyondTheCapacity) {
  EXPECT_EQ(rates(1, {{1, {{0, 8 * kFull}}}}), std::vector{part(0.125)});
}

// Whatever is drawn: within capacity and bound, nothing left over for anyone, and fair: a task that does not
// run at full speed has a saturated resource on which no other has a higher level.
TEST(Sharing, RandomSolutionsAreMaxMinFairAndIgnoreTheOrder) {
  std::mt19937 random(11);
  for (int trial = 0; trial < 2000; ++trial) {
    const uint32_t resources = 1 + static_cast<uint32_t>(random() % 6);
    std::vector<Flow> flows(1 + random() % 20);
    for (Flow& flow : flows) {
      flow.weight = 1 + static_cast<uint32_t>(random() % (trial % 2 ? 1 : 200));
      for (uint32_t r = 0; r < resources; ++r) {
        if (random() % 2 || (r + 1 == resources && flow.uses.empty())) {
          flow.uses.push_back(
              {r, 1 + static_cast<int64_t>(random() % (random() % 2 ? 2 * kFull : kFull / 50))});
        }
      }
    }
    const std::vector<uint32_t> got = rates(resources, flows);

    std::vector<__int128> used(resources);
    for (size_t i = 0; i < flows.size(); ++i) {
      ASSERT_LE(got[i], kFull);
      for (const auto& [r, amount] : flows[i].uses) used[r] += static_cast<__int128>(amount) * got[i];
    }
    const __int128 capacity = static_cast<__int128>(kFull) * kFull;
    std::vector<double> top(resources);
    for (size_t i = 0; i < flows.size(); ++i) {
      for (const auto& [r, amount] : flows[i].uses)
        top[r] = std::max(top[r], got[i] / double(flows[i].weight));
    }
    for (uint32_t r = 0; r < resources; ++r) ASSERT_TRUE(used[r] <= capacity);
    for (size_t i = 0; i < flows.size(); ++i) {
      if (got[i] == kFull) continue;
      bool bottleneck = false;
      for (const auto& [r, amount] : flows[i].uses) {
        __int128 slack = 0;  // what rounding down loses
        for (const Flow& flow : flows) {
          for (const auto& [other, much] : flow.uses) slack += other == r ? much : 0;
        }
        bottleneck |=
            capacity - used[r] <= slack && (got[i] + 1) / double(flows[i].weight) >= top[r] * (1 - 1e-12);
      }
      ASSERT_TRUE(bottleneck) << "trial " << trial << " flow " << i;
    }

    std::vector<size_t> order(flows.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<Flow> shuffled;
    for (const size_t i : order) shuffled.push_back(flows[i]);
    const std::vector<uint32_t> again = rates(resources, shuffled);
    for (size_t i = 0; i < order.size(); ++i) ASSERT_EQ(again[i], got[order[i]]);
  }
}

// Both links saturate at level 1/3, as 1 / 3 and as 0.75 / 2.25, and lose a fraction to rounding. Whichever
// of them is looked at first, the other must not profit from it.
TEST(Sharing, LinksThatSaturateTogetherFreezeTogether) {
  for (const uint32_t first : {0u, 1u}) {
    const uint32_t second = 1 - first;
    const auto got = rates(2, {{1, {{first, kFull}, {second, kFull}}},
                               {1, {{first, kFull}}},
                               {1, {{first, kFull}}},
                               {4, {{second, kFull / 4}}},
                               {2, {{second, kFull * 5 / 8}}}});
    EXPECT_EQ(got, (std::vector<uint32_t>{kFull / 3, kFull / 3, kFull / 3, kFull, 2 * kFull / 3}));
  }
}

// Sums of shares are what counts, not how many flows they come from: the ground on which folding stands.
TEST(Sharing, EightAlikeEqualOneWithEightfoldAmount) {
  const std::vector<Flow> folded{
      {5, {{0, 8 * 300000}, {1, 900000}}}, {2, {{0, 8 * 400000}}}, {7, {{1, 800000}}}};
  std::vector<Flow> unfolded;
  for (uint32_t rank = 0; rank < 8; ++rank) {
    unfolded.push_back({5, {{0, 300000}, {1 + rank, 900000}}});
    unfolded.push_back({2, {{0, 400000}}});
    unfolded.push_back({7, {{1 + rank, 800000}}});
  }
  const auto one = rates(2, folded), eight = rates(9, unfolded);
  for (size_t i = 0; i < eight.size(); ++i) EXPECT_EQ(eight[i], one[i % 3]);
}

}  // namespace
}  // namespace mop::engine
