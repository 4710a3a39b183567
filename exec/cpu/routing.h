// Routed work: operations on rows that the router decides on, and how any kernel finds its own among them.
// A call's index is this rank's position in the expert group, its round counts over all passes.
#pragma once
#include <array>
#include <cstdint>

#include "exec/cpu/kernels.h"
#include "exec/cpu/tensor.h"
#include "exec/cpu/workspace.h"
#include "sim/plan/rounds.h"

namespace mop::cpu {

// Runs one of sort, plan_routing, permute, unpermute, unpermute_bwd, topk, topk_bwd, balance_loss,
// grouped_gemm, expert_bias_bwd.
void run_routed(const Call& call, const Constants& constants, Workspace& workspace);

// Bytes of the workspace that one of them takes.
int64_t routed_bytes(const program::StepProgram& program, const program::Op& op);

// What plan_routing leaves in `rounds`.
const plan::RoundPlan& round_plan(const Operand& rounds);

// Rows of each expert that plan_routing counted, by layer (empty for dense ones). A step allocates nothing.
class ExpertRows {
 public:
  explicit ExpertRows(const model::ModelConfig& model);
  void add(int layer, const plan::Counts& counts);
  // Rows of the fullest expert over the mean, the worst layer since the last call; 1: none.
  double end_step();
  const std::vector<std::vector<int64_t>>& of_last_step() const { return last_; }

 private:
  std::vector<std::vector<int64_t>> rows_, last_;
};

// Whether the call has something to do in its round: Does::first_round and last_round act at the ends of a
// pass. A repeat region runs once also when the plan has no rounds: nothing acts then.
bool acts(const Call& call, const plan::RoundPlan& plan);

// Rows that this rank computes in the call's round.
int64_t rows_of_round(const Call& call, const Operand& rounds);

// Ranks of an expert group at most: what a walk over a round keeps on the stack for each of them.
inline constexpr int kMostExpertRanks = 1024;
using PerRank = std::array<int64_t, kMostExpertRanks>;

// f(first, last, own, slot) for each expert of which this rank computes rows [first, last) in the round, in
// order of the rows: own is the expert's index among the rank's own, else -1; slot that of a borrowed one,
// else -1.
template <class F>
void for_each_expert(const Call& call, const Operand& rounds, F&& f) {
  const plan::RoundPlan& plan = round_plan(rounds);
  const int experts = plan.counts().experts(), ranks = plan.counts().ranks(), own_experts = experts / ranks;
  const int round = static_cast<int>(call.round);
  if (round >= plan.rounds()) return;
  const auto work = plan.work(plan.pass_of(round), call.index);
  PerRank scratch;
  size_t seen = 0;             // items of work before this one's end
  int expert = -1, slot = -1;  // of the last of them; slots are numbered by their experts' order
  int64_t first = 0, last = 0;
  const auto flush = [&] {
    if (first == last) return;
    const bool own = plan::owner(expert, experts, ranks) == call.index;
    f(first, last, own ? expert - call.index * own_experts : -1, own ? -1 : slot);
    first = last;
  };
  plan.for_each_computed(round, call.index, scratch, [&](size_t item, const plan::Flow& flow, int64_t) {
    for (; seen <= item; ++seen) {
      if (work[seen].expert == expert) continue;
      flush();
      expert = work[seen].expert;
      if (plan::owner(expert, experts, ranks) != call.index) ++slot;
    }
    last += flow.rows();
  });
  flush();
}

// Experts whose weights this rank borrows in the round's pass, where the round begins one; else 0.
int newly_borrowed(const Call& call, const plan::RoundPlan& plan);

// f(first, last, own, slot, adds) for each expert whose weights' gradient changes in the round (ops.h), as
// for_each_expert gives them; adds: to what is there. Without rows (first = last): it becomes zero.
template <class F>
void for_each_expert_gradient(const Call& call, const Operand& rounds, F&& f) {
  const plan::RoundPlan& plan = round_plan(rounds);
  const bool own_adds = call.round > 0 || call.op->does.accumulate;
  const int own_experts = own_adds ? 0 : plan.counts().experts() / plan.counts().ranks(),
            borrowed = newly_borrowed(call, plan);
  int own_done = 0, slots_done = 0;  // of those that are overwritten
  const auto clear = [&](int own_end, int slot_end) {
    while (own_done < own_end) f(int64_t{0}, int64_t{0}, own_done++, -1, false);
    while (slots_done < slot_end) f(int64_t{0}, int64_t{0}, -1, slots_done++, false);
  };
  for_each_expert(call, rounds, [&](int64_t first, int64_t last, int own, int slot) {
    const bool adds = own >= 0 ? own_adds : borrowed == 0;
    if (!adds) {
      own >= 0 ? clear(own, 0) : clear(own_experts, slot);
      ++(own >= 0 ? own_done : slots_done);
    }
    f(first, last, own, slot, adds);
  });
  clear(own_experts, borrowed);
}

// Row i of an operand with a row for each routed copy; of a (1, R) vector: element i.
inline Run routed_row(const Operand& operand, int64_t i) {
  const bool vector = operand.view.rows == 1 && operand.view.count == 1;
  return vector ? matrix(operand).part(0, i, 1) : row(operand, i);
}

// The kernels behind run_routed.
int64_t router_bytes(const program::StepProgram& program, const program::Op& op);  // of the workspace
void topk(const Call& call, const Constants& constants, Workspace& workspace);
void topk_bwd(const Call& call, const Constants& constants, Workspace& workspace);
void balance_loss(const Call& call, const Constants& constants, Workspace& workspace);
void grouped_gemm(const Call& call, Workspace& workspace);
void expert_bias_bwd(const Call& call);

}  // namespace mop::cpu
