#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "sim/base/error.h"
#include "sim/plan/least_loaded.h"
#include "sim/plan/routing.h"

namespace mop::plan {
namespace {

using Row = std::vector<int64_t>;
using Rows = std::pmr::vector<int64_t>;
using Assignments = std::pmr::vector<Assignment>;
using Transfers = std::pmr::vector<WeightTransfer>;

// The pseudo-code of LLEP line by line, as slow as it reads, with the paper's rule for a small excess.
struct Reference {
  Assignments assignments;
  Transfers transfers;
  Rows rows;
  std::set<int> excused;  // ranks that may be above cap: a small excess stayed, or a rest was forced on them
};

Reference reference(const Row& load, int ranks, const LeastLoadedOptions& options) {
  const int experts = static_cast<int>(load.size()), per_rank = experts / ranks;
  Reference out;
  Row pending(ranks), assigned(ranks);
  for (int e = 0; e < experts; ++e) pending[e / per_rank] += load[e];
  const double total = static_cast<double>(std::accumulate(load.begin(), load.end(), int64_t{0}));
  const double most = static_cast<double>(*std::max_element(pending.begin(), pending.end()));
  const bool gate = total > 0 && most / (total / ranks) >= options.lambda && ranks > 1;
  const int64_t cap = static_cast<int64_t>(std::floor(options.alpha * total / ranks));

  std::vector<int> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return load[a] != load[b] ? load[a] > load[b] : a < b; });
  const auto assign = [&](int e, int rank, int64_t first, int64_t last) {
    assigned[rank] += last - first;
    if (first == last) return;
    if (!out.assignments.empty()) {
      Assignment& previous = out.assignments.back();
      if (previous.expert == e && previous.rank == rank && previous.last == first) {
        previous.last = last;
        return;
      }
    }
    out.assignments.push_back({e, rank, first, last});
  };
  for (const int e : order) {
    if (load[e] == 0) continue;
    const int g = e / per_rank;
    pending[g] -= load[e];
    const int64_t free = cap - assigned[g] - pending[g];
    if (!gate || free >= load[e]) {
      assign(e, g, 0, load[e]);
      continue;
    }
    const int64_t keep = std::max<int64_t>(free, 0);
    if (load[e] - keep < options.min_rows) {
      assign(e, g, 0, load[e]);
      out.excused.insert(g);
      continue;
    }
    assign(e, g, 0, keep);
    int64_t next = keep, rest = load[e] - keep;
    std::set<int> sent;
    const auto transfer = [&](int o) {
      if (sent.insert(o).second) out.transfers.push_back({e, g, o});
    };
    while (rest > 0) {
      std::vector<int> helpers;
      for (int o = 0; o < ranks; ++o)
        if (o != g) helpers.push_back(o);
      std::stable_sort(helpers.begin(), helpers.end(),
                       [&](int a, int b) { return assigned[a] + pending[a] < assigned[b] + pending[b]; });
      bool took = false;
      for (const int o : helpers) {
        const int64_t c = std::min(rest, cap - assigned[o] - pending[o]);
        if (c <= 0 || (c < options.min_rows && rest > c)) continue;
        assign(e, o, next, next + c);
        transfer(o);
        next += c;
        rest -= c;
        took = true;
        break;
      }
      if (!took) {
        assign(e, helpers[0], next, next + rest);
        transfer(helpers[0]);
        out.excused.insert(helpers[0]);
        rest = 0;
      }
    }
  }
  out.rows.assign(assigned.begin(), assigned.end());
  return out;
}

// A random case: any of flat, skewed and spiky loads.
struct Case {
  int ranks, experts;
  Row loads;
  LeastLoadedOptions options;
};

