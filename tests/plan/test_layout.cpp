// Where the groups of a plan are: whatever the degrees, the groups of every axis tile the ranks exactly once.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "sim/base/error.h"
#include "sim/plan/plan.h"

namespace mop::plan {
namespace {

std::vector<int64_t> group_of(int64_t rank, const Span& span) {
  const int64_t base = rank - rank / span.stride % span.size * span.stride;
  std::vector<int64_t> members;
  for (int64_t i = 0; i < span.size; ++i) members.push_back(base + i * span.stride);
  return members;
}

// Each rank is in one group, each member of a group names the same group, and no group leaves the ranks.
void expect_tiles(const Span& span, int64_t ranks, const char* what) {
  ASSERT_GE(span.size, 1) << what;
  ASSERT_GE(span.stride, 1) << what;
  ASSERT_EQ(ranks % span.size, 0) << what;
  std::map<int64_t, std::vector<int64_t>> group_by_rank;
  for (int64_t r = 0; r < ranks; ++r) {
    const std::vector<int64_t> members = group_of(r, span);
    EXPECT_NE(std::find(members.begin(), members.end(), r), members.end()) << what << " rank " << r;
    EXPECT_GE(members.front(), 0) << what;
    EXPECT_LT(members.back(), ranks) << what << " rank " << r;
    group_by_rank[r] = members;
    EXPECT_GE(span.group(r), 0) << what;
    EXPECT_LT(span.group(r), ranks / span.size) << what << " rank " << r;
    EXPECT_EQ(span.first(span.group(r)), members.front()) << what << " rank " << r;
  }
  for (const auto& [r, members] : group_by_rank)
    for (const int64_t other : members) EXPECT_EQ(group_by_rank[other], members) << what;
}

// Two axes that share nothing but the rank itself, and together reach `ranks` of them.
void expect_grid(const Span& a, const Span& b, int64_t ranks, const char* what) {
  for (int64_t r = 0; r < ranks; ++r) {
    std::set<int64_t> reached;
    for (const int64_t x : group_of(r, a))
      for (const int64_t y : group_of(x, b))
        EXPECT_TRUE(reached.insert(y).second) << what << ": " << y << " twice";
    EXPECT_EQ(static_cast<int64_t>(reached.size()), a.size * b.size) << what;
  }
}

int64_t divisor(int64_t number, std::mt19937_64& random) {
  std::vector<int64_t> all;
  for (int64_t d = 1; d <= number; ++d)
    if (number % d == 0) all.push_back(d);
  return all[random() % all.size()];
}

TEST(Layout, MopGroupsTileTheRanks) {
  std::mt19937_64 random(6);
  for (int i = 0; i < 400; ++i) {
    const int64_t gpus = std::array{1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 96}[random() % 11];
    Plan plan = parse_plan("mop:vp-scheme=tokens,mla-exchange=latent,checkpoints=hbm,optimizer=hbm");
    plan.expert = divisor(gpus, random);
    plan.dense_shard = divisor(gpus, random);
    plan.sequence = divisor(gpus, random);
    plan.vocabulary = divisor(gpus, random);
    plan.expert_placement = random() % 2 == 0 ? ExpertPlacement::inside : ExpertPlacement::across;
    SCOPED_TRACE(describe(plan) + " on " + std::to_string(gpus));
    const Layout l = layout(plan, gpus);
    EXPECT_EQ(l.ranks, gpus);
    for (const auto& [span, name] : {std::pair{l.dense, "dense"},
                                     {l.dense_replicas, "replicas"},
                                     {l.expert, "expert"},
                                     {l.expert_shard, "expert shard"},
                                     {l.sequence, "sequence"},
                                     {l.vocabulary, "vocabulary"},
                                     {l.vocabulary_replicas, "vocabulary replicas"}})
      expect_tiles(span, gpus, name);
    EXPECT_EQ(l.expert.size, plan.expert);
    EXPECT_EQ(l.expert.size * l.expert_shard.size, gpus);
    EXPECT_EQ(l.dense.size * l.dense_replicas.size, gpus);
    EXPECT_EQ(l.vocabulary.size * l.vocabulary_replicas.size, gpus);
    EXPECT_EQ(l.sequence.size * l.sequence_groups, gpus);
    expect_grid(l.expert, l.expert_shard, gpus, "experts");
    expect_grid(l.dense, l.dense_replicas, gpus, "dense");
    expect_grid(l.vocabulary, l.vocabulary_replicas, gpus, "vocabulary");
  }
}

TEST(Layout, Fsdp2GroupsTileTheRanks) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 400; ++i) {
    const int64_t gpus = std::array{1, 2, 4, 8, 12, 16, 24, 32, 64, 96}[random() % 10];
    Plan plan = parse_plan("fsdp2");
    plan.replicate = divisor(gpus, random);
    const int64_t replica = gpus / plan.replicate;
    plan.tensor = divisor(replica, random);
    plan.context = divisor(replica / plan.tensor, random);
    plan.expert = divisor(replica, random);
    SCOPED_TRACE(describe(plan) + " on " + std::to_string(gpus));
    const Layout l = layout(plan, gpus);
    for (const auto& [span, name] : {std::pair{l.tensor, "tensor"},
                                     {l.context, "context"},
                                     {l.dense, "dense"},
                                     {l.dense_replicas, "replicas"},
                                     {l.expert, "expert"},
                                     {l.expert_shard, "expert shard"},
                                     {l.sequence, "sequence"}})
      expect_tiles(span, gpus, name);
    EXPECT_EQ(l.sequence.size, plan.tensor * plan.context);
    EXPECT_EQ(l.sequence.size * l.sequence_groups, gpus);
    EXPECT_EQ(l.tensor.size * l.dense.size * l.dense_replicas.size, gpus);
    expect_grid(l.tensor, l.dense, gpus, "tensor and shard");
    expect_grid(l.tensor, l.context, gpus, "tensor and context");
    expect_grid(l.dense, l.dense_replicas, gpus, "shard and replicas");
    if (plan.expert > 1) {
      EXPECT_EQ(l.expert.size * l.expert_shard.size * l.dense_replicas.size, gpus);
      expect_grid(l.expert, l.expert_shard, gpus, "experts");
      expect_grid(l.expert_shard, l.dense_replicas, gpus, "expert shards and replicas");
    }
    // Ranks of a sequence hold shards of the same copy of the weights.
    for (int64_t r = 0; r < gpus; ++r)
      for (const int64_t other : group_of(r, l.sequence)) EXPECT_EQ(other / replica, r / replica);
  }
}

TEST(Layout, PlacementPutsOneOfTheTwoInsideTheNode) {
  Plan plan = parse_plan(
      "mop:ep=8,dense-shard=96,ulysses=1,vp=8,vp-scheme=tokens,mla-exchange=latent,checkpoints=hbm,"
      "optimizer=hbm");
  Layout l = layout(plan, 96);
  EXPECT_EQ(group_of(0, l.expert), (std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(group_of(1, l.expert_shard)[1], 9);
  EXPECT_EQ(l.expert_shard.size, 12);
  plan.expert_placement = ExpertPlacement::across;
  plan.expert = 12;
  l = layout(plan, 96);
  EXPECT_EQ(group_of(0, l.expert_shard), (std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(group_of(3, l.expert)[1], 11);
}

TEST(Layout, NeedsAResolvedPlan) {
  EXPECT_THROW(layout(parse_plan("mop"), 8), InternalError);
  EXPECT_THROW(layout(parse_plan("fsdp2:tp=auto"), 8), InternalError);
}

}  // namespace
}  // namespace mop::plan
