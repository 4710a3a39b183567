// Streaming rounds: routed work moves in rounds of bounded size, so that no routing skew overflows a buffer
// (MoP, arXiv 2607.01844: the property is the paper's, the design ours).
//
// Passes. A rank holds the weights of at most `spill_slots` foreign experts at a time. Pass 0 computes a
// rank's own experts and its first `spill_slots` foreign ones, pass p the next ones.
//
// Rounds. A pass is cut into R rounds that each move a little of everything (striping): cut expert by expert,
// all sources would send to one rank at once. The rows that a destination receives in a pass get consecutive
// positions, by source, then by expert, and position q moves in round q mod R. So each rank receives the same
// number of rows in every round, up to one, and so does every (source, destination) pair. Of a flow, each
// round takes the next rows, so they are contiguous.
//
// Positions of a destination start at (rows of lower destinations) / ranks, which staggers the odd rows of a
// source over the rounds. Flows cut alike, [n i/R, n (i+1)/R) each, would move every flow of a single row in
// the last round: no R might keep the capacity.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory_resource>
#include <span>
#include <vector>

#include "sim/plan/least_loaded.h"

namespace mop::plan {

// C[source][expert]: rows that each rank of a group sends to each expert.
class Counts {
 public:
  // values: (ranks, experts) row-major. Errors: InternalError for a wrong size or a negative count.
  Counts(int ranks, int experts, std::span<const int64_t> values);
  Counts(int ranks, int experts, std::span<const int32_t> values, std::pmr::memory_resource* memory);
  // Every source has the same counts, `row` (experts), as draw() gives them: the simulator's case.
  static Counts uniform(int ranks, std::span<const int64_t> row);

  int ranks() const { return ranks_; }
  int experts() const { return experts_; }
  bool is_uniform() const { return uniform_; }
  int64_t at(int source, int expert) const { return before(source + 1, expert) - before(source, expert); }
  // Rows of `expert` from sources below `source` (0 to ranks inclusive).
  int64_t before(int source, int expert) const {
    return uniform_ ? source * prefix_[static_cast<size_t>(expert)]
                    : prefix_[static_cast<size_t>(expert) * static_cast<size_t>(ranks_ + 1) + source];
  }
  int64_t load(int expert) const { return before(ranks_, expert); }
  // (experts) for least_loaded
  std::pmr::vector<int64_t> loads(std::pmr::memory_resource* memory = std::pmr::get_default_resource()) const;

 private:
  Counts() = default;
  template <class Count>
  void sum(std::span<const Count> values);
  int ranks_ = 0, experts_ = 0;
  bool uniform_ = false;
  std::pmr::vector<int64_t>
      prefix_;  // (experts, ranks + 1) running sums over sources; uniform: (experts) the row
};

// Rows [first, last) of what `source` holds for `expert`, in its local order, go to `destination`.
struct Flow {
  int source = 0, expert = 0, destination = 0;
  int64_t first = 0, last = 0;
  int64_t rows() const { return last - first; }
  bool operator==(const Flow&) const = default;
};

// What one rank does over all rounds. Per-peer vectors are (ranks); rows that stay on the rank count as
// received from and sent to itself.
struct RankSummary {
  int64_t rows = 0;                          // computed in all
  int64_t first_rows = 0;                    // computed in round 0
  int64_t typical_rows = 0;                  // computed a round of pass 0, mean rounded up
  int64_t max_rows = 0;                      // computed in the fullest round
  int experts = 0;                           // distinct experts computed, own and foreign
  std::vector<int64_t> received, sent;       // rows from, to each rank
  std::vector<int> spilled_in, spilled_out;  // experts whose weights come from, go to each rank
};

// In which `rows` of a rank can move. Errors: UserError above 4096.
int64_t fewest_rounds(int64_t rows, int64_t capacity);

class RoundPlan {
 public:
  // plan: least_loaded of counts.loads().
  // capacity: rows that a rank may receive, and may send, in a round, those to itself included; at least the
  // number of ranks, one row a pair.
  // spill_slots: at least 1 when the plan spills.
  // R of each pass is the smallest that keeps the capacity: the first that fits from total / capacity
  // upwards. (After 32 that do not, which takes a capacity of a few rows a pair, R grows in steps of 1/16 up
  // to a bound that always fits.) A pure function of its arguments: all ranks derive the same rounds.
  // Errors: UserError for capacity or spill_slots too small, also where total / capacity of a pass is above
  // 4096; InternalError when plan and counts do not match.
  // Everything that it keeps or needs meanwhile comes from `memory`.
  RoundPlan(Counts counts, const LeastLoadedPlan& plan, int64_t capacity, int spill_slots,
            std::pmr::memory_resource* memory = std::pmr::get_default_resource());