Case random_case(std::mt19937_64& random) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  Case c;
  c.ranks = static_cast<int>(pick(1, 24));
  c.experts = c.ranks * static_cast<int>(pick(1, 6));
  const int shape = static_cast<int>(pick(0, 3));
  const int64_t scale = int64_t{1} << pick(0, 14);
  for (int e = 0; e < c.experts; ++e) {
    const double u = static_cast<double>(pick(1, 1 << 20)) / (1 << 20);
    if (shape == 0) c.loads.push_back(pick(0, scale));
    if (shape == 1) c.loads.push_back(static_cast<int64_t>(static_cast<double>(scale) * std::pow(u, -0.8)));
    if (shape == 2) c.loads.push_back(pick(0, 9) == 0 ? scale * 10 : pick(0, 3));
    if (shape == 3) c.loads.push_back(pick(0, 1) ? scale : 0);  // many ties
  }
  c.options.alpha = std::array{1.0, 1.0, 1.25, 0.7, 2.0}[pick(0, 4)];
  c.options.min_rows = std::array<int64_t, 4>{1, 7, 128, 1024}[pick(0, 3)];
  c.options.lambda = std::array{0.0, 1.0, 1.3, 2.0}[pick(0, 3)];
  return c;
}

void expect_plain(const LeastLoadedPlan& plan, const Row& loads, int ranks) {
  Rows rows(ranks);
  const int experts = static_cast<int>(loads.size());
  for (int e = 0; e < experts; ++e) rows[owner(e, experts, ranks)] += loads[e];
  EXPECT_FALSE(plan.spilling);
  EXPECT_TRUE(plan.transfers.empty());
  EXPECT_EQ(plan.rows, rows);
  for (const Assignment& a : plan.assignments)
    EXPECT_EQ(a, (Assignment{a.expert, owner(a.expert, experts, ranks), 0, loads[a.expert]}));
}

TEST(LeastLoaded, MatchesThePseudoCodeAndKeepsItsInvariants) {
  std::mt19937_64 random(1);
  int spilling = 0, forced = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const Case c = random_case(random);
    SCOPED_TRACE(trial);
    const LeastLoadedPlan plan = least_loaded(c.loads, c.ranks, c.options);
    const Reference slow = reference(c.loads, c.ranks, c.options);
    ASSERT_EQ(plan.assignments, slow.assignments);
    ASSERT_EQ(plan.transfers, slow.transfers);
    ASSERT_EQ(plan.rows, slow.rows);
    ASSERT_EQ(least_loaded(c.loads, c.ranks, c.options).assignments, plan.assignments);

    // Rows are conserved: the ranges of each expert follow one another from 0 to its load.
    Row next(c.experts);
    Rows rows(c.ranks);
    std::set<std::pair<int, int>> foreign, last_chunk;
    for (const Assignment& a : plan.assignments) {
      ASSERT_EQ(a.first, next[a.expert]);
      ASSERT_LT(a.first, a.last);
      next[a.expert] = a.last;
      rows[a.rank] += a.last - a.first;
      if (owner(a.expert, c.experts, c.ranks) == a.rank) continue;
      foreign.insert({a.expert, a.rank});
      // Fewer than min_rows only to finish the expert.
      ASSERT_TRUE(a.last - a.first >= c.options.min_rows || a.last == c.loads[a.expert]);
    }
    ASSERT_EQ(next, c.loads);
    ASSERT_EQ(rows, plan.rows);
    std::set<std::pair<int, int>> sent;
    for (const WeightTransfer& t : plan.transfers) {
      ASSERT_EQ(t.from, owner(t.expert, c.experts, c.ranks));
      ASSERT_TRUE(sent.insert({t.expert, t.to}).second);
    }
    ASSERT_EQ(sent, foreign);
    for (int r = 0; plan.spilling && r < c.ranks; ++r)
      ASSERT_TRUE(plan.rows[r] <= plan.cap || slow.excused.contains(r)) << r;
    if (!plan.spilling) expect_plain(plan, c.loads, c.ranks);
    spilling += plan.spilling;
    forced += !slow.excused.empty();

    LeastLoadedOptions never = c.options;
    never.lambda = kNeverSpill;
    expect_plain(least_loaded(c.loads, c.ranks, never), c.loads, c.ranks);
  }
  EXPECT_GT(spilling, 500);
  EXPECT_GT(forced, 100);
}

TEST(LeastLoaded, HandMade) {
  // Two ranks, two experts each; cap 50. Rank 0 owns 90 rows: expert 0 keeps 50 - 10 pending, 40 are moved.
  const LeastLoadedPlan plan =
      least_loaded(Row{80, 10, 10, 0}, 2, {.alpha = 1.0, .min_rows = 8, .lambda = 1.3});
  EXPECT_TRUE(plan.spilling);
  EXPECT_EQ(plan.cap, 50);
  EXPECT_EQ(plan.assignments, (Assignments{{0, 0, 0, 40}, {0, 1, 40, 80}, {1, 0, 0, 10}, {2, 1, 0, 10}}));
  EXPECT_EQ(plan.transfers, (Transfers{{0, 0, 1}}));
  EXPECT_EQ(plan.rows, (Rows{50, 50}));
}

