#include "exec/cpu/routing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory_resource>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "exec/cpu/gemm.h"
#include "sim/plan/least_loaded.h"
#include "sim/plan/routing.h"

namespace mop::cpu {
namespace {

// What the bytes of a `rounds` operand hold: a RoundPlan whose memory is the rest of them, so that nothing is
// allocated. It is never destroyed, only overwritten: it owns nothing else.
struct Rounds {
  Rounds(std::span<std::byte> bytes, const Call& call, const Constants& constants)
      : memory(bytes.data(), bytes.size(), std::pmr::null_memory_resource()),
        plan(make(required(call.in, 0), constants, &memory)),
        starts(&memory) {
    const plan::Counts& counts = plan.counts();
    ensure(call.index < counts.ranks(), "this rank is one of those that were counted");
    starts.resize(static_cast<size_t>(counts.experts()) + 1);
    for (int e = 0; e < counts.experts(); ++e) starts[e + 1] = starts[e] + counts.at(call.index, e);
  }

  static plan::RoundPlan make(const Operand& operand, const Constants& constants,
                              std::pmr::memory_resource* memory) {
    const int ranks = static_cast<int>(rows(operand)), experts = static_cast<int>(operand.view.cols);
    plan::Counts counts(ranks, experts, std::span<const int32_t>(integers(operand)), memory);
    const plan::LeastLoadedPlan assigned =
        plan::least_loaded(counts.loads(memory), ranks, constants.least_loaded, memory);
    return {std::move(counts), assigned, constants.round_rows, constants.spill_slots, memory};
  }

