#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory_resource>
#include <numeric>
#include <random>
#include <set>

#include "sim/base/error.h"
#include "sim/plan/rounds.h"
#include "sim/plan/routing.h"

namespace mop::plan {
namespace {

using Row = std::vector<int64_t>;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// for_each_computed gives the flows of received(), by the item of work that they belong to, then by source.
void check_order_of_work(const RoundPlan& rounds, int round, int rank, const std::vector<Flow>& received) {
  const auto work = rounds.work(rounds.pass_of(round), rank);
  std::vector<int64_t> scratch(static_cast<size_t>(rounds.counts().ranks()));
  std::vector<Flow> flows;
  std::pair<size_t, int> last{0, -1};
  rounds.for_each_computed(round, rank, scratch, [&](size_t item, const Flow& flow, int64_t before) {
    ASSERT_LT(last, std::pair(item, flow.source));
    last = {item, flow.source};
    ASSERT_EQ(work[item].expert, flow.expert);
    const int64_t first = rounds.counts().before(flow.source, flow.expert);
    ASSERT_GE(first + flow.first, work[item].first);
    ASSERT_LE(first + flow.last, work[item].last);
    int64_t earlier = 0;  // of the same source, in the order in which it sends
    for (const Flow& f : received) {
      if (f == flow) break;
      if (f.source == flow.source) earlier += f.rows();
    }
    ASSERT_EQ(before, earlier);
    flows.push_back(flow);
  });
  ASSERT_TRUE(std::ranges::is_permutation(flows, received));
}

// Plays all rounds and checks every promise of rounds.h against rows counted one by one.
void check(const Counts& counts, const LeastLoadedPlan& plan, int64_t capacity, int slots) {
  const int ranks = counts.ranks(), experts = counts.experts();
  const RoundPlan rounds(counts, plan, capacity, slots);

  // Which rank computes each row of an expert, and how often it was moved.
  std::vector<std::vector<int>> computed_by(experts), moved(experts);
  for (int e = 0; e < experts; ++e) {
    computed_by[e].assign(counts.load(e), -1);
    moved[e].assign(counts.load(e), 0);
  }
  for (const Assignment& a : plan.assignments)
    std::fill(computed_by[a.expert].begin() + a.first, computed_by[a.expert].begin() + a.last, a.rank);

  std::vector<RankSummary> seen(ranks);
  for (RankSummary& s : seen) s.received = s.sent = Row(ranks);
  std::vector<std::set<int>> experts_of(ranks);
  for (int round = 0; round < rounds.rounds(); ++round) {
    const int pass = rounds.pass_of(round);
    std::vector<std::set<int>> resident(ranks);
    for (const WeightTransfer& t : rounds.transfers(pass)) resident[t.to].insert(t.expert);
    Row sent(ranks), received(ranks), between(ranks * ranks);
    std::vector<Flow> from_sources, to_destinations;
    for (int r = 0; r < ranks; ++r) {
      ASSERT_LE(resident[r].size(), static_cast<size_t>(slots));
      for (const Flow& f : rounds.sent(round, r)) {
        ASSERT_EQ(f.source, r);
        ASSERT_LT(f.first, f.last);
        ASSERT_LE(f.last, counts.at(f.source, f.expert));
        ASSERT_TRUE(owner(f.expert, experts, ranks) == f.destination ||
                    resident[f.destination].contains(f.expert));
        for (int64_t row = f.first; row < f.last; ++row) {
          const int64_t q = counts.before(f.source, f.expert) + row;
          ++moved[f.expert][q];
          ASSERT_EQ(computed_by[f.expert][q], f.destination);
        }
        sent[f.source] += f.rows();
        received[f.destination] += f.rows();
        between[f.source * ranks + f.destination] += f.rows();
        seen[f.source].sent[f.destination] += f.rows();
        seen[f.destination].received[f.source] += f.rows();
        experts_of[f.destination].insert(f.expert);
        from_sources.push_back(f);
      }
      const std::vector<Flow> in = rounds.received(round, r);
      check_order_of_work(rounds, round, r, in);
      if (testing::Test::HasFatalFailure()) return;
      to_destinations.insert(to_destinations.end(), in.begin(), in.end());
    }
    // Both ends see the same flows, those of a pair in the same order.
    std::ranges::stable_sort(from_sources, {},
                             [](const Flow& f) { return std::pair(f.destination, f.source); });
    ASSERT_EQ(from_sources, to_destinations);
    for (int r = 0; r < ranks; ++r) {
      ASSERT_LE(sent[r], capacity);
      ASSERT_LE(received[r], capacity);
      ASSERT_EQ(received[r], rounds.rows_received(round, r));
      for (int d = 0; d < ranks; ++d) ASSERT_EQ(between[r * ranks + d], rounds.rows_between(round, r, d));
      seen[r].rows += received[r];
      if (round == 0) seen[r].first_rows = received[r];
      seen[r].max_rows = std::max(seen[r].max_rows, received[r]);
      if (pass == 0) seen[r].typical_rows += received[r];
    }
  }
  for (int e = 0; e < experts; ++e)
    ASSERT_TRUE(std::ranges::all_of(moved[e], [](int times) { return times == 1; })) << "expert " << e;

  size_t transfers = 0;
  for (int pass = 0; pass < rounds.passes(); ++pass) transfers += rounds.transfers(pass).size();
  ASSERT_EQ(transfers, plan.transfers.size());
  for (int r = 0; r < ranks; ++r) {
    const RankSummary summary = rounds.summary(r);
    ASSERT_EQ(summary.rows, seen[r].rows);
    ASSERT_EQ(summary.rows, plan.rows[r]);
    ASSERT_EQ(summary.first_rows, seen[r].first_rows);
    ASSERT_EQ(summary.max_rows, seen[r].max_rows);
    ASSERT_EQ(summary.typical_rows, ceil_div(seen[r].typical_rows, std::max(1, rounds.rounds(0))));
    ASSERT_EQ(summary.received, seen[r].received);
    ASSERT_EQ(summary.sent, seen[r].sent);
    ASSERT_EQ(summary.experts, static_cast<int>(experts_of[r].size()));
    std::vector<int> in(ranks), out(ranks);
    for (const WeightTransfer& t : plan.transfers) {
      if (t.to == r) ++in[t.from];
      if (t.from == r) ++out[t.to];
    }
    ASSERT_EQ(summary.spilled_in, in);
    ASSERT_EQ(summary.spilled_out, out);
  }
}

// The rule of rounds.h, row by row: position q of a destination moves in round q mod R. The most rows that a
// rank sends or receives in a round of `pass` cut into R rounds.
int64_t fullest_round(const Counts& counts, const RoundPlan& rounds, int pass, int64_t R) {
  const int ranks = counts.ranks();
  std::map<std::pair<int, int64_t>, int64_t> sent, received;
  int64_t below = 0, fullest = 0;
  for (int d = 0; d < ranks; ++d) {
    int64_t q = below / ranks;
    for (int s = 0; s < ranks; ++s)
      for (const Assignment& a : rounds.work(pass, d))
        for (int64_t row = counts.before(s, a.expert); row < counts.before(s + 1, a.expert); ++row) {
          if (row < a.first || row >= a.last) continue;
          fullest = std::max({fullest, ++sent[{s, q % R}], ++received[{d, q % R}]});
          ++q, ++below;
        }
  }
  return fullest;
}

struct Case {
  Counts counts;
  LeastLoadedPlan plan;
  int64_t capacity;
  int slots;
};

Case random_case(std::mt19937_64& random, bool uniform) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  const int ranks = static_cast<int>(pick(1, 12)), experts = ranks * static_cast<int>(pick(1, 4));
  const int64_t scale = int64_t{1} << pick(0, 6);
  Row heat(experts), values;
  for (int64_t& h : heat) h = pick(0, 4) == 0 ? 20 * scale : pick(0, scale);
  for (int s = 0; s < ranks; ++s)
    for (int e = 0; e < experts; ++e) values.push_back(uniform ? heat[e] : pick(0, heat[e]));
  Counts counts = uniform ? Counts::uniform(ranks, heat) : Counts(ranks, experts, values);
  LeastLoadedOptions options;
  options.min_rows = int64_t{1} << pick(0, 6);
  options.lambda = pick(0, 4) == 0 ? kNeverSpill : 1.0;
  options.alpha = pick(0, 2) == 0 ? 0.7 : 1.0;
  LeastLoadedPlan plan = least_loaded(counts.loads(), ranks, options);
  const int64_t capacity = ranks + (pick(0, 2) == 0 ? pick(0, 3) : pick(0, 40 * scale));
  return {std::move(counts), std::move(plan), capacity, static_cast<int>(pick(1, 3))};
}

TEST(Rounds, RandomGroupsMoveEveryRowOnceWithinCapacityAndSlots) {
  std::mt19937_64 random(5);
  int spilled = 0, more_passes = 0;
  for (int trial = 0; trial < 400; ++trial) {
    SCOPED_TRACE(trial);
    const Case c = random_case(random, trial % 2 == 0);
    check(c.counts, c.plan, c.capacity, c.slots);
    if (HasFatalFailure()) return;
    spilled += !c.plan.transfers.empty();
    more_passes += RoundPlan(c.counts, c.plan, c.capacity, c.slots).passes() > 1;
  }
  EXPECT_GT(spilled, 150);
  EXPECT_GT(more_passes, 50);
}

TEST(Rounds, FewestRoundsThatFit) {
  std::mt19937_64 random(6);
  int passes = 0, at_bound = 0;
  for (int trial = 0; trial < 300; ++trial) {
    SCOPED_TRACE(trial);
    const Case c = random_case(random, trial % 2 == 0);
    const RoundPlan rounds(c.counts, c.plan, c.capacity, c.slots);
    for (int pass = 0; pass < rounds.passes(); ++pass) {
      const int64_t R = rounds.rounds(pass);
      if (R == 0) continue;
      EXPECT_LE(fullest_round(c.counts, rounds, pass, R), c.capacity);
      // No fewer rounds could do, with this rule; below total / capacity with none.
      const int64_t least = ceil_div(fullest_round(c.counts, rounds, pass, 1), c.capacity);
      EXPECT_GE(R, least);
      for (int64_t fewer = least; fewer < std::min(R, least + 32); ++fewer)
        EXPECT_GT(fullest_round(c.counts, rounds, pass, fewer), c.capacity) << fewer << " of " << R;
      ++passes;
      at_bound += R == least;
    }
  }
  std::printf("%d of %d passes need no more rounds than total / capacity\n", at_bound, passes);
}

// As large as they get: the odd rows of 96 sources rarely cost a round.
TEST(Rounds, LargeGroupsAreAtTheBound) {
  std::mt19937_64 random(8);
  const int ranks = 96, experts = 384, top_k = 8;
  int passes = 0, at_bound = 0, worst = 0;
  for (int trial = 0; trial < 60; ++trial) {
    const int64_t tokens = 1000 + static_cast<int64_t>(random() % 4000), capacity = 1024 << random() % 4;
    const Row row =
        draw(parse_routing(trial % 2 ? "zipf:0.8" : "hot:0.2@7"), tokens, top_k, experts, trial, 0);
    Row values;
    for (int s = 0; s < ranks; ++s)
      for (const int64_t n : row)
        values.push_back(trial % 4 < 2 ? n : static_cast<int64_t>(random() % (2 * n + 1)));
    const Counts counts(ranks, experts, values);
    const LeastLoadedPlan plan = least_loaded(counts.loads(), ranks, {.min_rows = 256});
    const RoundPlan rounds(counts, plan, capacity, 2);
    for (int pass = 0; pass < rounds.passes(); ++pass) {
      Row sent(ranks), received(ranks);
      for (int d = 0; d < ranks; ++d)
        for (const Assignment& a : rounds.work(pass, d))
          for (int s = 0; s < ranks; ++s) {
            const int64_t n = std::min(a.last, counts.before(s + 1, a.expert)) -
                              std::max(a.first, counts.before(s, a.expert));
            sent[s] += std::max<int64_t>(n, 0);
            received[d] += std::max<int64_t>(n, 0);
          }
      const int least = static_cast<int>(
          ceil_div(std::max(*std::ranges::max_element(sent), *std::ranges::max_element(received)), capacity));
      ++passes;
      at_bound += rounds.rounds(pass) == least;
      worst = std::max(worst, rounds.rounds(pass) - least);
    }
  }
  std::printf("%d of %d passes need no more rounds than total / capacity, the worst %d more\n", at_bound,
              passes, worst);
  EXPECT_LE(worst, 1);
}

TEST(Rounds, UniformCountsEqualTheSameMatrix) {
  std::mt19937_64 random(7);
  for (int trial = 0; trial < 100; ++trial) {
    const Case c = random_case(random, true);
    Row values;
    for (int s = 0; s < c.counts.ranks(); ++s)
      for (int e = 0; e < c.counts.experts(); ++e) values.push_back(c.counts.at(s, e));
    const Counts full(c.counts.ranks(), c.counts.experts(), values);
    ASSERT_EQ(full.loads(), c.counts.loads());
    const RoundPlan a(c.counts, c.plan, c.capacity, c.slots), b(full, c.plan, c.capacity, c.slots);
    ASSERT_EQ(a.rounds(), b.rounds());
    for (int round = 0; round < a.rounds(); ++round)
      for (int r = 0; r < full.ranks(); ++r) ASSERT_EQ(a.sent(round, r), b.sent(round, r));
  }
}

TEST(Rounds, HandMade) {
  // Two ranks, an expert each: 6 + 2 rows of expert 0, 0 + 2 of expert 1. cap 5: rows 5 to 7 of expert 0 go.
  const Counts counts(2, 2, Row{6, 0, 2, 2});
  const LeastLoadedPlan plan = least_loaded(counts.loads(), 2, {.min_rows = 1, .lambda = 1});
  ASSERT_EQ(plan.assignments, (std::pmr::vector<Assignment>{{0, 0, 0, 5}, {0, 1, 5, 8}, {1, 1, 0, 2}}));
  const RoundPlan rounds(counts, plan, 4, 1);
  EXPECT_EQ(rounds.passes(), 1);
  EXPECT_EQ(rounds.rounds(), 2);
  // Rank 0 gets positions 0 to 4, all from source 0: rounds 0 1 0 1 0. Rank 1 starts at position 5 / 2 = 2:
  // source 0's row of expert 0 is at 2, source 1's rows are at 3, 4 (expert 1, its own) and 5, 6 (expert 0).
  EXPECT_EQ(rounds.sent(0, 0), (std::vector<Flow>{{0, 0, 0, 0, 3}, {0, 0, 1, 5, 6}}));
  EXPECT_EQ(rounds.sent(1, 0), (std::vector<Flow>{{0, 0, 0, 3, 5}}));
  EXPECT_EQ(rounds.received(0, 1), (std::vector<Flow>{{0, 0, 1, 5, 6}, {1, 1, 1, 0, 1}, {1, 0, 1, 0, 1}}));
  EXPECT_EQ(rounds.received(1, 1), (std::vector<Flow>{{1, 1, 1, 1, 2}, {1, 0, 1, 1, 2}}));
  const RankSummary one = rounds.summary(1);
  EXPECT_EQ(one.rows, 5);
  EXPECT_EQ(one.first_rows, 3);
  EXPECT_EQ(one.experts, 2);
  EXPECT_EQ(one.received, (Row{1, 4}));
  EXPECT_EQ(one.sent, (Row{0, 4}));
  EXPECT_EQ(one.spilled_in, (std::vector<int>{1, 0}));
  // With a capacity of 3, two rounds will not do: source 0 has 6 rows to send, but 4 of them in round 0.
  EXPECT_EQ(RoundPlan(counts, plan, 3, 1).rounds(), 3);
}

TEST(Rounds, ManyTinyFlowsSpreadOverTheRounds) {
  // One row from every source to every expert: 32 rows a rank in four rounds of 8.
  const Counts counts = Counts::uniform(8, Row(32, 1));
  const LeastLoadedPlan plan = least_loaded(counts.loads(), 8);
  EXPECT_EQ(RoundPlan(counts, plan, 8, 1).rounds(), 4);
  check(counts, plan, 8, 1);
}

TEST(Rounds, HotRouterCompletesInBoundedRounds) {
  // Every token of every source goes to expert 0.
  const int ranks = 8;
  Row row(16);
  row[0] = 1000;
  const Counts counts = Counts::uniform(ranks, row);
  const LeastLoadedPlan plain = least_loaded(counts.loads(), ranks, {.lambda = kNeverSpill});
  EXPECT_EQ(RoundPlan(counts, plain, 256, 1).rounds(), 32);  // 8000 rows on one rank
  check(counts, plain, 256, 1);
  const LeastLoadedPlan levelled = least_loaded(counts.loads(), ranks, {.min_rows = 64});
  EXPECT_EQ(RoundPlan(counts, levelled, 256, 1).rounds(), 4);  // 1000 rows a rank
  check(counts, levelled, 256, 1);
}

TEST(Rounds, SlotsMakePasses) {
  // Ranks 0 and 1 own four hot experts each, 2 and 3 nothing: each helper gets several foreign experts.
  const Counts counts =
      Counts::uniform(4, Row{100, 100, 100, 100, 100, 100, 100, 100, 0, 0, 0, 0, 0, 0, 0, 0});
  const LeastLoadedPlan plan = least_loaded(counts.loads(), 4, {.min_rows = 1, .lambda = 1});
  std::vector<int> in(4);
  for (const WeightTransfer& t : plan.transfers) ++in[t.to];
  const int most = *std::ranges::max_element(in);
  ASSERT_GE(most, 2);
  for (int slots = 1; slots <= most; ++slots) {
    EXPECT_EQ(RoundPlan(counts, plan, 64, slots).passes(), ceil_div(most, slots));
    check(counts, plan, 64, slots);
  }
}

TEST(Rounds, NothingRouted) {
  const Counts counts = Counts::uniform(4, Row(8, 0));
  const RoundPlan rounds(counts, least_loaded(counts.loads(), 4), 16, 0);
  EXPECT_EQ(rounds.rounds(), 0);
  EXPECT_EQ(rounds.passes(), 1);
  EXPECT_EQ(rounds.summary(0).rows, 0);
  EXPECT_THROW(rounds.sent(0, 0), InternalError);
}

TEST(Rounds, Errors) {
  const Counts counts = Counts::uniform(4, Row{100, 0, 0, 0});
  const LeastLoadedPlan plan = least_loaded(counts.loads(), 4, {.min_rows = 1});
  EXPECT_THROW(RoundPlan(counts, plan, 3, 1), UserError);
  EXPECT_THROW(RoundPlan(counts, plan, 8, 0), UserError);
  EXPECT_THROW(RoundPlan(Counts::uniform(4, Row{99, 0, 0, 0}), plan, 8, 1), InternalError);
  const Counts huge = Counts::uniform(4, Row{int64_t{1} << 40, 0, 0, 0});
  EXPECT_THROW(RoundPlan(huge, least_loaded(huge.loads(), 4), 8, 1), UserError);
  LeastLoadedPlan torn = plan;
  torn.transfers.clear();
  EXPECT_THROW(RoundPlan(counts, torn, 8, 1), InternalError);
  EXPECT_THROW(Counts(2, 2, Row{1, 2, 3}), InternalError);
  EXPECT_THROW(Counts(1, 2, Row{1, -2}), InternalError);
}

// Forwards to another resource and adds up what was asked for, alignment included.
class Metered final : public std::pmr::memory_resource {
 public:
  explicit Metered(std::pmr::memory_resource* upstream) : upstream_(upstream) {}
  int64_t bytes = 0;