TEST(LeastLoaded, GateIsOnMaxOverMeanRankLoad) {
  const Row loads{65, 0, 35, 0};  // rank loads 65, 35: exactly 1.3
  EXPECT_TRUE(least_loaded(loads, 2, {.min_rows = 1, .lambda = 1.3}).spilling);
  expect_plain(least_loaded(loads, 2, {.min_rows = 1, .lambda = 1.31}), loads, 2);
  const Row even_ranks{100, 0, 50, 50};  // one expert is twice the mean, the ranks are equal
  expect_plain(least_loaded(even_ranks, 2, {.min_rows = 1, .lambda = 1.3}), even_ranks, 2);
}

TEST(LeastLoaded, SmallExcessStaysWithItsOwner) {
  // cap 1500; the excess of expert 0 is 1000 rows.
  const Row loads{2500, 500};
  EXPECT_EQ(least_loaded(loads, 2, {.min_rows = 1001}).rows, (Rows{2500, 500}));
  EXPECT_EQ(least_loaded(loads, 2, {.min_rows = 1000}).rows, (Rows{1500, 1500}));
}

TEST(LeastLoaded, ForcedRestGoesToTheLeastLoadedHelper) {
  // alpha 0.5: cap 15. Rank 2 is filled, then nobody has room for 10 rows: rank 1 (10 rows, all pending)
  // takes the other 50. Its own expert then finds no room and goes to rank 0 (15 rows, as rank 2: lower id).
  const LeastLoadedPlan plan = least_loaded(Row{80, 10, 0}, 3, {.alpha = 0.5, .min_rows = 10, .lambda = 1});
  EXPECT_EQ(plan.assignments, (Assignments{{0, 0, 0, 15}, {0, 2, 15, 30}, {0, 1, 30, 80}, {1, 0, 0, 10}}));
  EXPECT_EQ(plan.transfers, (Transfers{{0, 0, 2}, {0, 0, 1}, {1, 1, 0}}));
}

TEST(LeastLoaded, NothingAndOneRank) {
  EXPECT_TRUE(least_loaded(Row{0, 0}, 2).assignments.empty());
  EXPECT_TRUE(least_loaded(Row{0, 0}, 2, {.lambda = kNeverSpill}).assignments.empty());
  expect_plain(least_loaded(Row{5, 9}, 1, {.alpha = 0.1, .min_rows = 1, .lambda = 0}), {5, 9}, 1);
  EXPECT_EQ(least_loaded(Row{5, 9}, 2, {.alpha = 1e300, .min_rows = 1, .lambda = 0}).cap, 14);
}

TEST(LeastLoaded, HotRouterIsLevelled) {
  const int ranks = 8, experts = 128;
  Row loads = draw(parse_routing("hot:0.7@3"), 65536, 4, experts, 0, 0);
  for (int64_t& load : loads) load *= ranks;
  const LeastLoadedPlan plan = least_loaded(loads, ranks);
  EXPECT_GT(imbalance(least_loaded(loads, ranks, {.lambda = kNeverSpill}).rows), 1.9);
  EXPECT_LT(imbalance(plan.rows), 1.001);
}

TEST(LeastLoaded, Errors) {
  const Row loads{1, 2};
  const auto bad = [&](LeastLoadedOptions options) {
    EXPECT_THROW(least_loaded(loads, 2, options), UserError);
  };
  bad({.alpha = 0});
  bad({.alpha = std::nan("")});
  bad({.alpha = INFINITY});
  bad({.min_rows = 0});
  bad({.lambda = -1});
  bad({.lambda = std::nan("")});
  EXPECT_THROW(least_loaded(loads, 3), InternalError);
  EXPECT_THROW(least_loaded(Row{}, 1), InternalError);
  EXPECT_THROW(least_loaded(Row{-1, 2}, 2), InternalError);
}

}  // namespace
}  // namespace mop::plan