  std::pmr::monotonic_buffer_resource memory;
  plan::RoundPlan plan;
  std::pmr::vector<int64_t>
      starts;  // (experts + 1) where the copies of each expert start in this rank's order
};

int64_t bytes(const Operand& operand) {
  return operand.view.elements() * program::size_of(operand.view.type);
}

const Rounds& read(const Operand& rounds) {
  return *std::launder(reinterpret_cast<const Rounds*>(rounds.data));
}

void sort(const Call& call, Workspace& workspace) {
  const auto ids = integers(required(call.in, 0)), order = integers(required(call.out, 0)),
             counts = integers(required(call.out, 1));
  ensure(order.size() == ids.size(), "an order names every copy");
  std::ranges::fill(counts, 0);
  for (const int32_t id : ids) {
    ensure(id >= 0 && id < std::ssize(counts), "a copy is for an expert that exists");
    ++counts[id];
  }
  const Workspace::Scope scope(workspace);
  const auto next = workspace.take<int32_t>(std::ssize(counts));
  for (size_t e = 0, start = 0; e < counts.size(); start += static_cast<size_t>(counts[e++]))
    next[e] = static_cast<int32_t>(start);
  for (size_t copy = 0; copy < ids.size(); ++copy) order[next[ids[copy]]++] = static_cast<int32_t>(copy);
}

void plan_routing(const Call& call, const Constants& constants) {
  const Operand &counts = required(call.in, 0), &out = required(call.out, 0);
  const int64_t ranks = rows(counts);
  if (ranks > kMostExpertRanks)
    throw UserError(fmt::format("an expert group of {} ranks: the CPU backend takes at most {}; lower ep",
                                ranks, kMostExpertRanks));
  ensure(bytes(out) >= plan::round_plan_bytes(static_cast<int>(ranks), static_cast<int>(counts.view.cols),
                                              constants.spill_slots),
         "the rounds have the memory that their plan may take");
  ensure(reinterpret_cast<uintptr_t>(out.data) % alignof(Rounds) == 0, "the rounds are aligned");
  new (out.data)
      Rounds({out.data + sizeof(Rounds), static_cast<size_t>(bytes(out)) - sizeof(Rounds)}, call, constants);
}

// f(row, copy) for each row that this rank sends in the call's round, copy being token x k + choice.
template <class F>
void for_each_sent_copy(const Call& call, const Operand& order_operand, const Operand& rounds, F&& f) {
  const Rounds& r = read(rounds);
  const auto order = integers(order_operand);
  ensure(std::ssize(order) == r.starts.back(), "an order names the copies that were counted");
  if (call.round >= r.plan.rounds()) return;
  int64_t row = 0;
  r.plan.for_each_sent(static_cast<int>(call.round), call.index, [&](const plan::Flow& flow) {
    const int64_t start = r.starts[flow.expert];
    for (int64_t i = flow.first; i < flow.last; ++i) f(row++, order[start + i]);
  });
}

void permute(const Call& call) {
  const Operand &x = required(call.in, 0), &order = required(call.in, 1), &rounds = required(call.in, 2);
  const Operand dy = optional(call.in, 3), weights = optional(call.in, 4);
  const Operand& to_x = required(call.out, 0);
  const Operand to_dy = optional(call.out, 1), to_weights = optional(call.out, 2);
  ensure(!dy == !to_dy && !weights == !to_weights, "what is permuted comes and goes");
  const int64_t k = order.view.elements() / rows(x);
  for_each_sent_copy(call, order, rounds, [&](int64_t to, int64_t copy) {
    convert(row(x, copy / k), row(to_x, to));
    if (dy) convert(row(dy, copy / k), row(to_dy, to));
    if (weights) convert(row(weights, copy / k).part(copy % k, 1), routed_row(to_weights, to));
  });
}

double value(const Run& run) {
  double value = 0;
  convert(run, {reinterpret_cast<std::byte*>(&value), 1, Type::f64});
  return value;
}

// to += factor x from
void add_scaled(const Run& from, float factor, const Run& to) {
  ensure(from.n == to.n, "rows that are added have one width");
  Piece piece;
  for (int64_t col = 0; col < from.n; col += kPiece) {
    const int64_t n = std::min(kPiece, from.n - col);
    load(from.part(col, n), piece.data());
    for (int64_t i = 0; i < n; ++i) piece[static_cast<size_t>(i)] *= factor;
    add(piece.data(), to.part(col, n));
  }
}

void unpermute(const Call& call) {
  const Operand &from = required(call.in, 0), &order = required(call.in, 1), &rounds = required(call.in, 2),
                &weights = required(call.in, 3), &y = required(call.out, 0);
  const int64_t k = weights.view.cols;
  for_each_sent_copy(call, order, rounds, [&](int64_t i, int64_t copy) {
    const double weight = value(row(weights, copy / k).part(copy % k, 1));
    add_scaled(row(from, i), static_cast<float>(weight), row(y, copy / k));
  });
}

void unpermute_bwd(const Call& call) {
  const Operand &from = required(call.in, 0), &order = required(call.in, 1), &rounds = required(call.in, 2),
                &from_weights = required(call.in, 3), &dx = required(call.out, 0),
                &d_weights = required(call.out, 1);
  const int64_t k = d_weights.view.cols;
  for_each_sent_copy(call, order, rounds, [&](int64_t i, int64_t copy) {
    add_scaled(row(from, i), 1, row(dx, copy / k));
    convert(routed_row(from_weights, i), row(d_weights, copy / k).part(copy % k, 1));
  });
}

}  // namespace

const plan::RoundPlan& round_plan(const Operand& rounds) {
  return read(rounds).plan;
}

ExpertRows::ExpertRows(const model::ModelConfig& model) : rows_(static_cast<size_t>(model.layers)) {
  for (size_t l = 0; l < rows_.size(); ++l)
    if (model.moe[l]) rows_[l].resize(static_cast<size_t>(model.experts));
  last_ = rows_;
}

void ExpertRows::add(int layer, const plan::Counts& counts) {
  std::vector<int64_t>& rows = rows_[static_cast<size_t>(layer)];
  for (int e = 0; e < counts.experts(); ++e) rows[static_cast<size_t>(e)] += counts.load(e);
}

double ExpertRows::end_step() {
  double worst = 1;
  for (const std::vector<int64_t>& rows : rows_) worst = std::max(worst, plan::imbalance(rows));
  std::swap(rows_, last_);
  for (std::vector<int64_t>& rows : rows_) std::ranges::fill(rows, 0);
  return worst;
}

namespace {

// Of the rounds of a pass.
bool is_first(const plan::RoundPlan& plan, int round) {
  return round == plan.first_round(plan.pass_of(round));
}
bool is_last(const plan::RoundPlan& plan, int round) {
  const int pass = plan.pass_of(round);
  return round == plan.first_round(pass) + plan.rounds(pass) - 1;
}

}  // namespace

bool acts(const Call& call, const plan::RoundPlan& plan) {
  const program::Does& does = call.op->does;
  if (call.round >= plan.rounds()) return false;
  const auto round = static_cast<int>(call.round);
  return (!does.first_round || is_first(plan, round)) && (!does.last_round || is_last(plan, round));
}

int newly_borrowed(const Call& call, const plan::RoundPlan& plan) {
  const auto round = static_cast<int>(call.round);
  if (call.round >= plan.rounds() || !is_first(plan, round)) return 0;
  return static_cast<int>(
      std::ranges::count(plan.transfers(plan.pass_of(round)), call.index, &plan::WeightTransfer::to));
}

int64_t rows_of_round(const Call& call, const Operand& rounds) {
  const plan::RoundPlan& plan = round_plan(rounds);
  if (call.round >= plan.rounds()) return 0;
  return plan.rows_received(static_cast<int>(call.round), call.index);
}

int64_t routed_bytes(const program::StepProgram& program, const program::Op& op) {
  using program::OpKind;
  switch (op.kind) {
    case OpKind::sort: {
      const program::Use& counts = program.uses[op.uses + op.use_count - 1];
      return Workspace::size<int32_t>(counts.view.elements());
    }
    case OpKind::topk:
    case OpKind::topk_bwd:
    case OpKind::balance_loss:
      return router_bytes(program, op);
    case OpKind::grouped_gemm:
      return multiply_bytes();
    default:
      return 0;
  }
}

void run_routed(const Call& call, const Constants& constants, Workspace& workspace) {
  using program::OpKind;
  switch (call.op->kind) {
    case OpKind::sort:
      return sort(call, workspace);
    case OpKind::plan_routing:
      return plan_routing(call, constants);
    case OpKind::permute:
      return permute(call);
    case OpKind::unpermute:
      return unpermute(call);
    case OpKind::unpermute_bwd:
      return unpermute_bwd(call);
    case OpKind::topk:
      return topk(call, constants, workspace);
    case OpKind::topk_bwd:
      return topk_bwd(call, constants, workspace);
    case OpKind::balance_loss:
      return balance_loss(call, constants, workspace);
    case OpKind::grouped_gemm:
      return grouped_gemm(call, workspace);
    case OpKind::expert_bias_bwd:
      return expert_bias_bwd(call);
    default:
      ensure(false, "an operation is one of the routed ones");
  }
}

}  // namespace mop::cpu