  int passes() const { return static_cast<int>(passes_.size()); }  // at least 1
  int rounds() const { return rounds_; }                           // of all passes; 0 when nothing is routed
  int rounds(int pass) const { return passes_[static_cast<size_t>(pass)].rounds; }
  int first_round(int pass) const { return passes_[static_cast<size_t>(pass)].first_round; }
  int pass_of(int round) const;

  const Counts& counts() const { return counts_; }

  // Weights that have to be in place for `pass`; those of one receiver are in the order of its slots.
  std::span<const WeightTransfer> transfers(int pass) const {
    const Pass& p = passes_[static_cast<size_t>(pass)];
    return std::span(transfers_).subspan(p.first_transfer, p.transfers);
  }
  // What `rank` computes in `pass`: its own experts by id, then foreign ones in the order of its slots. The
  // ranges of one expert follow one another.
  std::span<const Assignment> work(int pass, int rank) const;

  // The flows of one round (0 to rounds() - 1, over all passes); empty ones are left out. Ordered by
  // destination (sent) or by source (received), then as in work() of the destination: the two ends agree on
  // the layout of what passes between them. f(flow); nothing is allocated.
  template <class F>
  void for_each_sent(int round, int source, F&& f) const;
  template <class F>
  void for_each_received(int round, int destination, F&& f) const;
  std::vector<Flow> sent(int round, int source) const;
  std::vector<Flow> received(int round, int destination) const;

  // The flows that `destination` receives in the order in which it computes: as in work(), then by source.
  // f(item, flow, before): work()[item] is computed; `before` rows of what passes between the two in this
  // round come first. scratch: (ranks).
  template <class F>
  void for_each_computed(int round, int destination, std::span<int64_t> scratch, F&& f) const;

  // Rows in a round without enumerating flows; rows_received is what the rank computes.
  int64_t rows_received(int round, int rank) const;
  int64_t rows_between(int round, int source, int destination) const;

  RankSummary summary(int rank) const;  // O(ranks * passes + experts)

 private:
  friend int64_t round_plan_bytes(int ranks, int experts, int spill_slots);
  struct Part {  // what one rank computes in one pass
    int rank = 0;
    size_t first_work = 0, last_work = 0;
  };
  struct Pass {
    int rounds = 0, first_round = 0;
    size_t first_part = 0, parts = 0;
    size_t first_transfer = 0, transfers = 0;
  };
  // Rows of positions [0, x) that move before round i of a pass: those with position mod rounds below i.
  static int64_t moved_before(int64_t x, int64_t rounds, int64_t i) {
    return x / rounds * i + std::min(x % rounds, i);
  }
  // Rows of positions [first, last) that move before round i, in round i.
  static int64_t moved_before(int64_t first, int64_t last, int64_t rounds, int64_t i) {
    return moved_before(last, rounds, i) - moved_before(first, rounds, i);
  }
  static int64_t moved_in(int64_t first, int64_t last, int64_t rounds, int64_t i) {
    return moved_before(first, last, rounds, i + 1) - moved_before(first, last, rounds, i);
  }
  std::span<const Part> parts(const Pass& pass) const {
    return std::span(parts_).subspan(pass.first_part, pass.parts);
  }
  const Part* part(const Pass& pass, int rank) const;  // nullptr: it computes nothing
  // (ranks + 1) position where a source's rows start among those of the part.
  const int64_t* start(const Part& part) const {
    return &start_[static_cast<size_t>(&part - parts_.data()) * static_cast<size_t>(counts_.ranks() + 1)];
  }
  // Rows of an assignment that `source` has, in its local order.
  struct Range {
    int64_t first, last;
  };
  Range share(const Assignment& a, int source) const {
    const int64_t base = counts_.before(source, a.expert);
    return {std::max(a.first, base) - base, std::min(a.last, counts_.before(source + 1, a.expert)) - base};
  }
  template <class F>
  void for_each_of_pair(const Pass& pass, int round, const Part& part, int source, F&& f) const;
  void order_work(const LeastLoadedPlan& plan, int spill_slots, std::pmr::memory_resource* memory);
  void place(const Pass& pass);
  int64_t find_rounds(const Pass& pass, int64_t capacity, std::span<int64_t> sent) const;
  bool fits(const Pass& pass, int64_t rounds, int64_t capacity) const;

