// Folding: which ranks behave alike, and that simulating one of each gives what simulating all gives.
#include "sim/predict/fold.h"

#include <gtest/gtest.h>

#include <numeric>

#include "tests/predict/support.h"

namespace mop::predict::testing {
namespace {

using program::Axis;
using program::Group;

int64_t members(const Fold& f) {
  return std::accumulate(f.classes.begin(), f.classes.end(), int64_t{0},
                         [](int64_t sum, const RankClass& c) { return sum + c.members; });
}

TEST(Fold, AlikeRanksAreOneClass) {
  const Fold f = fold(std::vector<uint32_t>(32, 0), {{Axis::world, 32, 1}, {Axis::expert, 8, 1}}, 8, false);
  ASSERT_EQ(f.classes.size(), 1u);
  EXPECT_EQ(f.classes[0].members, 32);
  EXPECT_EQ(f.classes[0].per_node, 8u);
  EXPECT_EQ(f.nodes, 1u);
  EXPECT_EQ(f.meeting_size, (std::vector<uint32_t>{1, 1}));
}

TEST(Fold, UnfoldedEachRankIsItsOwn) {
  const Fold f = fold(std::vector<uint32_t>(16, 0),
                      {{Axis::world, 16, 1}, {Axis::expert, 4, 1}, {Axis::expert_shard, 4, 4}}, 8, true);
  ASSERT_EQ(f.classes.size(), 16u);
  EXPECT_EQ(f.nodes, 2u);
  for (size_t r = 0; r < 16; ++r) {
    EXPECT_EQ(f.classes[r].rank, static_cast<int64_t>(r));
    EXPECT_EQ(f.classes[r].members, 1);
    EXPECT_EQ(f.classes[r].per_node, 1u);
    EXPECT_EQ(f.classes[r].node, r / 8);
    // Ranks meet exactly those of their group.
    for (size_t o = 0; o < 16; ++o) {
      EXPECT_EQ(f.classes[r].meeting[0] == f.classes[o].meeting[0], true);
      EXPECT_EQ(f.classes[r].meeting[1] == f.classes[o].meeting[1], r / 4 == o / 4);
      EXPECT_EQ(f.classes[r].meeting[2] == f.classes[o].meeting[2], r % 4 == o % 4);
    }
  }
  EXPECT_EQ(f.meeting_size.size(), 1u + 4 + 4);
}

TEST(Fold, PlacesInTheExpertGroup) {
  // Eight places of an expert group a node, on four nodes: eight classes, alike on every node.
  std::vector<uint32_t> kinds(32);
  for (uint32_t r = 0; r < 32; ++r) kinds[r] = r % 8;
  const Fold f = fold(kinds, {{Axis::expert, 8, 1}, {Axis::expert_shard, 4, 8}}, 8, false);
  ASSERT_EQ(f.classes.size(), 8u);
  EXPECT_EQ(f.nodes, 1u);
  for (const RankClass& c : f.classes) {
    EXPECT_EQ(c.members, 4);
    EXPECT_EQ(c.per_node, 1u);
  }
  EXPECT_EQ(f.meeting_size[f.classes[0].meeting[0]], 8u);
  EXPECT_EQ(f.meeting_size[f.classes[0].meeting[1]], 1u);  // alike ranks meet: one simulated
}

TEST(Fold, OneOddRankTellsApartThoseItMeets) {
  // Rank 0 differs. Its pair partner differs from other ranks by whom it meets, and its node's others by
  // their node.
  std::vector<uint32_t> kinds(16, 0);
  kinds[0] = 1;
  const Fold f = fold(kinds, {{Axis::expert, 2, 1}}, 4, false);
  // The odd rank, its partner, the two others of their node, the ranks of other nodes.
  ASSERT_EQ(f.classes.size(), 4u);
  EXPECT_EQ(f.nodes, 2u);
  EXPECT_EQ(members(f), 16);
  std::vector<int64_t> sizes;
  for (const RankClass& c : f.classes) sizes.push_back(c.members);
  std::sort(sizes.begin(), sizes.end());
  EXPECT_EQ(sizes, (std::vector<int64_t>{1, 1, 2, 12}));
}

TEST(Fold, WithoutGroupsOrNodesOnlyKindsCount) {
  const Fold f = fold({0, 1, 0, 1, 2, 2}, {}, 1, false);
  EXPECT_EQ(f.classes.size(), 3u);
  EXPECT_EQ(members(f), 6);
}

void expect_same(const Scenario& s) {
  const Prediction folded = predict(s), unfolded = predict(s, {.unfold = true});
  ASSERT_TRUE(folded.fits) << folded.why_not;
  EXPECT_LE(folded.classes, unfolded.classes);
  EXPECT_EQ(static_cast<int64_t>(unfolded.classes), s.gpus());
  EXPECT_EQ(*folded.step_time, *unfolded.step_time);
  EXPECT_EQ(folded.hbm_peak, unfolded.hbm_peak);
  EXPECT_EQ(folded.hbm_allocated, unfolded.hbm_allocated);
  EXPECT_EQ(folded.host_peak, unfolded.host_peak);
  EXPECT_EQ(folded.exposed_communication, unfolded.exposed_communication);
  EXPECT_EQ(folded.compute_busy, unfolded.compute_busy);
  ASSERT_EQ(folded.busy.size(), unfolded.busy.size());
  for (size_t i = 0; i < folded.busy.size(); ++i)
    EXPECT_DOUBLE_EQ(folded.busy[i].value, unfolded.busy[i].value) << folded.busy[i].name;
}

TEST(Fold, FoldedEqualsUnfolded) {
  for (const char* routing : {"balanced", "zipf:0.8", "hot:0.4@2,seed=3"})
    for (const char* plan : {"fsdp2", "fsdp2:ep=8", "fsdp2:ep=4,cp=2,offload=on", "fsdp2:cp=4,cp-balance=off",
                             "fsdp2:tp=2,replicate=2", "fsdp2:runtime=native,ep=4,offload=on",
                             "fsdp2:runtime=native,ep=8,replicate=2,reduce=fp32",
                             "fsdp2:runtime=native,ep=4,tp=2,cp=2,recompute=none"}) {
      SCOPED_TRACE(std::string(plan) + " " + routing);
      expect_same(make("tiny-qwen3-moe", "h200", 2, plan, 1024, 1, 1, routing));
    }
  for (const char* routing : {"balanced", "zipf:0.8", "hot:0.4@2,seed=3"})
    for (const std::string& plan :
         {mop_plan(8, 16, 2, 4), mop_plan(4, 8, 1, 8, "expert-placement=across,optimizer=host"),
          mop_plan(2, 16, 4, 2, "checkpoints=host,optimizer=stream,round-rows=256,spill-min-rows=16")}) {
      SCOPED_TRACE(plan + " " + routing);
      expect_same(make("tiny-deepseek-v3", "h200", 2, plan, 1024, 1, 1, routing));
    }
}

TEST(Fold, FoldedEqualsUnfoldedOnFourNodes) {
  expect_same(make("tiny-qwen3-moe", "h200", 4, mop_plan(8, 32, 2, 8), 4096, 1, 1, "zipf:1.0"));
  expect_same(
      make("olmoe-1b-7b", "h200", 4, mop_plan(8, 32, 4, 8, "optimizer=host"), 8192, 1, 1, "zipf:0.6"));
  expect_same(make("olmoe-1b-7b", "h200", 4, "fsdp2:ep=8", 4096));
}

TEST(Fold, IndependentGroupsDoNotFold) {
  const Scenario s =
      make("tiny-qwen3-moe", "h200", 2, mop_plan(8, 16, 1, 4), 1024, 1, 1, "zipf:0.8,independent");
  expect_same(s);
}

}  // namespace
}  // namespace mop::predict::testing
