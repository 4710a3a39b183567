#include "sim/predict/loads.h"

#include <algorithm>
#include <numeric>
#include <span>
#include <utility>

#include "sim/base/integer.h"
#include "sim/plan/least_loaded.h"
#include "sim/plan/rounds.h"

namespace mop::predict {

using program::ExpertLoad;

namespace {

// Of what a rank computes in all passes.
std::vector<int64_t> rows_by_expert(const plan::RoundPlan& rounds, int rank) {
  std::vector<int64_t> rows(static_cast<size_t>(rounds.counts().experts()));
  for (int pass = 0; pass < rounds.passes(); ++pass)
    for (const plan::Assignment& work : rounds.work(pass, rank))
      rows[static_cast<size_t>(work.expert)] += work.last - work.first;
  return rows;
}

void spread(ExpertLoad& load, std::span<const int64_t> rows) {
  load.experts = plan::effective_experts(rows);
  load.touched = std::ranges::count_if(rows, [](int64_t n) { return n > 0; });
}

int64_t node_of(const plan::Span& groups, int64_t group, int64_t member, int64_t node) {
  return (groups.first(group) + member * groups.stride) / node;
}

// Members on the node that has fewest of them, and on the one that has most.
std::pair<int64_t, int64_t> members_of_nodes(const plan::Span& groups, int64_t group, int64_t node) {
  std::pair<int64_t, int64_t> result{groups.size, 0};
  for (int64_t first = 0, end = 0; first < groups.size; first = end) {
    while (end < groups.size && node_of(groups, group, end, node) == node_of(groups, group, first, node))
      ++end;
    result = {std::min(result.first, end - first), std::max(result.second, end - first)};
  }
  return result;
}

// The group of those of `ranks` that has fewest members on one of its nodes.
int64_t most_spread(const plan::Span& groups, int64_t ranks, int64_t node) {
  int64_t found = 0, fewest = groups.size + 1;
  for (int64_t group = 0; group < ranks / groups.size; ++group)
    if (const int64_t members = members_of_nodes(groups, group, node).first; members < fewest)
      found = group, fewest = members;
  return found;
}

}  // namespace

std::vector<std::vector<ExpertLoad>> expert_loads(const Scenario& s, const plan::Layout& layout, int group,
                                                  double* imbalance) {
  const int ranks = static_cast<int>(layout.expert.size), experts = static_cast<int>(s.model.experts);
  const int64_t tokens = program::tokens_per_rank(layout, s.workload);
  const bool mop = s.plan.family == plan::Family::mop, streaming = s.plan.native();
  const bool balanced = s.workload.routing.kind == plan::Routing::Kind::balanced;
  const int64_t sent = tokens * s.model.top_k;
  const int64_t all = std::max<int64_t>(sent, ranks),
                capacity = mop ? std::min(s.plan.round_capacity(), all) : all;
  std::vector<std::vector<ExpertLoad>> loads(static_cast<size_t>(ranks),
                                             std::vector<ExpertLoad>(static_cast<size_t>(s.model.layers)));
  if (imbalance != nullptr) *imbalance = 1;

  // A group that stands for all lies where one that spreads over most nodes does: others meet it.
  const bool alone = !balanced && s.workload.routing.independent_groups;
  const int64_t placed = alone ? group : most_spread(layout.expert, layout.ranks, s.used_per_node());
  const auto node = [&](int member) { return node_of(layout.expert, placed, member, s.used_per_node()); };
  const auto [fewest, most] = members_of_nodes(layout.expert, placed, s.used_per_node());

  // Balanced to within a row, or one rank: every rank computes as much as it sends.
  const auto even = [&] {
    ExpertLoad load;
    load.computed = load.sent = sent;
    load.moved_within = sent * (most - 1) / ranks;
    load.moved_across = sent * (ranks - fewest) / ranks;
    load.experts = experts / ranks;
    load.rounds = streaming ? plan::fewest_rounds(sent, capacity) : 1;
    return load;
  };
  int routed_layer = 0;
  for (int64_t l = 0; l < s.model.layers; ++l) {
    if (!s.model.moe[static_cast<size_t>(l)]) continue;
    const int index = routed_layer++;
    std::vector<int64_t> row;
    if (!balanced)
      row = plan::draw(s.workload.routing, tokens, static_cast<int>(s.model.top_k), experts, index, group);
    if (balanced || ranks == 1) {
      ExpertLoad load = even();
      if (!balanced && streaming) spread(load, row);
      for (auto& rank : loads) rank[static_cast<size_t>(l)] = load;
      continue;
    }
    std::vector<int64_t> whole(row);
    for (int64_t& rows : whole) rows *= ranks;
    plan::LeastLoadedOptions options{s.plan.capacity_factor, s.plan.spill_min_rows,
                                     mop && s.plan.least_loaded ? s.plan.spill_gate : plan::kNeverSpill};
    const plan::LeastLoadedPlan assigned = plan::least_loaded(whole, ranks, options);
    if (imbalance != nullptr) {
      std::vector<int64_t> owned(static_cast<size_t>(ranks), 0);
      for (int e = 0; e < experts; ++e)
        owned[static_cast<size_t>(plan::owner(e, experts, ranks))] += whole[static_cast<size_t>(e)];
      *imbalance = std::max(*imbalance, plan::imbalance(owned));
    }
    if (!streaming) {
      for (int r = 0; r < ranks; ++r) {
        ExpertLoad& load = loads[static_cast<size_t>(r)][static_cast<size_t>(l)];
        load.computed = assigned.rows[static_cast<size_t>(r)];
        load.sent = sent;
        load.experts = experts / ranks;
      }
      continue;
    }
    const plan::RoundPlan rounds(plan::Counts::uniform(ranks, row), assigned, capacity,
                                 static_cast<int>(s.plan.spill_slots));
    for (int r = 0; r < ranks; ++r) {
      const plan::RankSummary summary = rounds.summary(r);
      // Of both directions the one with more, among the peers that count.
      const auto larger = [&](const auto& in, const auto& out, auto counts) {
        int64_t sums[2] = {0, 0};
        for (int peer = 0; peer < ranks; ++peer)
          if (counts(peer))
            sums[0] += in[static_cast<size_t>(peer)], sums[1] += out[static_cast<size_t>(peer)];
        return std::max(sums[0], sums[1]);
      };
      const auto within = [&](int peer) { return peer != r && node(peer) == node(r); };
      const auto across = [&](int peer) { return node(peer) != node(r); };
      ExpertLoad& load = loads[static_cast<size_t>(r)][static_cast<size_t>(l)];
      load.rounds = std::max(1, rounds.rounds());
      load.computed = summary.rows;
      load.sent = sent;
      load.moved_within = larger(summary.received, summary.sent, within);
      load.moved_across = larger(summary.received, summary.sent, across);
      spread(load, rows_by_expert(rounds, r));
      load.spilled_in = std::accumulate(summary.spilled_in.begin(), summary.spilled_in.end(), int64_t{0});
      load.spilled_out = std::accumulate(summary.spilled_out.begin(), summary.spilled_out.end(), int64_t{0});
      load.spilled_across = larger(summary.spilled_in, summary.spilled_out, across);
    }
  }
  return loads;
}

}  // namespace mop::predict
