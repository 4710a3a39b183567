// Rows that ranks exchange and compute: none is lost, none is made.
#include "sim/predict/loads.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <numeric>

#include "sim/plan/least_loaded.h"
#include "sim/plan/rounds.h"
#include "tests/predict/support.h"

namespace mop::predict::testing {
namespace {

TEST(Loads, RowsAreConserved) {
  for (const char* routing :
       {"balanced", "zipf:0.6", "zipf:1.5,seed=4", "hot:0.5@3", "hot:0.9@1,independent"})
    for (const std::string& plan :
         {mop_plan(8, 16, 2, 8), mop_plan(16, 16, 1, 8, "round-rows=2048"),
          mop_plan(4, 16, 4, 8, "least-loaded=off"),
          mop_plan(8, 16, 2, 8, "spill-min-rows=64,spill-slots=1,capacity-factor=1.1"),
          std::string("fsdp2:ep=8"), std::string("fsdp2:ep=8,runtime=native"), mop_plan(1, 16, 2, 8)}) {
      SCOPED_TRACE(plan + " " + routing);
      const Scenario s = make("qwen3-30b-a3b", "h200", 2, plan, 8192, 1, 1, routing);
      const plan::Layout layout = plan::layout(s.plan, s.gpus());
      const int64_t sent = program::tokens_per_rank(layout, s.workload) * s.model.top_k;
      for (const int group : {0, 1}) {
        double imbalance = 0;
        const auto loads = expert_loads(s, layout, group, &imbalance);
        EXPECT_GE(imbalance, 1);
        ASSERT_EQ(static_cast<int64_t>(loads.size()), layout.expert.size);
        for (int64_t l = 0; l < s.model.layers; ++l) {
          int64_t computed = 0, in = 0, out = 0;
          for (const auto& rank : loads) {
            const program::ExpertLoad& load = rank[static_cast<size_t>(l)];
            EXPECT_EQ(load.sent, sent);
            EXPECT_GE(load.computed, 0);
            EXPECT_GE(load.rounds, 1);
            EXPECT_EQ(load.rounds, loads[0][static_cast<size_t>(l)].rounds);  // all ranks agree
            int64_t of_rounds = 0, sent_of_rounds = 0;
            for (int64_t round = 0; round < load.rounds; ++round) {
              of_rounds += rows_of_round(load.computed, round, load.rounds);
              sent_of_rounds += rows_of_round(load.sent, round, load.rounds);
              // mop: as many as it says; our fsdp2: as many as the rank sends.
              if (s.plan.native()) {
                ASSERT_LE(rows_of_round(load.computed, round, load.rounds),
                          s.plan.family == plan::Family::mop ? s.plan.round_capacity() : sent);
              }
            }
            EXPECT_EQ(of_rounds, load.computed);
            EXPECT_EQ(sent_of_rounds, load.sent);
            computed += load.computed;
            in += load.spilled_in;
            out += load.spilled_out;
            EXPECT_LE(load.spilled_across, std::max(load.spilled_in, load.spilled_out));
            if (s.plan.native()) {
              EXPECT_LE(load.moved_within, std::max(load.sent, load.computed));
              EXPECT_LE(load.moved_across, std::max(load.sent, load.computed));
              EXPECT_EQ(load.moved_within + load.moved_across > 0, layout.expert.size > 1);
            }
            if (layout.expert.size * layout.expert.stride <= s.used_per_node()) {
              EXPECT_EQ(load.spilled_across, 0) << "the group is on one node";
              EXPECT_EQ(load.moved_across, 0) << "the group is on one node";
            }
          }
          ASSERT_EQ(computed, sent * layout.expert.size) << "layer " << l;
          ASSERT_EQ(in, out);
        }
      }
    }
}

// One rank of each of two nodes: all that is spilled crosses; all of both nodes': some of it.
TEST(Loads, SpilledExpertsCrossWhereTheirRanksDo) {
  for (const std::string& plan : {mop_plan(2, 16, 1, 8, "expert-placement=across,spill-min-rows=64"),
                                  mop_plan(16, 16, 1, 8, "spill-min-rows=64")}) {
    SCOPED_TRACE(plan);
    const Scenario s = make("qwen3-30b-a3b", "h200", 2, plan, 8192, 1, 1, "zipf:1.5");
    const plan::Layout layout = plan::layout(s.plan, s.gpus());
    int64_t spilled = 0, across = 0;
    for (const auto& rank : expert_loads(s, layout, static_cast<int>(1 % (s.gpus() / layout.expert.size))))
      for (const auto& load : rank) {
        const int64_t most = std::max(load.spilled_in, load.spilled_out);
        if (layout.expert.size == 2) {
          EXPECT_EQ(load.spilled_across, most);
        }
        spilled += most;
        across += load.spilled_across;
      }
    EXPECT_GT(spilled, 0);
    EXPECT_GT(across, 0);
    if (layout.expert.size > 2) {
      EXPECT_LT(across, spilled);
    }
  }
}

TEST(Loads, RowsThatMoveAreThoseOfOtherRanks) {
  for (const char* routing : {"balanced", "zipf:1.1", "hot:0.7@1"})
    for (const int64_t nodes : {1, 2}) {
      SCOPED_TRACE(fmt::format("{} on {} nodes", routing, nodes));
      const Scenario s =
          make("qwen3-30b-a3b", "h200", nodes, mop_plan(8 * nodes, 8 * nodes, 1, 8), 4096, 1, 1, routing);
      const plan::Layout layout = plan::layout(s.plan, s.gpus());
      const auto loads = expert_loads(s, layout, 0);
      const auto ranks = static_cast<int>(layout.expert.size);
      const int64_t tokens = program::tokens_per_rank(layout, s.workload);
      const std::vector<int64_t> row = plan::draw(s.workload.routing, tokens, static_cast<int>(s.model.top_k),
                                                  static_cast<int>(s.model.experts), 0, 0);
      std::vector<int64_t> whole(row);
      for (int64_t& rows : whole) rows *= ranks;
      const plan::RoundPlan rounds(
          plan::Counts::uniform(ranks, row),
          plan::least_loaded(whole, ranks,
                             {s.plan.capacity_factor, s.plan.spill_min_rows, s.plan.spill_gate}),
          s.plan.round_capacity(), static_cast<int>(s.plan.spill_slots));
      // (0: of the node, 1: of other nodes; rank) rows that leave, that arrive
      std::vector<std::vector<int64_t>> out(2, std::vector<int64_t>(static_cast<size_t>(ranks))), in = out;
      for (int round = 0; round < rounds.rounds(); ++round)
        for (int source = 0; source < ranks; ++source)
          for (const plan::Flow& flow : rounds.sent(round, source)) {
            if (source == flow.destination) continue;
            const size_t apart = source / s.used_per_node() == flow.destination / s.used_per_node() ? 0 : 1;
            out[apart][static_cast<size_t>(source)] += flow.rows();
            in[apart][static_cast<size_t>(flow.destination)] += flow.rows();
          }
      for (size_t r = 0; r < loads.size(); ++r) {
        const double rounding = routing == std::string("balanced") ? 64 : 0;  // it says nothing of a row
        EXPECT_NEAR(static_cast<double>(loads[r][0].moved_within),
                    static_cast<double>(std::max(out[0][r], in[0][r])), rounding);
        EXPECT_NEAR(static_cast<double>(loads[r][0].moved_across),
                    static_cast<double>(std::max(out[1][r], in[1][r])), rounding);
      }
    }
}

// Groups of 6 on nodes of 8: some lie on one node, others on two, and those set the pace.
TEST(Loads, AGroupThatStandsForAllLiesWhereTheWorstDoes) {
  for (const char* routing : {"balanced", "zipf:1.0", "zipf:1.0,independent"}) {
    SCOPED_TRACE(routing);
    const Scenario s = make("kimi-k2", "h200", 3, mop_plan(6, 24, 8, 8), 4096, 1, 1, routing);
    const plan::Layout layout = plan::layout(s.plan, s.gpus());
    const bool alone = std::string(routing).ends_with("independent");
    for (const int group : {0, 1}) {
      int64_t across = 0;
      for (const auto& rank : expert_loads(s, layout, group)) across += rank[1].moved_across;
      EXPECT_EQ(across > 0, !alone || group == 1);
    }
  }
}

TEST(Loads, LeastLoadedEvensOut) {
  const auto most = [](const std::string& more) {
    const Scenario s = make("qwen3-30b-a3b", "h200", 2, mop_plan(8, 16, 2, 8, more), 16384, 1, 1, "zipf:1.0");
    const auto loads = expert_loads(s, plan::layout(s.plan, s.gpus()), 0);
    int64_t rows = 0;
    for (const auto& rank : loads)
      for (const auto& load : rank) rows = std::max(rows, load.computed);
    return static_cast<double>(rows) / static_cast<double>(loads[0][0].sent);
  };
  EXPECT_GT(most("least-loaded=off"), 1.5);
  EXPECT_LT(most("least-loaded=on"), 1.3);
}

TEST(Loads, GroupsDifferOnlyWhenAsked) {
  const auto computed = [](const char* routing, int group) {
    const Scenario s = make("qwen3-30b-a3b", "h200", 2, "fsdp2:ep=8", 4096, 1, 1, routing);
    std::vector<int64_t> rows;
    for (const auto& rank : expert_loads(s, plan::layout(s.plan, s.gpus()), group))
      rows.push_back(rank[0].computed);
    return rows;
  };
  EXPECT_EQ(computed("zipf:0.8", 0), computed("zipf:0.8", 1));
  EXPECT_NE(computed("zipf:0.8,independent", 0), computed("zipf:0.8,independent", 1));
  EXPECT_NE(computed("zipf:0.8", 0), computed("zipf:0.8,seed=2", 0));
}

TEST(Rounds, AddUp) {
  for (const int64_t rows : {0, 1, 5, 1000, 16384})
    for (const int64_t rounds : {1, 2, 7, 64}) {
      int64_t sum = 0, least = rows, most = 0;
      for (int64_t r = 0; r < rounds; ++r) {
        const int64_t now = rows_of_round(rows, r, rounds);
        sum += now, least = std::min(least, now), most = std::max(most, now);
      }
      EXPECT_EQ(sum, rows);
      EXPECT_LE(most - least, 1);
    }
}

}  // namespace
}  // namespace mop::predict::testing
