#include "sim/plan/rounds.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <tuple>
#include <utility>

#include "sim/base/error.h"
#include "sim/base/integer.h"

namespace mop::plan {

int64_t fewest_rounds(int64_t rows, int64_t capacity) {
  constexpr int64_t kMost = 4096;  // a guard against a capacity that makes no sense
  const int64_t rounds = ceil_div(rows, capacity);
  if (rounds > kMost)
    throw UserError(
        fmt::format("round capacity is {} rows: {} rows of one rank would take {} rounds, at most {} are "
                    "possible; make the capacity larger (round-rows)",
                    capacity, rows, rounds, kMost));
  return rounds;
}

namespace {

// Slot of a foreign expert on its rank, counted over all passes: transfers name each pair once.
struct Slot {
  int expert, rank, slot;
  auto operator<=>(const Slot&) const = default;
};

struct Placed {
  int slot;  // -1: own
  Assignment assignment;
};

}  // namespace

// ---- Counts

template <class Count>
void Counts::sum(std::span<const Count> values) {
  ensure(ranks_ >= 1 && experts_ >= 1, "there are ranks and experts");
  ensure(values.size() == static_cast<size_t>(ranks_) * static_cast<size_t>(experts_),
         "counts are (ranks, experts)");
  ensure(std::ranges::all_of(values, [](Count count) { return count >= 0; }), "no count is negative");
  prefix_.resize(static_cast<size_t>(experts_) * static_cast<size_t>(ranks_ + 1));
  for (int e = 0; e < experts_; ++e) {
    int64_t* sum = &prefix_[static_cast<size_t>(e) * static_cast<size_t>(ranks_ + 1)];
    for (int s = 0; s < ranks_; ++s) sum[s + 1] = sum[s] + values[static_cast<size_t>(s) * experts_ + e];
  }
}

Counts::Counts(int ranks, int experts, std::span<const int64_t> values) : ranks_(ranks), experts_(experts) {
  sum(values);
}

Counts::Counts(int ranks, int experts, std::span<const int32_t> values, std::pmr::memory_resource* memory)
    : ranks_(ranks), experts_(experts), prefix_(memory) {
  sum(values);
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

std::pmr::vector<int64_t> Counts::loads(std::pmr::memory_resource* memory) const {
  std::pmr::vector<int64_t> loads(static_cast<size_t>(experts_), memory);
  for (int e = 0; e < experts_; ++e) loads[e] = load(e);
  return loads;
}

// ---- RoundPlan

RoundPlan::RoundPlan(Counts counts, const LeastLoadedPlan& plan, int64_t capacity, int spill_slots,
                     std::pmr::memory_resource* memory)
    : counts_(std::move(counts)),
      passes_(memory),
      parts_(memory),
      start_(memory),
      work_(memory),
      transfers_(memory) {
  const int ranks = counts_.ranks(), experts = counts_.experts();
  if (capacity < ranks)
    throw UserError(
        fmt::format("round capacity is {} rows: a group of {} ranks needs at least {}, one a pair", capacity,
                    ranks, ranks));
  if (!plan.transfers.empty() && spill_slots < 1)
    throw UserError(fmt::format("spill slots are {}: least-loaded expert parallelism needs at least 1 a rank",
                                spill_slots));
  ensure(experts % ranks == 0, "the ranks divide the experts");

  order_work(plan, spill_slots, memory);
  start_.resize(parts_.size() * static_cast<size_t>(ranks + 1));
  std::pmr::vector<int64_t> sent(static_cast<size_t>(ranks), memory);
  for (Pass& pass : passes_) {
    place(pass);
    pass.first_round = rounds_;
    pass.rounds = static_cast<int>(find_rounds(pass, capacity, sent));
    rounds_ += pass.rounds;
  }
}

// Fills passes_, parts_, work_ and transfers_.
void RoundPlan::order_work(const LeastLoadedPlan& plan, int spill_slots, std::pmr::memory_resource* memory) {
  const int ranks = counts_.ranks(), experts = counts_.experts();
  std::pmr::vector<int> foreign(static_cast<size_t>(ranks), memory);
  std::pmr::vector<Slot> slots(memory);
  slots.reserve(plan.transfers.size());
  for (const WeightTransfer& t : plan.transfers) slots.push_back({t.expert, t.to, foreign[t.to]++});
  const int most = *std::ranges::max_element(foreign);
  const auto pass_of_slot = [&](int slot) { return static_cast<size_t>(slot < 0 ? 0 : slot / spill_slots); };
  passes_.resize(most == 0 ? 1 : pass_of_slot(most - 1) + 1);

  for (const Slot& slot : slots) ++passes_[pass_of_slot(slot.slot)].transfers;
  for (size_t p = 1; p < passes_.size(); ++p)
    passes_[p].first_transfer = passes_[p - 1].first_transfer + passes_[p - 1].transfers;
  transfers_.resize(plan.transfers.size());
  for (Pass& pass : passes_) pass.transfers = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    Pass& pass = passes_[pass_of_slot(slots[i].slot)];
    transfers_[pass.first_transfer + pass.transfers++] = plan.transfers[i];
  }
  std::ranges::sort(slots);

  std::pmr::vector<Placed> placed(memory);
  placed.reserve(plan.assignments.size());
  std::pmr::vector<int64_t> covered(static_cast<size_t>(experts), memory);
  for (const Assignment& a : plan.assignments) {
    int slot = -1;
    if (owner(a.expert, experts, ranks) != a.rank) {
      const auto found = std::ranges::lower_bound(slots, Slot{a.expert, a.rank, 0});
      const bool known = found != slots.end() && found->expert == a.expert && found->rank == a.rank;
      ensure(known, "a rank has the weights of the experts that it computes");
      slot = found->slot;
    }
    placed.push_back({slot, a});
    covered[a.expert] += a.last - a.first;
  }
  for (int e = 0; e < experts; ++e) ensure(covered[e] == counts_.load(e), "the assignments cover the counts");
  std::ranges::sort(placed, [&](const Placed& x, const Placed& y) {
    const auto key = [&](const Placed& p) {
      return std::tuple(pass_of_slot(p.slot), p.assignment.rank, p.slot, p.assignment.expert,
                        p.assignment.first);
    };
    return key(x) < key(y);
  });

  size_t parts = static_cast<size_t>(ranks);
  for (const int n : foreign)
    if (n > 0) parts += pass_of_slot(n - 1);
  parts_.reserve(parts);
  work_.reserve(placed.size());
  for (int r = 0; r < ranks; ++r) parts_.push_back({r, 0, 0});
  passes_[0].parts = parts_.size();
  for (const auto& [slot, a] : placed) {
    const size_t index = pass_of_slot(slot);
    Pass& pass = passes_[index];
    if (index > 0 && (pass.parts == 0 || parts_.back().rank != a.rank)) {
      if (pass.parts++ == 0) pass.first_part = parts_.size();
      parts_.push_back({a.rank, work_.size(), work_.size()});
    }
    Part& part = index == 0 ? parts_[a.rank] : parts_.back();
    if (part.first_work == part.last_work) part.first_work = work_.size();
    work_.push_back(a);
    part.last_work = work_.size();
  }
}

// Fills start_ of a pass: where the rows of each source start among those of each destination.
void RoundPlan::place(const Pass& pass) {
  const int ranks = counts_.ranks();
  int64_t below = 0;  // rows of lower destinations
  for (size_t p = pass.first_part; p < pass.first_part + pass.parts; ++p) {
    int64_t* start = &start_[p * static_cast<size_t>(ranks + 1)];
    int64_t each =
        0;  // rows that every source sends: whole experts of uniform counts, without a loop over sources
    for (size_t i = parts_[p].first_work; i < parts_[p].last_work; ++i) {
      const Assignment& a = work_[i];
      if (counts_.is_uniform() && a.first == 0 && a.last == counts_.load(a.expert)) {
        each += counts_.at(0, a.expert);
        continue;
      }
      for (int s = 0; s < ranks; ++s) {
        const auto [first, last] = share(a, s);
        if (last > first) start[s + 1] += last - first;
      }
    }
    start[0] = below / ranks;
    for (int s = 0; s < ranks; ++s) start[s + 1] += start[s] + each;
    below += start[ranks] - start[0];
  }
}

int64_t RoundPlan::find_rounds(const Pass& pass, int64_t capacity, std::span<int64_t> sent) const {
  const int ranks = counts_.ranks();
  std::ranges::fill(sent, 0);
  int64_t most_received = 0, most_pair = 0;
  for (const Part& p : parts(pass)) {
    const int64_t* begin = start(p);
    most_received = std::max(most_received, begin[ranks] - begin[0]);
    for (int s = 0; s < ranks; ++s) {
      sent[s] += begin[s + 1] - begin[s];
      most_pair = std::max(most_pair, begin[s + 1] - begin[s]);
    }
  }
  const int64_t most_sent = *std::ranges::max_element(sent);
  const int64_t most = std::max(most_received, most_sent);
  const int64_t least = fewest_rounds(most, capacity);

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
  constexpr int64_t kWindow = 512;   // rounds looked at together: no memory, however many there are
  std::array<int, kWindow + 1> odd;  // differences, over rounds, of the rows beyond n / R
  for (int s = 0; s < counts_.ranks(); ++s) {
    for (int64_t window = 0; window < rounds; window += kWindow) {
      const int64_t size = std::min(kWindow, rounds - window);
      std::fill_n(odd.begin(), size + 1, 0);
      const auto one_more = [&](int64_t from, int64_t to) {
        ++odd[std::clamp<int64_t>(from - window, 0, size)];
        --odd[std::clamp<int64_t>(to - window, 0, size)];
      };
      int64_t even = 0;
      for (const Part& p : parts(pass)) {
        const int64_t* begin = start(p) + s;
        const int64_t rows = begin[1] - begin[0];
        even += rows / rounds;
        const int64_t from = begin[0] % rounds, to = from + rows % rounds;
        one_more(from, std::min(to, rounds));
        if (to > rounds) one_more(0, to - rounds);  // wraps around
      }
      for (int64_t i = 0, more = 0; i < size; ++i)
        if (even + (more += odd[i]) > capacity) return false;
    }
  }
  return true;
}

int RoundPlan::pass_of(int round) const {
  ensure(round >= 0 && round < rounds_, "the round exists");
  int pass = 0;
  while (round >= passes_[pass].first_round + passes_[pass].rounds) ++pass;
  return pass;
}

const RoundPlan::Part* RoundPlan::part(const Pass& pass, int rank) const {
  const std::span<const Part> all = parts(pass);
  const auto found = std::ranges::lower_bound(all, rank, {}, &Part::rank);
  return found != all.end() && found->rank == rank ? &*found : nullptr;
}

std::span<const Assignment> RoundPlan::work(int pass, int rank) const {
  const Part* p = part(passes_[static_cast<size_t>(pass)], rank);
  if (p == nullptr) return {};
  return std::span(work_).subspan(p->first_work, p->last_work - p->first_work);
}

std::vector<Flow> RoundPlan::sent(int round, int source) const {
  std::vector<Flow> flows;
  for_each_sent(round, source, [&](const Flow& flow) { flows.push_back(flow); });
  return flows;
}

std::vector<Flow> RoundPlan::received(int round, int destination) const {
  std::vector<Flow> flows;
  for_each_received(round, destination, [&](const Flow& flow) { flows.push_back(flow); });
  return flows;
}

int64_t RoundPlan::rows_received(int round, int rank) const {
  const Pass& pass = passes_[pass_of(round)];
  const Part* p = part(pass, rank);
  if (p == nullptr) return 0;
  return moved_in(start(*p)[0], start(*p)[counts_.ranks()], pass.rounds, round - pass.first_round);
}

int64_t RoundPlan::rows_between(int round, int source, int destination) const {
  const Pass& pass = passes_[pass_of(round)];
  const Part* p = part(pass, destination);
  if (p == nullptr) return 0;
  return moved_in(start(*p)[source], start(*p)[source + 1], pass.rounds, round - pass.first_round);
}

RankSummary RoundPlan::summary(int rank) const {
  const size_t ranks = static_cast<size_t>(counts_.ranks());
  RankSummary result;
  result.received.resize(ranks);
  result.sent.resize(ranks);
  result.spilled_in.resize(ranks);
  result.spilled_out.resize(ranks);
  for (size_t p = 0; p < passes_.size(); ++p) {
    const Pass& pass = passes_[p];
    for (const Part& to : parts(pass)) {
      const int64_t* begin = start(to) + rank;
      result.sent[to.rank] += begin[1] - begin[0];
    }
    for (const WeightTransfer& t : transfers(static_cast<int>(p))) {
      if (t.to == rank) ++result.spilled_in[t.from];
      if (t.from == rank) ++result.spilled_out[t.to];
    }
    const Part* own = part(pass, rank);
    if (own == nullptr) continue;
    const int64_t* begin = start(*own);
    for (size_t peer = 0; peer < ranks; ++peer) result.received[peer] += begin[peer + 1] - begin[peer];
    const int64_t rows = begin[ranks] - begin[0];
    result.rows += rows;
    if (pass.rounds > 0) {
      result.max_rows = std::max(result.max_rows, ceil_div(rows, pass.rounds));
      if (p == 0) result.typical_rows = ceil_div(rows, pass.rounds);
    }
    int last = -1;  // a rank's experts are grouped, also where two ranges of one were assigned to it
    for (size_t i = own->first_work; i < own->last_work; ++i)
      if (std::exchange(last, work_[i].expert) != work_[i].expert) ++result.experts;
  }
  if (rounds_ > 0) result.first_rows = rows_received(0, rank);
  return result;
}

int64_t round_plan_bytes(int ranks, int experts, int spill_slots) {
  const int64_t slots = std::max(spill_slots, 1);
  const int64_t transfers = experts + ranks, assignments = experts + transfers;  // least_loaded.h
  // Beyond its part of pass 0 a rank with n foreign experts has (n - 1) / slots, rounded down.
  const int64_t parts = ranks + transfers / slots, passes = 1 + experts / slots;
  const int64_t integers = (ranks + 1) * (experts + parts)  // Counts, start_
                           + 3 * experts + 1 + ranks;       // loads, covered, a rank's order; sent
  constexpr int64_t kAllocations = 16, kObjects = 1024;
  static_assert(kObjects >= sizeof(Counts) + sizeof(LeastLoadedPlan) + sizeof(RoundPlan) +
                                sizeof(std::pmr::monotonic_buffer_resource));
  const auto bytes = [](int64_t count, size_t size) { return count * static_cast<int64_t>(size); };
  return least_loaded_bytes(ranks, experts) + bytes(integers, sizeof(int64_t)) +
         bytes(ranks, sizeof(int)) +  // foreign
         bytes(transfers, sizeof(Slot) + sizeof(WeightTransfer)) +
         bytes(assignments, sizeof(Placed) + sizeof(Assignment)) + bytes(parts, sizeof(RoundPlan::Part)) +
         bytes(passes, sizeof(RoundPlan::Pass)) + bytes(kAllocations, alignof(std::max_align_t)) + kObjects;
}

}  // namespace mop::plan