 private:
  void* do_allocate(size_t size, size_t alignment) override {
    bytes += static_cast<int64_t>(size);
    return upstream_->allocate(size, alignment);
  }
  void do_deallocate(void* at, size_t size, size_t alignment) override {
    upstream_->deallocate(at, size, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
  std::pmr::memory_resource* upstream_;
};

// What an executor's plan_routing does, in round_plan_bytes and not a byte more; the share that it used.
double planned_in_bounds(int ranks, int experts, int slots, std::span<const int32_t> values,
                         const LeastLoadedOptions& options, int64_t capacity) {
  const int64_t bytes = round_plan_bytes(ranks, experts, slots);
  const int64_t objects =
      static_cast<int64_t>(sizeof(RoundPlan) + sizeof(std::pmr::monotonic_buffer_resource)) +
      (experts + 1) * static_cast<int64_t>(sizeof(int64_t));
  std::vector<std::byte> memory(static_cast<size_t>(bytes - objects));
  std::pmr::monotonic_buffer_resource buffer(memory.data(), memory.size(), std::pmr::null_memory_resource());
  Metered metered(&buffer);
  Counts counts(ranks, experts, values, &metered);
  const LeastLoadedPlan plan = least_loaded(counts.loads(&metered), ranks, options, &metered);
  std::pmr::memory_resource* const standard =
      std::pmr::set_default_resource(std::pmr::null_memory_resource());
  const RoundPlan rounds(std::move(counts), plan, capacity, slots, &metered);
  std::pmr::set_default_resource(standard);
  return static_cast<double>(metered.bytes + objects) / static_cast<double>(bytes);
}

TEST(Rounds, MemoryOfAnyCountsIsBounded) {
  std::mt19937_64 random(10);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  double fullest = 0;
  for (int trial = 0; trial < 1000; ++trial) {
    const int ranks = static_cast<int>(trial % 10 == 0 ? pick(24, 96) : pick(1, 16));
    const int experts = ranks * static_cast<int>(pick(1, 6)), slots = static_cast<int>(pick(1, 4));
    std::vector<int32_t> values;
    // Some ranks own all that is wanted, or all but one are a little too full: many spills of an expert each.
    const int shape = static_cast<int>(pick(0, 3)), wanted = static_cast<int>(pick(1, experts));
    for (int s = 0; s < ranks; ++s)
      for (int e = 0; e < experts; ++e) {
        int64_t n = pick(0, 50);
        if (shape == 1 && e >= wanted) n = 0;
        if (shape == 2) n = e / (experts / ranks) == ranks - 1 ? 0 : 100 + (e + s) % 2;
        if (shape == 3) n = pick(0, 9) == 0 ? 1000 : pick(0, 1);
        values.push_back(static_cast<int32_t>(n));
      }
    const LeastLoadedOptions options{.alpha = std::array{1.0, 0.9, 0.5, 1.1}[pick(0, 3)],
                                     .min_rows = int64_t{1} << pick(0, 5),
                                     .lambda = 1.0};
    fullest =
        std::max(fullest, planned_in_bounds(ranks, experts, slots, values, options, ranks + pick(0, 400)));
  }
  std::printf(
      "at most %.0f %% of the bound were used; 96 ranks, 384 experts: %.0f KiB with 1 slot, %.0f with 4\n",
      fullest * 100, static_cast<double>(round_plan_bytes(96, 384, 1)) / 1024,
      static_cast<double>(round_plan_bytes(96, 384, 4)) / 1024);
  EXPECT_GT(fullest, 0.5);
  EXPECT_LT(round_plan_bytes(96, 384, 1), 1 << 20);
}

// A real router's counts: what each rank of the executor does a layer.
TEST(Rounds, SpeedOfOneMeasuredLayer) {
  const int ranks = 96, experts = 384;
  std::mt19937_64 random(9);
  const Row row = draw(parse_routing("zipf:0.8"), 1365, 8, experts, 0, 0);
  Row values;
  for (int s = 0; s < ranks; ++s)
    for (const int64_t n : row) values.push_back(static_cast<int64_t>(random() % (2 * n + 1)));
  const auto start = std::chrono::steady_clock::now();
  size_t flows = 0;
  const int repeats = 20;
  for (int i = 0; i < repeats; ++i) {
    const Counts counts(ranks, experts, values);
    const RoundPlan rounds(counts, least_loaded(counts.loads(), ranks, {.min_rows = 256}), 4096, 2);
    for (int round = 0; round < rounds.rounds(); ++round)
      flows += rounds.sent(round, 5).size() + rounds.received(round, 5).size();
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats;
  std::printf("counts to flows of one rank: %.3f ms, %zu flows\n", seconds * 1e3, flows / repeats);
  EXPECT_LT(seconds, 0.5);
}

// A Kimi-K2 step, 128K tokens over 96 ranks: printed, not asserted beyond a generous limit.
TEST(Rounds, Speed) {
  const int ranks = 96, experts = 384, layers = 61, top_k = 8;
  const int64_t tokens = 131072 / ranks;
  for (const char* text : {"balanced", "zipf:0.6", "zipf:1.2", "hot:0.3@4"}) {
    const Routing routing = parse_routing(text);
    using Clock = std::chrono::steady_clock;
    double seconds[4] = {};
    int64_t rows = 0, transfers = 0;
    int total_rounds = 0;
    for (int layer = 0; layer < layers; ++layer) {
      const auto t0 = Clock::now();
      const Row row = draw(routing, tokens, top_k, experts, layer, 0);
      const auto t1 = Clock::now();
      const Counts counts = Counts::uniform(ranks, row);
      const LeastLoadedPlan plan = least_loaded(counts.loads(), ranks, {.min_rows = 256});
      const auto t2 = Clock::now();
      const RoundPlan rounds(counts, plan, 4096, 2);
      const auto t3 = Clock::now();
      for (int r = 0; r < ranks; ++r) rows += rounds.summary(r).rows;
      const auto t4 = Clock::now();
      const Clock::time_point t[] = {t0, t1, t2, t3, t4};
      for (int i = 0; i < 4; ++i) seconds[i] += std::chrono::duration<double>(t[i + 1] - t[i]).count();
      transfers += static_cast<int64_t>(plan.transfers.size());
      total_rounds += rounds.rounds();
    }
    EXPECT_EQ(rows, tokens * top_k * ranks * layers);
    std::printf(
        "%-9s ms for %d layers: draw %.2f, least-loaded %.2f, rounds %.2f, %d summaries a layer %.2f; "
        "%.1f transfers, %.1f rounds a layer\n",
        text, layers, seconds[0] * 1e3, seconds[1] * 1e3, seconds[2] * 1e3, ranks, seconds[3] * 1e3,
        static_cast<double>(transfers) / layers, static_cast<double>(total_rounds) / layers);
    EXPECT_LT(seconds[0] + seconds[1] + seconds[2], 2.0);
  }
}

}  // namespace
}  // namespace mop::plan
