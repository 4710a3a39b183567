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
#include <cstdint>
#include <span>
#include <vector>

#include "sim/plan/least_loaded.h"

namespace mop::plan {

// C[source][expert]: rows that each rank of a group sends to each expert.
class Counts {
 public:
  // values: (ranks, experts) row-major. Errors: InternalError for a wrong size or a negative count.
  Counts(int ranks, int experts, std::span<const int64_t> values);
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
  std::vector<int64_t> loads() const;  // (experts) for least_loaded

 private:
  Counts() = default;
  int ranks_ = 0, experts_ = 0;
  bool uniform_ = false;
  std::vector<int64_t> prefix_;  // (experts, ranks + 1) running sums over sources; uniform: (experts) the row
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
  // 65536; InternalError when plan and counts do not match.
  RoundPlan(Counts counts, const LeastLoadedPlan& plan, int64_t capacity, int spill_slots);

  int passes() const { return static_cast<int>(passes_.size()); }  // at least 1
  int rounds() const { return rounds_; }                           // of all passes; 0 when nothing is routed
  int rounds(int pass) const { return passes_[static_cast<size_t>(pass)].rounds; }
  int pass_of(int round) const;

  // Weights that have to be in place for `pass`; those of one receiver are in the order of its slots.
  const std::vector<WeightTransfer>& transfers(int pass) const {
    return passes_[static_cast<size_t>(pass)].transfers;
  }
  // What `rank` computes in `pass`: its own experts by id, then foreign ones in the order of its slots.
  std::span<const Assignment> work(int pass, int rank) const;

  // The flows of one round (0 to rounds() - 1, over all passes); empty ones are left out. Ordered by
  // destination (sent) or by source (received), then as in work() of the destination: the two ends agree on
  // the layout of what passes between them.
  std::vector<Flow> sent(int round, int source) const;
  std::vector<Flow> received(int round, int destination) const;

  // Rows in a round without enumerating flows; rows_received is what the rank computes.
  int64_t rows_received(int round, int rank) const;
  int64_t rows_between(int round, int source, int destination) const;

  RankSummary summary(int rank) const;  // O(ranks * passes + experts)

 private:
  struct Pass {
    int rounds = 0, first_round = 0;
    std::vector<Assignment> work;  // by rank
    std::vector<size_t> work_of;   // (ranks + 1) where a rank's part of `work` starts
    std::vector<int64_t> start;    // (destination, ranks + 1) position where a source's rows start
    std::vector<WeightTransfer> transfers;
  };
  void append_flows(const Pass& pass, int index, int source, int destination, std::vector<Flow>& flows) const;
  void place(Pass& pass) const;
  int64_t find_rounds(const Pass& pass, int64_t capacity) const;
  bool fits(const Pass& pass, int64_t rounds, int64_t capacity) const;

  Counts counts_;
  int rounds_ = 0;
  std::vector<Pass> passes_;
};

}  // namespace mop::plan
