// Router and routed experts over Ep x F: streaming rounds of bounded size, least-loaded expert parallelism
// (mop.md 3 and 4; LLEP, arXiv 2601.17111).
#include <algorithm>

#include "sim/base/integer.h"
#include "sim/plan/rounds.h"
#include "sim/program/native/lowering.h"

namespace mop::program {

using model::Role;

namespace {

constexpr int64_t kLine = 16;  // i32 elements of a cache line

}  // namespace

// All that routing leaves is one buffer, since the arena planner's time grows with what lives long: ids and
// gate weights of the routed copies, their order, and the plan of the rounds, which is aligned to a cache
// line.
NativeLowering::Gates NativeLowering::gates(BufferId saved) const {
  return {matrix(saved, Type::i32, n_, c_.top_k), matrix(saved, Type::f32, n_, c_.top_k, n_ * c_.top_k)};
}

int64_t NativeLowering::rounds_offset() const {
  return ceil_div(3 * n_ * c_.top_k, kLine) * kLine;
}

int64_t NativeLowering::rounds_bytes() const {
  return plan::round_plan_bytes(static_cast<int>(layout_.expert.size), static_cast<int>(c_.experts),
                                static_cast<int>(plan_.spill_slots));
}

BufferId NativeLowering::router_logits(int layer, BufferId x, const Gathered& g) {
  const BufferId logits =
      transient("router_logits", kFp32 * n_ * c_.experts, Holds::other_activations, layer);
  linear(Component::router, matrix(x, ct_, n_, c_.hidden), weight(g, Role::router, c_.experts, c_.hidden),
         matrix(logits, Type::f32, n_, c_.experts), bias(g, c_.router_bias, Role::router_bias, c_.experts));
  return logits;
}

// fp32 router: top-k ids and gate weights (N, k), kept for backward.
void NativeLowering::route(int layer, BufferId x, const Gathered& g, Checkpoint& saved) {
  const BufferId logits = router_logits(layer, x, g);
  saved.logits = keeps(layer) == Keeps::all ? logits : kNoBuffer;
  saved.gates = transient("gates", kIdBytes * rounds_offset() + rounds_bytes(), Holds::checkpoints, layer);
  const Gates out = gates(saved.gates);
  Does does;
  Operand load;
  if (load_ != kNoBuffer) {
    load = matrix(load_, Type::f32, 1, 2 * c_.experts);
    does.accumulate = true;
  }
  b_.op(local(OpKind::topk, Component::router,
              traffic(n_ * c_.experts, kFp32,
                      8.0 * static_cast<double>(c_.top_k) / static_cast<double>(c_.experts)),
              does),
        {matrix(logits, Type::f32, n_, c_.experts),
         g.correction == kNoBuffer ? Operand{} : matrix(g.correction, Type::f32, 1, c_.experts)},
        {out.ids, out.weights, load});
}

void NativeLowering::router_backward(int layer, BufferId x, const Gathered& g, const Checkpoint& saved,
                                     BufferId d_gates, BufferId d_x, BufferId dw) {
  const Component part = Component::router;
  b_.at(Phase::recompute, layer);
  const BufferId logits = keeps(layer) == Keeps::all ? saved.logits : router_logits(layer, x, g);
  b_.at(Phase::backward, layer);
  const int64_t h = c_.hidden, e = c_.experts;
  const Operand d_logits =
      matrix(transient("router_logits_gradient", es_ * n_ * e, Holds::other_activations, layer), ct_, n_, e);
  const Gates kept = gates(saved.gates);
  Does does;
  does.a = c_.moe_layers();
  does.b = n_ * layout_.ranks;
  does.c = in_.workload.accumulate;
  b_.op(local(OpKind::topk_bwd, part, traffic(n_ * e, kFp32, static_cast<double>(es_)), does),
        {matrix(d_gates, Type::f32, n_, c_.top_k), kept.ids, kept.weights, matrix(logits, Type::f32, n_, e),
         load_ == kNoBuffer ? Operand{} : matrix(load_, Type::f32, 1, 2 * e)},
        {d_logits});
  const Operand rows = matrix(x, ct_, n_, h), d_w = gradient(dw, layer, Role::router, e, h);
  gemm(part, d_logits, true, rows, false, d_w, again(d_w));
  if (c_.router_bias) column_sum(part, d_logits, gradient(dw, layer, Role::router_bias, 1, e));
  gemm(part, d_logits, false, weight(g, Role::router, e, h), false, matrix(d_x, Type::f32, n_, h), true);
}

// Order of the own routed copies by expert, counts of all ranks of the expert group, the least-loaded plan
// and its rounds: known to every rank alike. Kept for backward, a few MiB a layer at most: the host, which
// has to know the rounds before it can issue their work, then waits for the GPU in forward only.
NativeLowering::RoundsPlan NativeLowering::plan_rounds(int layer, BufferId saved) {
  const Component part = Component::router;
  const int64_t ranks = layout_.expert.size, e = c_.experts, copies = n_ * c_.top_k;
  const Holds holds = Holds::expert_exchange;
  RoundsPlan out;
  out.order = matrix(saved, Type::i32, 1, copies, 2 * copies);
  const Operand own = matrix(transient("own_counts", kIdBytes * e, holds, layer), Type::i32, 1, e);
  b_.op(local(OpKind::sort, part, {{copies, kIdBytes * copies, kIdBytes * (copies + e)}}), {gates(saved).ids},
        {out.order, own});
  Operand counts = own;
  const int64_t bytes = kIdBytes * e * ranks;
  if (expert_ != kNoGroup) {
    counts = matrix(transient("counts", bytes, holds, layer), Type::i32, ranks, e);
    b_.op(remote(OpKind::all_gather, Stream::dispatch, part, expert_, bytes), {own}, {counts});
  }
  const int64_t size = rounds_bytes();
  // What it is made of is the executor's business; it is opaque bytes here.
  out.rounds = matrix(saved, Type::i32, 1, size / kIdBytes, rounds_offset());
  out.op = b_.op(local(OpKind::plan_routing, part, {{e, bytes, size}}, {}, expert_), {counts}, {out.rounds});
  return out;
}

NativeLowering::ExpertWeights NativeLowering::expert_weights(BufferId own, BufferId spilled, Type type,
                                                             Role role, int64_t rows, int64_t cols) const {
  const int64_t each = params_.expert_elements(), first = params_.offset({FlatPart::experts, 0}, role);
  ExpertWeights w;
  w.own = many(matrix(own, type, rows, cols, first), c_.experts / layout_.expert.size, each);
  if (spilled != kNoBuffer)
    w.spilled = many(matrix(spilled, type, rows, cols, first), plan_.spill_slots, each);
  return w;
}

// Slots for the weights of borrowed experts; kNoBuffer when nothing can spill.
BufferId NativeLowering::spill_slots(int layer) {
  if (fsdp_ || !plan_.least_loaded || expert_ == kNoGroup) return kNoBuffer;
  return transient("spilled_weights", es_ * plan_.spill_slots * params_.expert_elements(),
                   Holds::spilled_experts, layer);
}

// In a round that begins a pass: the weights of what the pass borrows.
void NativeLowering::borrow(BufferId slots, const RoundsPlan& plan, const Gathered& g) {
  if (slots == kNoBuffer) return;
  const int64_t each = params_.expert_elements(), bytes = es_ * plan_.spill_slots * each;
  Does does = exchanging(Exchange::spill_weights);
  does.first_round = true;
  b_.op(
      routed(remote(OpKind::all_to_all, Stream::spill, Component::experts, spill_group_, bytes, bytes, does),
             Routed::spill),
      {plan.rounds, many(matrix(g.experts, ct_, 1, each), c_.experts / layout_.expert.size, each)},
      {many(matrix(slots, ct_, 1, each), plan_.spill_slots, each)});
}

int64_t NativeLowering::round_rows() const {
  // Without expert parallelism nothing moves, but the rows are still gathered round by round. fsdp2 has one
  // round unless the load is uneven.
  const int64_t copies = std::max(n_ * c_.top_k, layout_.expert.size);
  return fsdp_ ? copies : std::min(plan_.round_capacity(), copies);
}

// y (N, H) fp32 += routed experts of x (N, H).
void NativeLowering::experts_forward(int layer, BufferId x, const Gathered& g, BufferId y,
                                     Checkpoint& saved) {
  const Component part = Component::experts;
  const RoundsPlan plan = saved.rounds = plan_rounds(layer, saved.gates);
  const BufferId slots = spill_slots(layer);
  const int64_t r = round_rows(), h = c_.hidden, i = c_.expert_intermediate,
                e = c_.experts / layout_.expert.size;
  const double es = static_cast<double>(es_), tokens = tokens_per_row(), sums = kFp32 * tokens;
  const Holds exchange = Holds::expert_exchange, activations = Holds::expert_activations;
  const ExpertWeights gate_up = expert_weights(g.experts, slots, ct_, Role::expert_gate, 2 * i, h),
                      down = expert_weights(g.experts, slots, ct_, Role::expert_down, h, i);
  ExpertWeights gate_up_bias, down_bias;
  if (c_.expert_bias) {
    gate_up_bias = expert_weights(g.experts, slots, ct_, Role::expert_gate_bias, 1, 2 * i);
    down_bias = expert_weights(g.experts, slots, ct_, Role::expert_down_bias, 1, h);
  }
  const auto rows = [&](BufferId b, int64_t cols) { return matrix(b, ct_, r, cols); };
  const auto compute = [&](OpKind kind, Shape shape, Does does = {}) {
    return routed(local(kind, part, shape, does, expert_), Routed::compute);
  };
  if (keeps_experts(layer) != Keeps::nothing)
    saved.experts.hidden = rows(transient("expert_gate_up", es_ * r * 2 * i, activations, layer), 2 * i);
  if (keeps_experts(layer) == Keeps::all)
    saved.experts.act = rows(transient("expert_swiglu", es_ * r * i, activations, layer), i);
  b_.begin_repeat(layer, plan.op);
  borrow(slots, plan, g);
  const Operand arrived = rows(b_.buffer("dispatched", es_ * r * h, exchange, layer), h);
  const Operand sent =
      expert_ == kNoGroup ? arrived : rows(b_.buffer("dispatch_send", es_ * r * h, exchange, layer), h);
  b_.op(routed(local(OpKind::permute, part, traffic(r * h, es * tokens, es), {}, expert_), Routed::source),
        {matrix(x, ct_, n_, h), plan.order, plan.rounds, {}, {}}, {sent, {}, {}});
  if (expert_ != kNoGroup)
    b_.op(routed(remote(OpKind::all_to_all, Stream::dispatch, part, expert_, es_ * r * h, es_ * r * h,
                        exchanging(Exchange::dispatch)),
                 Routed::dispatch),
          {plan.rounds, sent}, {arrived});
  const Operand hidden = keeps_experts(layer) != Keeps::nothing
                             ? saved.experts.hidden
                             : rows(b_.scratch("expert_gate_up", es_ * r * 2 * i, activations, layer), 2 * i),
                act = keeps_experts(layer) == Keeps::all
                          ? saved.experts.act
                          : rows(b_.scratch("expert_swiglu", es_ * r * i, activations, layer), i),
                out = rows(b_.buffer("expert_output", es_ * r * h, exchange, layer), h);
  Does transposed;
  transposed.transpose_b = true;
  b_.op(compute(OpKind::grouped_gemm, {{r, 2 * i, h, e}}, transposed),
        {arrived, plan.rounds, gate_up.own, gate_up.spilled, gate_up_bias.own, gate_up_bias.spilled},
        {hidden});
  b_.op(compute(swiglu_, traffic(r * i, 2 * es, es)), {hidden, plan.rounds}, {act});
  b_.op(compute(OpKind::grouped_gemm, {{r, h, i, e}}, transposed),
        {act, plan.rounds, down.own, down.spilled, down_bias.own, down_bias.spilled}, {out});
  Operand home = out;
  if (expert_ != kNoGroup) {
    home = rows(b_.buffer("combined", es_ * r * h, exchange, layer), h);
    b_.op(routed(remote(OpKind::all_to_all, Stream::combine, part, combine_, es_ * r * h, es_ * r * h,
                        exchanging(Exchange::combine)),
                 Routed::combine),
          {plan.rounds, out}, {home});
  }
  Does add;
  add.accumulate = true;
  b_.op(routed(local(OpKind::unpermute, part, traffic(r * h, es + sums, sums), add, expert_), Routed::source),
        {home, plan.order, plan.rounds, gates(saved.gates).weights}, {matrix(y, Type::f32, n_, h)});
  b_.end_repeat();
}

// d_y (N, H) in, d_x (N, H) fp32 += , gradients of gate weights and of the local experts. The gate's gradient
// is found on the expert's side as a row-wise product of swiglu and its gradient, so that nothing has to be
// combined again: the gate weights travel along.
void NativeLowering::experts_backward(int layer, BufferId x, const Gathered& g, const Checkpoint& saved,
                                      BufferId d_y, BufferId d_x, BufferId d_gates, BufferId dw) {
  const Component part = Component::experts;
  b_.at(Phase::backward, layer);
  const RoundsPlan& plan = saved.rounds;
  const BufferId slots = spill_slots(layer);
  const int64_t each = params_.expert_elements(), own_experts = c_.experts / layout_.expert.size;
  const int64_t r = round_rows(), h = c_.hidden, i = c_.expert_intermediate;
  const double es = static_cast<double>(es_), tokens = tokens_per_row(), sums = kFp32 * tokens;
  const Holds exchange = Holds::expert_exchange, activations = Holds::expert_activations;
  BufferId lent = kNoBuffer, staging = kNoBuffer;  // gradients of borrowed experts; on their way home
  if (slots != kNoBuffer) {
    lent = transient("spilled_gradients", gs_ * plan_.spill_slots * each, Holds::spilled_experts, layer);
    staging = transient("returned_gradients", gs_ * plan_.spill_slots * each, Holds::spilled_experts, layer);
  }
  Does gradient;
  gradient.accumulate = again(matrix(dw, gt_, 1, own_experts * each));
  Does weight_gradient = gradient;
  weight_gradient.transpose_a = true;
  const ExpertWeights gate_up = expert_weights(g.experts, slots, ct_, Role::expert_gate, 2 * i, h),
                      down = expert_weights(g.experts, slots, ct_, Role::expert_down, h, i),
                      d_gate_up = expert_weights(dw, lent, gt_, Role::expert_gate, 2 * i, h),
                      d_down = expert_weights(dw, lent, gt_, Role::expert_down, h, i);
  ExpertWeights gate_up_bias, down_bias, d_gate_up_bias, d_down_bias;
  if (c_.expert_bias) {
    gate_up_bias = expert_weights(g.experts, slots, ct_, Role::expert_gate_bias, 1, 2 * i);
    down_bias = expert_weights(g.experts, slots, ct_, Role::expert_down_bias, 1, h);
    d_gate_up_bias = expert_weights(dw, lent, gt_, Role::expert_gate_bias, 1, 2 * i);
    d_down_bias = expert_weights(dw, lent, gt_, Role::expert_down_bias, 1, h);
  }
  const auto compute = [&](OpKind kind, Shape shape, Does does = {}) {
    return routed(local(kind, part, shape, does, expert_), Routed::compute);
  };
  // Rows of inputs, of output gradients, and the gate weights, in one buffer a round.
  struct Travelling {
    Operand x, d_y, weights;
  };
  const int64_t row_bytes = 2 * es_ * h + kFp32;
  const auto travelling = [&](const char* label) {
    const BufferId b = b_.buffer(label, row_bytes * r, exchange, layer);
    Operand weights = matrix(b, Type::f32, 1, r);
    weights.view.offset = 2 * es_ * r * h;
    return Travelling{matrix(b, ct_, r, h), matrix(b, ct_, r, h, r * h), weights};
  };
  // Rows of input gradients and the gates' gradients.
  struct Returning {
    Operand d_x, d_weights;
  };
  const auto returning = [&](const char* label) {
    const BufferId b = b_.buffer(label, (es_ * h + kFp32) * r, exchange, layer);
    Operand d_weights = matrix(b, Type::f32, 1, r);
    d_weights.view.offset = es_ * r * h;
    return Returning{matrix(b, ct_, r, h), d_weights};
  };
  b_.begin_repeat(layer, plan.op);
  borrow(slots, plan, g);
  const Travelling arrived = travelling("dispatched");
  const Travelling sent = expert_ == kNoGroup ? arrived : travelling("dispatch_send");
  const Gates kept = gates(saved.gates);
  b_.op(
      routed(local(OpKind::permute, part, traffic(2 * r * h, es * tokens, es), {}, expert_), Routed::source),
      {matrix(x, ct_, n_, h), plan.order, plan.rounds, matrix(d_y, ct_, n_, h), kept.weights},
      {sent.x, sent.d_y, sent.weights});
  if (expert_ != kNoGroup)
    b_.op(routed(remote(OpKind::all_to_all, Stream::dispatch, part, expert_, row_bytes * r, row_bytes * r,
                        exchanging(Exchange::dispatch)),
                 Routed::dispatch),
          {plan.rounds, sent.x, sent.d_y, sent.weights}, {arrived.x, arrived.d_y, arrived.weights});
  const auto scratch = [&](const char* label, int64_t cols) {
    return matrix(b_.scratch(label, es_ * r * cols, activations, layer), ct_, r, cols);
  };
  const Operand hidden = keeps_experts(layer) != Keeps::nothing ? saved.experts.hidden
                                                                : scratch("expert_gate_up", 2 * i),
                act = keeps_experts(layer) == Keeps::all ? saved.experts.act : scratch("expert_swiglu", i),
                d_act = scratch("expert_swiglu_gradient", i);
  const Returning out = returning("expert_input_gradient");
  const auto grouped = [&](int64_t n, int64_t k, Does does) {
    return compute(OpKind::grouped_gemm, {{r, n, k, own_experts}}, does);
  };
  b_.at(Phase::recompute, layer);
  if (keeps_experts(layer) == Keeps::nothing) {
    Does transposed;
    transposed.transpose_b = true;
    b_.op(grouped(2 * i, h, transposed),
          {arrived.x, plan.rounds, gate_up.own, gate_up.spilled, gate_up_bias.own, gate_up_bias.spilled},
          {hidden});
  }
  if (keeps_experts(layer) != Keeps::all)
    b_.op(compute(swiglu_, traffic(r * i, 2 * es, es)), {hidden, plan.rounds}, {act});
  b_.at(Phase::backward, layer);
  b_.op(grouped(i, h, {}), {arrived.d_y, plan.rounds, down.own, down.spilled, {}, {}}, {d_act});
  const double of_biases = c_.expert_bias ? es * static_cast<double>(h) / static_cast<double>(i) : 0;  // d_y
  b_.op(compute(swiglu_bwd_, traffic(r * i, 4 * es + of_biases, 3 * es)),
        {hidden, d_act, plan.rounds, arrived.weights, act, arrived.d_y, down_bias.own, down_bias.spilled},
        {hidden, act, out.d_weights});
  b_.op(grouped(h, i, weight_gradient), {arrived.d_y, act, plan.rounds}, {d_down.own, d_down.spilled});
  b_.op(grouped(2 * i, h, weight_gradient), {hidden, arrived.x, plan.rounds},
        {d_gate_up.own, d_gate_up.spilled});
  if (c_.expert_bias) {
    b_.op(compute(OpKind::expert_bias_bwd, traffic(r * h, es, 0), gradient),
          {arrived.d_y, plan.rounds, arrived.weights}, {d_down_bias.own, d_down_bias.spilled});
    b_.op(compute(OpKind::expert_bias_bwd, traffic(r * 2 * i, es, 0), gradient), {hidden, plan.rounds, {}},
          {d_gate_up_bias.own, d_gate_up_bias.spilled});
  }
  b_.op(grouped(h, 2 * i, {}), {hidden, plan.rounds, gate_up.own, gate_up.spilled, {}, {}}, {out.d_x});
  Returning home = out;
  if (expert_ != kNoGroup) {
    home = returning("combined");
    const int64_t bytes = (es_ * h + kFp32) * r;
    b_.op(routed(remote(OpKind::all_to_all, Stream::combine, part, combine_, bytes, bytes,
                        exchanging(Exchange::combine)),
                 Routed::combine),
          {plan.rounds, out.d_x, out.d_weights}, {home.d_x, home.d_weights});
  }
  Does add;
  add.accumulate = true;
  b_.op(routed(local(OpKind::unpermute_bwd, part, traffic(r * h, es + sums, sums), add, expert_),
               Routed::source),
        {home.d_x, plan.order, plan.rounds, home.d_weights},
        {matrix(d_x, Type::f32, n_, h), matrix(d_gates, Type::f32, n_, c_.top_k)});
  if (lent != kNoBuffer) {
    const int64_t bytes = gs_ * plan_.spill_slots * each;
    Does last = exchanging(Exchange::spill_gradients);
    last.last_round = last.accumulate = true;
    b_.op(routed(remote(OpKind::all_to_all, Stream::spill, part, spill_group_, bytes, bytes, last),
                 Routed::spill),
          {plan.rounds, many(matrix(lent, gt_, 1, each), plan_.spill_slots, each)},
          {many(matrix(staging, gt_, 1, each), plan_.spill_slots, each),
           many(matrix(dw, gt_, 1, each), own_experts, each)});
  }
  b_.end_repeat();
}

}  // namespace mop::program
