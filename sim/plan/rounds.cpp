#include "sim/plan/rounds.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "sim/base/error.h"
#include "sim/base/integer.h"

namespace mop::plan {
namespace {

constexpr int64_t kMaxRounds = 1 << 16;  // of a pass: a guard against a capacity that makes no sense

// How many of the positions 0 to x - 1 have position mod R below i: what moves in the rounds before i.
int64_t moved_before(int64_t x, int64_t rounds, int64_t i) {
  return x / rounds * i + std::min(x % rounds, i);
}

// Rows of positions [first, last) that move before round i.
int64_t moved_before(int64_t first, int64_t last, int64_t rounds, int64_t i) {
  return moved_before(last, rounds, i) - moved_before(first, rounds, i);
}

int64_t moved_in(int64_t first, int64_t last, int64_t rounds, int64_t i) {
  return moved_before(first, last, rounds, i + 1) - moved_before(first, last, rounds, i);
}

}  // namespace

// ---- Counts

Counts::Counts(int ranks, int experts, std::span<const int64_t> values) : ranks_(ranks), experts_(experts) {
  ensure(ranks >= 1 && experts >= 1, "there are ranks and experts");
  ensure(values.size() == static_cast<size_t>(ranks) * static_cast<size_t>(experts),
         "counts are (ranks, experts)");
  ensure(std::ranges::all_of(values, [](int64_t count) { return count >= 0; }), "no count is negative");
  prefix_.resize(static_cast<size_t>(experts) * static_cast<size_t>(ranks + 1));
  for (int e = 0; e < experts; ++e) {
    int64_t* sum = &prefix_[static_cast<size_t>(e) * static_cast<size_t>(ranks + 1)];
    for (int s = 0; s < ranks; ++s) sum[s + 1] = sum[s] + values[static_cast<size_t>(s) * experts + e];
  }
}

Counts Counts::uniform(int ranks, std::span<const int64_t> row) {
  ensure(ranks >= 1 && !row.empty(), "there are ranks and experts");
  ensure(std::ranges::all_of(row, [](int64_t count) { return count >= 0; }), "no count is negative");
  Counts counts;
  counts.ranks_ = ranks;
  counts.experts_ = static_cast<int>(row.size());
  counts.uniform_ = true;
  counts.prefix_.assign(row.begin(), row.end());
  return counts;
}

std::vector<int64_t> Counts::loads() const {
  std::vector<int64_t> loads(static_cast<size_t>(experts_));
  for (int e = 0; e < experts_; ++e) loads[e] = load(e);
  return loads;
}

// ---- RoundPlan

RoundPlan::RoundPlan(Counts counts, const LeastLoadedPlan& plan, int64_t capacity, int spill_slots)
    : counts_(std::move(counts)) {
  const int ranks = counts_.ranks(), experts = counts_.experts();
  if (capacity < ranks)
    throw UserError(
        fmt::format("round capacity is {} rows: a group of {} ranks needs at least {}, one a pair", capacity,
                    ranks, ranks));
  if (!plan.transfers.empty() && spill_slots < 1)
    throw UserError(fmt::format("spill slots are {}: least-loaded expert parallelism needs at least 1 a rank",
                                spill_slots));
  ensure(experts % ranks == 0, "the ranks divide the experts");

  // The slot of each foreign expert on its rank, counted over all passes: transfers name each pair once.
  std::vector<int> foreign(static_cast<size_t>(ranks));
  std::vector<std::tuple<int, int, int>> slots;  // expert, rank, slot
  passes_.resize(1);
  for (const WeightTransfer& t : plan.transfers) {
    const int slot = foreign[t.to]++;
    slots.emplace_back(t.expert, t.to, slot);
    passes_.resize(std::max(passes_.size(), static_cast<size_t>(slot / spill_slots) + 1));
    passes_[slot / spill_slots].transfers.push_back(t);
  }
  std::ranges::sort(slots);

  struct Placed {
    int slot;  // -1: own
    Assignment assignment;
  };
  std::vector<Placed> placed;
  placed.reserve(plan.assignments.size());
  std::vector<int64_t> covered(static_cast<size_t>(experts));
  for (const Assignment& a : plan.assignments) {
    int slot = -1;
    if (owner(a.expert, experts, ranks) != a.rank) {
      const auto found = std::ranges::lower_bound(slots, std::tuple(a.expert, a.rank, 0));
      const bool known =
          found != slots.end() && std::get<0>(*found) == a.expert && std::get<1>(*found) == a.rank;
      ensure(known, "a rank has the weights of the experts that it computes");
      slot = std::get<2>(*found);
    }
    placed.push_back({slot, a});
    covered[a.expert] += a.last - a.first;
  }
  for (int e = 0; e < experts; ++e) ensure(covered[e] == counts_.load(e), "the assignments cover the counts");
  std::ranges::sort(placed, [](const Placed& x, const Placed& y) {
    const auto key = [](const Placed& p) {
      return std::tuple(p.assignment.rank, p.slot, p.assignment.expert, p.assignment.first);
    };
    return key(x) < key(y);
  });
  for (Pass& pass : passes_) pass.work_of.assign(static_cast<size_t>(ranks) + 1, 0);
  for (const auto& [slot, a] : placed) {
    Pass& pass = passes_[slot < 0 ? 0 : slot / spill_slots];
    pass.work.push_back(a);
    ++pass.work_of[a.rank + 1];
  }
  for (Pass& pass : passes_) {
    std::partial_sum(pass.work_of.begin(), pass.work_of.end(), pass.work_of.begin());
    place(pass);
    pass.first_round = rounds_;
    pass.rounds = static_cast<int>(find_rounds(pass, capacity));
    rounds_ += pass.rounds;
  }
}

// Fills pass.start: where the rows of each source start among those of each destination.
void RoundPlan::place(Pass& pass) const {
  const int ranks = counts_.ranks();
  pass.start.assign(static_cast<size_t>(ranks) * static_cast<size_t>(ranks + 1), 0);
  int64_t below = 0;  // rows of lower destinations
  for (int d = 0; d < ranks; ++d) {
    int64_t* start = &pass.start[static_cast<size_t>(d) * static_cast<size_t>(ranks + 1)];
    int64_t each =
        0;  // rows that every source sends: whole experts of uniform counts, without a loop over sources
    for (const Assignment& a :
         std::span(pass.work).subspan(pass.work_of[d], pass.work_of[d + 1] - pass.work_of[d])) {
      if (counts_.is_uniform() && a.first == 0 && a.last == counts_.load(a.expert)) {
        each += counts_.at(0, a.expert);
        continue;
      }
      for (int s = 0; s < ranks; ++s) {
        const int64_t first = std::max(a.first, counts_.before(s, a.expert));
        const int64_t last = std::min(a.last, counts_.before(s + 1, a.expert));
        if (last > first) start[s + 1] += last - first;
      }
    }
    start[0] = below / ranks;
    for (int s = 0; s < ranks; ++s) start[s + 1] += start[s] + each;
    below += start[ranks] - start[0];
  }
}

int64_t RoundPlan::find_rounds(const Pass& pass, int64_t capacity) const {
  const int ranks = counts_.ranks();
  std::vector<int64_t> sent(static_cast<size_t>(ranks));
  int64_t most_received = 0, most_pair = 0;
  for (int d = 0; d < ranks; ++d) {
    const int64_t* start = &pass.start[static_cast<size_t>(d) * static_cast<size_t>(ranks + 1)];
    most_received = std::max(most_received, start[ranks] - start[0]);
    for (int s = 0; s < ranks; ++s) {
      sent[s] += start[s + 1] - start[s];
      most_pair = std::max(most_pair, start[s + 1] - start[s]);
    }
  }
  const int64_t most_sent = *std::ranges::max_element(sent);
  const int64_t most = std::max(most_received, most_sent);
  const int64_t least = ceil_div(most, capacity);
  if (least > kMaxRounds)
    throw UserError(
        fmt::format("round capacity is {} rows: {} rows of one rank would take {} rounds, at most {} are "
                    "possible; make the capacity larger",
                    capacity, most, least, kMaxRounds));

  // A round moves at most ceil(n / R) of a pair's n rows, so a source sends at most sent / R + ranks, and one
  // row a pair once R is as large as any n.
  int64_t enough = most_pair;
  if (capacity > ranks) enough = std::min(enough, ceil_div(most_sent, capacity - ranks));
  enough = std::max(enough, least);

  int64_t rounds = least;
  for (int tries = 0; rounds < enough && !fits(pass, rounds, capacity); ++tries)
    rounds += tries < 32 ? 1 : std::max<int64_t>(1, rounds / 16);
  return std::min(rounds, enough);
}

// Whether no source sends more than `capacity` rows in a round. Destinations need no look: their rows have
// consecutive positions, so they receive at most ceil(rows / rounds).
bool RoundPlan::fits(const Pass& pass, int64_t rounds, int64_t capacity) const {
  const int ranks = counts_.ranks();
  std::vector<int64_t> odd(static_cast<size_t>(rounds) +
                           1);  // differences, over rounds, of the rows beyond n / R
  for (int s = 0; s < ranks; ++s) {
    std::ranges::fill(odd, 0);
    int64_t even = 0;
    for (int d = 0; d < ranks; ++d) {
      const int64_t* start = &pass.start[static_cast<size_t>(d) * static_cast<size_t>(ranks + 1) + s];
      const int64_t rows = start[1] - start[0];
      even += rows / rounds;
      const int64_t from = start[0] % rounds, to = from + rows % rounds;
      ++odd[from];
      if (to <= rounds) {
        --odd[to];
      } else {  // wraps around
        --odd[rounds];
        ++odd[0];
        --odd[to - rounds];
      }
    }
    for (int64_t i = 0, more = 0; i < rounds; ++i)
      if (even + (more += odd[i]) > capacity) return false;
  }
  return true;
}

int RoundPlan::pass_of(int round) const {
  ensure(round >= 0 && round < rounds_, "the round exists");
  int pass = 0;
  while (round >= passes_[pass].first_round + passes_[pass].rounds) ++pass;
  return pass;
}

std::span<const Assignment> RoundPlan::work(int pass, int rank) const {
  const Pass& p = passes_[static_cast<size_t>(pass)];
  return std::span(p.work).subspan(p.work_of[rank], p.work_of[rank + 1] - p.work_of[rank]);
}

void RoundPlan::append_flows(const Pass& pass, int index, int source, int destination,
                             std::vector<Flow>& flows) const {
  int64_t position =
      pass.start[static_cast<size_t>(destination) * static_cast<size_t>(counts_.ranks() + 1) + source];
  for (size_t i = pass.work_of[destination]; i < pass.work_of[destination + 1]; ++i) {
    const Assignment& a = pass.work[i];
    const int64_t base = counts_.before(source, a.expert);
    const int64_t first = std::max(a.first, base);
    const int64_t last = std::min(a.last, counts_.before(source + 1, a.expert));
    if (first >= last) continue;
    const int64_t end = position + last - first;
    const int64_t from = moved_before(position, end, pass.rounds, index);
    const int64_t to = moved_before(position, end, pass.rounds, index + 1);
    if (from < to) flows.push_back({source, a.expert, destination, first - base + from, first - base + to});
    position = end;
  }
}

std::vector<Flow> RoundPlan::sent(int round, int source) const {
  const Pass& pass = passes_[pass_of(round)];
  std::vector<Flow> flows;
  for (int d = 0; d < counts_.ranks(); ++d) append_flows(pass, round - pass.first_round, source, d, flows);
  return flows;
}

std::vector<Flow> RoundPlan::received(int round, int destination) const {
  const Pass& pass = passes_[pass_of(round)];
  std::vector<Flow> flows;
  for (int s = 0; s < counts_.ranks(); ++s)
    append_flows(pass, round - pass.first_round, s, destination, flows);
  return flows;
}

int64_t RoundPlan::rows_received(int round, int rank) const {
  const Pass& pass = passes_[pass_of(round)];
  const int64_t* start = &pass.start[static_cast<size_t>(rank) * static_cast<size_t>(counts_.ranks() + 1)];
  return moved_in(start[0], start[counts_.ranks()], pass.rounds, round - pass.first_round);
}

int64_t RoundPlan::rows_between(int round, int source, int destination) const {
  const Pass& pass = passes_[pass_of(round)];
  const int64_t* start =
      &pass.start[static_cast<size_t>(destination) * static_cast<size_t>(counts_.ranks() + 1)];
  return moved_in(start[source], start[source + 1], pass.rounds, round - pass.first_round);
}

RankSummary RoundPlan::summary(int rank) const {
  const size_t ranks = static_cast<size_t>(counts_.ranks());
  RankSummary result;
  result.received.resize(ranks);
  result.sent.resize(ranks);
  result.spilled_in.resize(ranks);
  result.spilled_out.resize(ranks);
  for (const Pass& pass : passes_) {
    const int64_t* start = &pass.start[static_cast<size_t>(rank) * (ranks + 1)];
    const int64_t rows = start[ranks] - start[0];
    for (size_t peer = 0; peer < ranks; ++peer) {
      result.received[peer] += start[peer + 1] - start[peer];
      const int64_t* to = &pass.start[peer * (ranks + 1) + static_cast<size_t>(rank)];
      result.sent[peer] += to[1] - to[0];
    }
    result.rows += rows;
    if (pass.rounds > 0) result.max_rows = std::max(result.max_rows, ceil_div(rows, pass.rounds));
    for (const WeightTransfer& t : pass.transfers) {
      if (t.to == rank) ++result.spilled_in[t.from];
      if (t.from == rank) ++result.spilled_out[t.to];
    }
    int last = -1;  // a rank's experts are grouped, also where two ranges of one were assigned to it
    for (size_t i = pass.work_of[rank]; i < pass.work_of[rank + 1]; ++i)
      if (std::exchange(last, pass.work[i].expert) != pass.work[i].expert) ++result.experts;
  }
  if (rounds_ > 0) {
    result.first_rows = rows_received(0, rank);
    const Pass& pass = passes_[0];
    const int64_t* start = &pass.start[static_cast<size_t>(rank) * (ranks + 1)];
    if (pass.rounds > 0) result.typical_rows = ceil_div(start[ranks] - start[0], pass.rounds);
  }
  return result;
}

}  // namespace mop::plan