  Counts counts_;
  int rounds_ = 0;
  std::pmr::vector<Pass> passes_;
  std::pmr::vector<Part> parts_;  // by pass, then rank; every rank of pass 0, of others those with work
  std::pmr::vector<int64_t> start_;
  std::pmr::vector<Assignment> work_;           // by part
  std::pmr::vector<WeightTransfer> transfers_;  // by pass
};

// Bytes that suffice for everything between the counts of a group and its rounds, whatever the counts:
// Counts, loads, the least-loaded plan, the RoundPlan and its temporaries, from one memory resource that
// never reuses any; the objects themselves; and where each expert starts in one rank's order (experts + 1
// int64_t).
int64_t round_plan_bytes(int ranks, int experts, int spill_slots);

// ---- visitors

template <class F>
void RoundPlan::for_each_of_pair(const Pass& pass, int round, const Part& part, int source, F&& f) const {
  int64_t position = start(part)[source];
  for (size_t i = part.first_work; i < part.last_work; ++i) {
    const Assignment& a = work_[i];
    const auto [first, last] = share(a, source);
    if (first >= last) continue;
    const int64_t end = position + last - first;
    const int64_t from = moved_before(position, end, pass.rounds, round - pass.first_round);
    const int64_t to = moved_before(position, end, pass.rounds, round - pass.first_round + 1);
    if (from < to) f(Flow{source, a.expert, part.rank, first + from, first + to});
    position = end;
  }
}

template <class F>
void RoundPlan::for_each_sent(int round, int source, F&& f) const {
  const Pass& pass = passes_[static_cast<size_t>(pass_of(round))];
  for (const Part& p : parts(pass)) for_each_of_pair(pass, round, p, source, f);
}

template <class F>
void RoundPlan::for_each_received(int round, int destination, F&& f) const {
  const Pass& pass = passes_[static_cast<size_t>(pass_of(round))];
  if (const Part* p = part(pass, destination))
    for (int s = 0; s < counts_.ranks(); ++s) for_each_of_pair(pass, round, *p, s, f);
}

template <class F>
void RoundPlan::for_each_computed(int round, int destination, std::span<int64_t> scratch, F&& f) const {
  const Pass& pass = passes_[static_cast<size_t>(pass_of(round))];
  const Part* p = part(pass, destination);
  if (p == nullptr) return;
  const int ranks = counts_.ranks();
  const int64_t* starts = start(*p);
  const std::span<int64_t> position = scratch.first(static_cast<size_t>(ranks));
  std::copy(starts, starts + ranks, position.begin());
  const int64_t index = round - pass.first_round;
  for (size_t i = p->first_work; i < p->last_work; ++i) {
    const Assignment& a = work_[i];
    for (int s = 0; s < ranks; ++s) {
      const auto [first, last] = share(a, s);
      if (first >= last) continue;
      const int64_t at = position[s], end = at + last - first;
      const int64_t from = moved_before(at, end, pass.rounds, index);
      const int64_t to = moved_before(at, end, pass.rounds, index + 1);
      if (from < to)
        f(i - p->first_work, Flow{s, a.expert, destination, first + from, first + to},
          moved_in(starts[s], at, pass.rounds, index));
      position[s] = end;
    }
  }
}

}  // namespace mop::plan
