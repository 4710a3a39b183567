// Least-loaded expert parallelism: which rank computes which rows of which expert (LLEP, arXiv 2601.17111).
// It moves computation, never changes it: every routed copy is computed once, with the weights of the expert
// that the router chose. `rows` are token copies.
#pragma once
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <span>
#include <vector>

namespace mop::plan {

// As lambda: plain expert parallelism.
inline constexpr double kNeverSpill = std::numeric_limits<double>::infinity();

struct LeastLoadedOptions {
  double alpha = 1.0;       // a rank's cap is floor(alpha * mean rows a rank)
  int64_t min_rows = 1024;  // rows below which a spilled matmul is not worth sending the weights
  double lambda = 1.3;      // gate: plain expert parallelism below this max/mean rank load
};

// Rows [first, last) of `expert` are computed by `rank`. Rows of an expert are ordered by source rank, then
// by the source's local order, so every rank can derive who sends what from the counts alone.
struct Assignment {
  int expert = 0, rank = 0;
  int64_t first = 0, last = 0;
  bool operator==(const Assignment&) const = default;
};

// `to` needs the weights of `expert`, which `from` owns; in backward the weight gradients travel back.
struct WeightTransfer {
  int expert = 0, from = 0, to = 0;
  bool operator==(const WeightTransfer&) const = default;
};

struct LeastLoadedPlan {
  explicit LeastLoadedPlan(std::pmr::memory_resource* memory = std::pmr::get_default_resource())
      : assignments(memory), transfers(memory), rows(memory) {}

  bool spilling = false;  // false: the gate kept plain expert parallelism
  int64_t cap = 0;        // rows a rank; what the plan aims at
  std::pmr::vector<Assignment>
      assignments;  // by falling expert load (ties: lower id), then first; none is empty
  std::pmr::vector<WeightTransfer> transfers;  // in the same order, each (expert, to) once
  std::pmr::vector<int64_t> rows;              // (ranks) rows that each rank computes
};

// The rank that owns `expert`: experts are dealt in blocks of experts / ranks.
inline int owner(int expert, int experts, int ranks) {
  return expert / (experts / ranks);
}

// loads: (experts) rows of each expert from the whole group; ranks: Ep, divides experts.
// Invariants of the result:
//  - the assignments of an expert are disjoint and cover [0, loads[expert]); `rows` adds up as `loads` does;
//  - a rank that computes rows of an expert owns it or has exactly one transfer of it, from its owner;
//  - an excess below min_rows stays with its owner; a helper takes fewer only to finish an expert;
//  - a rank exceeds cap only by such excesses, or when forced: where no helper has room for min_rows or for
//    the whole rest, the least loaded one takes all the rest;
//  - one rank, lambda = kNeverSpill, or max/mean rank load < lambda: every expert stays with its owner;
//  - a pure function: all ranks derive the same plan from the same loads.
//  - at most experts + ranks transfers, and experts more assignments: a helper finishes an expert or is
//  filled
//    up to cap, below which it never falls again.
// Temporaries come from `memory` too.
// Cost: O(experts log experts + (experts + ranks) * ranks).
// Errors: UserError for alpha not positive and finite, min_rows < 1, lambda negative or not a number;
// InternalError for ranks that do not divide the experts or a negative load.
LeastLoadedPlan least_loaded(std::span<const int64_t> loads, int ranks,
                             const LeastLoadedOptions& options = {},
                             std::pmr::memory_resource* memory = std::pmr::get_default_resource());

// Bytes that least_loaded takes from `memory` at most, if that never reuses any.
int64_t least_loaded_bytes(int ranks, int experts);

}  // namespace mop::plan
