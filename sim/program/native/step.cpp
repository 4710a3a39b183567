// The order of a step.
#include <algorithm>

#include "sim/base/error.h"
#include "sim/program/native/lowering.h"

namespace mop::program {

using model::Role;
using plan::Place;

NativeLowering::NativeLowering(const LoweringInput& input)
    : in_(input),
      c_(input.model),
      plan_(input.plan),
      layout_(input.layout),
      fsdp_(input.plan.family == plan::Family::fsdp2),
      params_(input.model, input.plan, input.layout),
      chunks_(params_.chunks()) {
  const bool wide = input.workload.precision == plan::Precision::fp32;
  n_ = tokens_per_rank(layout_, input.workload);
  t_ = input.workload.sequences * input.workload.context;
  ct_ = wide ? Type::f32 : Type::bf16;
  gt_ = wide || plan_.reduce == plan::Reduce::fp32 ? Type::f32 : Type::bf16;
  wt_ = fsdp_ ? Type::f32 : ct_;
  ht_ = fsdp_ ? Type::f32 : gt_;
  es_ = size_of(ct_);
  gs_ = size_of(gt_);
  save_attention_ = fsdp_ ? plan_.recompute == plan::Recompute::none : plan_.save_attention;
  if (c_.activation == model::Activation::clamped_swiglu)
    swiglu_ = OpKind::clamped_swiglu, swiglu_bwd_ = OpKind::clamped_swiglu_bwd;
}

NativeLowering::Keeps NativeLowering::keeps(int layer) const {
  if (fsdp_) return plan_.recompute == plan::Recompute::none ? Keeps::all : Keeps::nothing;
  return layer >= c_.layers - plan_.kept_layers.value_or(0) ? Keeps::products : Keeps::nothing;
}

void NativeLowering::gemm(Component component, const Operand& a, bool transpose_a, const Operand& b,
                          bool transpose_b, const Operand& c, bool accumulate, Operand bias, uint16_t group) {
  const int64_t m = transpose_a ? a.view.cols : a.view.rows, k = transpose_a ? a.view.rows : a.view.cols;
  const int64_t n = transpose_b ? b.view.rows : b.view.cols;
  ensure((transpose_b ? b.view.cols : b.view.rows) == k && c.view.rows == m && c.view.cols == n,
         "the operands of a product fit");
  Does does;
  does.accumulate = accumulate;
  does.transpose_a = transpose_a;
  does.transpose_b = transpose_b;
  b_.op(local(OpKind::gemm, component, {{m, n, k}}, does, group), {a, b, bias}, {c});
}

void NativeLowering::linear(Component component, const Operand& x, const Operand& w, const Operand& y,
                            Operand bias) {
  gemm(component, x, false, w, true, y, false, bias);
}

void NativeLowering::clear(Component component, const Operand& what) {
  const int64_t bytes = what.view.elements() * size_of(what.view.type);
  b_.op(local(OpKind::clear, component, {{what.view.elements(), 0, bytes}}), {}, {what});
}

void NativeLowering::column_sum(Component component, const Operand& x, const Operand& sum) {
  Does does;
  does.accumulate = again(sum);
  const int64_t bytes = x.view.elements() * size_of(x.view.type);
  b_.op(local(OpKind::column_sum, component, {{x.view.elements(), bytes, gs_ * x.view.cols}}, does), {x},
        {sum});
}

BufferId NativeLowering::block_buffer(int layer) {  // input of a layer: (N, H)
  if (!fsdp_ && plan_.checkpoints == Place::host) return input_ring_[static_cast<size_t>(layer) % 3];
  return transient("block_input", es_ * n_ * c_.hidden, Holds::checkpoints, layer);
}

// Tokens of all micro-batches: the loss divides by the number of targets of the whole step.
void NativeLowering::load_batches() {
  b_.at(Phase::forward, -1);
  clear(Component::other, matrix(sums_, Type::f64, 1, 4));
  const Operand valid = matrix(valid_, Type::f64, 1, 1);
  for (int64_t micro = 0; micro < in_.workload.accumulate; ++micro) {
    const int64_t bytes = kIdBytes * (3 * n_ + t_);
    batch_ = transient("batch", bytes, Holds::other_activations, -1);
    batches_.push_back(batch_);
    OpSpec spec{OpKind::next_batch, Stream::h2d, Component::embedding, {{bytes}}};
    spec.does.a = micro;
    spec.does.accumulate = micro > 0;
    b_.op(spec, std::initializer_list<Operand>{}, {ids(micro), targets(micro), positions(), starts(), valid});
  }
  if (world_ != kNoGroup)
    b_.op(remote(OpKind::all_reduce, Stream::gather, Component::vocabulary, world_, 8), {valid}, {valid});
}

void NativeLowering::forward_layer(int layer) {
  const auto l = static_cast<size_t>(layer);
  const int64_t h = c_.hidden, attention = c_.heads * c_.v_dim();
  const double es = static_cast<double>(es_);
  const bool moe = c_.moe[l];
  const Gathered g = gathered_[l];
  b_.at(Phase::forward, layer);
  Checkpoint& saved = checkpoints_[l];
  saved.input = x_;
  const Latents in = attention_inputs(layer, x_, g);
  if (!fsdp_ && save_attention_ && plan_.checkpoints == Place::host) {
    saved.attention = attention_ring_[l % 2];
    saved.lse = lse_ring_[l % 2];
  } else {
    const Holds holds = save_attention_ ? Holds::checkpoints : Holds::attention_activations;
    saved.attention = transient("attention_saved", es_ * n_ * attention, holds, layer);
    saved.lse = transient("attention_lse", kFp32 * n_ * c_.heads, holds, layer);
  }
  std::vector<HeadChunk> heads = attention_forward(layer, in, g, saved.attention, saved.lse);
  const Operand mid = matrix(transient("block_middle", es_ * n_ * h, Holds::other_activations, layer), ct_,
                             n_, h),
                x = matrix(x_, ct_, n_, h);
  linear(Component::attention, matrix(saved.attention, ct_, n_, attention), weight(g, Role::o, h, attention),
         mid, bias(g, c_.out_bias, Role::o_bias, h));
  const BufferId normed = transient("feed_forward_normed", es_ * n_ * h, Holds::other_activations, layer);
  b_.op(local(OpKind::rms_norm, Component::dense, traffic(n_ * h, 2 * es, 2 * es)),
        {mid, weight(g, Role::feed_forward_norm, 1, h), x}, {matrix(normed, ct_, n_, h), mid});
  const Keeps kept = keeps(layer);
  if (kept != Keeps::nothing) {
    saved.latents = in;
    saved.middle = mid.buffer;
  }
  if (kept == Keeps::all || (kept == Keeps::products && !mla())) saved.heads = std::move(heads);
  if (kept == Keeps::all) saved.normed = normed;

  const BufferId next = block_buffer(layer + 1);
  BufferId y = kNoBuffer;
  if (moe) {
    route(layer, normed, g, saved);
    y = transient("expert_sum", kFp32 * n_ * h, Holds::expert_activations, layer);
    const Operand out = matrix(y, Type::f32, n_, h);
    if (c_.shared_intermediate > 0)
      feed_forward(layer, Component::shared_experts, {Role::shared_gate, Role::shared_down},
                   c_.shared_intermediate, normed, g, out, saved);
    else
      clear(Component::experts, out);
    experts_forward(layer, normed, g, y, saved);
    b_.op(local(OpKind::add, Component::dense, traffic(n_ * h, es + kFp32, es)), {mid, out},
          {matrix(next, ct_, n_, h)});
  } else {
    y = transient("feed_forward_output", es_ * n_ * h, Holds::other_activations, layer);
    const Operand out = matrix(y, ct_, n_, h);
    feed_forward(layer, Component::dense, {Role::dense_gate, Role::dense_down}, c_.dense_intermediate, normed,
                 g, out, saved);
    b_.op(local(OpKind::add, Component::dense, traffic(n_ * h, 2 * es, es)), {mid, out},
          {matrix(next, ct_, n_, h)});
  }
  x_ = next;
  if (!fsdp_ && plan_.checkpoints == Place::host) offload(layer);
}

std::vector<Operand> NativeLowering::checkpoint_parts(const Checkpoint& saved) const {
  std::vector<Operand> parts{matrix(saved.input, ct_, n_, c_.hidden)};
  if (save_attention_) {
    parts.push_back(matrix(saved.attention, ct_, n_, c_.heads * c_.v_dim()));
    parts.push_back(matrix(saved.lse, Type::f32, n_, c_.heads));
  }
  return parts;
}

void NativeLowering::offload(int layer) {
  Checkpoint& saved = checkpoints_[static_cast<size_t>(layer)];
  const std::vector<Operand> parts = checkpoint_parts(saved);
  int64_t bytes = 0;
  for (const Operand& part : parts) bytes += b_.at(part.buffer).bytes;
  saved.host = b_.buffer("offloaded_checkpoint", bytes, Holds::checkpoints, layer, Space::host);
  b_.op({OpKind::copy_d2h, Stream::d2h, Component::other, {{bytes}}}, parts,
        std::array{matrix(saved.host, ct_, 1, bytes / es_)});
}

// Brings a layer's checkpoint back ahead of its backward.
void NativeLowering::fetch(int layer) {
  Checkpoint& saved = checkpoints_[static_cast<size_t>(layer)];
  if (saved.host == kNoBuffer) return;
  b_.at(Phase::backward, layer);
  const int64_t bytes = b_.at(saved.host).bytes;
  const size_t turn = static_cast<size_t>(layer) % 2;
  saved.input = fetched_input_[turn];
  if (save_attention_) saved.attention = fetched_attention_[turn], saved.lse = fetched_lse_[turn];
  b_.op({OpKind::copy_h2d, Stream::h2d, Component::other, {{bytes}}},
        std::array{matrix(saved.host, ct_, 1, bytes / es_)}, checkpoint_parts(saved));
}

// The weights of the last two layers are still in their slots when backward comes to them.
bool NativeLowering::gathers_again(int layer) const {
  return layer >= 0 && layer < c_.layers - 2 && (!fsdp_ || plan_.reshard);
}

void NativeLowering::gather_again(int layer) {
  if (!gathers_again(layer)) return;
  b_.at(Phase::backward, layer);
  gathered_[static_cast<size_t>(layer)] = gather(layer);
}

void NativeLowering::backward_layer(int layer, bool last) {
  const auto l = static_cast<size_t>(layer);
  const int64_t h = c_.hidden, attention = c_.heads * c_.v_dim();
  const double es = static_cast<double>(es_);
  const bool moe = c_.moe[l];
  const Gathered g = gathered_[l];
  Checkpoint& saved = checkpoints_[l];
  const Weights& w = layers_[l];
  const auto rows = [&](BufferId b) { return matrix(b, ct_, n_, h); };

  b_.at(Phase::recompute, layer);
  const Keeps kept = keeps(layer);
  const Latents in =
      kept == Keeps::all
          ? saved.latents
          : attention_inputs(layer, saved.input, g, kept == Keeps::products ? &saved.latents : nullptr);
  if (!save_attention_) {
    saved.attention = transient("attention_again", es_ * n_ * attention, Holds::attention_activations, layer);
    saved.lse = transient("attention_lse_again", kFp32 * n_ * c_.heads, Holds::attention_activations, layer);
    attention_forward(layer, in, g, saved.attention, saved.lse);
  }
  BufferId mid = saved.middle, normed = saved.normed;
  if (kept != Keeps::all)
    normed = transient("feed_forward_normed", es_ * n_ * h, Holds::other_activations, layer);
  Operand input, sum;  // what is kept of the middle has the block's input in it
  if (kept == Keeps::nothing) {
    mid = transient("block_middle", es_ * n_ * h, Holds::other_activations, layer);
    linear(Component::attention, matrix(saved.attention, ct_, n_, attention),
           weight(g, Role::o, h, attention), rows(mid), bias(g, c_.out_bias, Role::o_bias, h));
    input = rows(saved.input), sum = rows(mid);
  }
  if (kept != Keeps::all) {
    const double each = kept == Keeps::nothing ? 2 * es : es;
    b_.op(local(OpKind::rms_norm, Component::dense, traffic(n_ * h, each, each)),
          {rows(mid), weight(g, Role::feed_forward_norm, 1, h), input}, {rows(normed), sum});
  }

  b_.at(Phase::backward, layer);
  const BufferId dw = !fsdp_ && layer + 1 == c_.layers
                          ? last_dense_gradient_
                          : gradient_target("dense_gradient_whole", w.dense, layer);
  const BufferId d_normed =
      transient("feed_forward_normed_gradient", kFp32 * n_ * h, Holds::other_activations, layer);
  const Operand d_rows = matrix(d_normed, Type::f32, n_, h);
  if (moe) {
    const BufferId d_experts = gradient_target("expert_gradient_whole", w.experts, layer);
    const BufferId d_gates =
        transient("gates_gradient", kFp32 * n_ * c_.top_k, Holds::other_activations, layer);
    if (c_.shared_intermediate > 0)
      feed_forward_backward(layer, Component::shared_experts, {Role::shared_gate, Role::shared_down},
                            c_.shared_intermediate, normed, g, dx_, d_rows, dw, saved);
    else
      clear(Component::experts, d_rows);
    experts_backward(layer, normed, g, saved, dx_, d_normed, d_gates, d_experts);
    settle(w.experts, d_experts, last);
    router_backward(layer, normed, g, saved, d_gates, d_normed, dw);
  } else {
    feed_forward_backward(layer, Component::dense, {Role::dense_gate, Role::dense_down},
                          c_.dense_intermediate, normed, g, dx_, d_rows, dw, saved);
  }
  // The next weights arrive under attention: its kernels lose less to a collective beside them than grouped
  // products, whose tiles are dealt out beforehand to all multiprocessors.
  if (ahead()) gather_again(layer - 1);
  const auto norm_back = [&](Component part, const Operand& dy, BufferId from, Role role, BufferId residual,
                             BufferId to) {
    const Operand d_w = gradient(dw, layer, role, 1, h);
    Does does;
    does.accumulate = again(d_w);
    b_.op(local(OpKind::rms_norm_bwd, part,
                traffic(n_ * h, static_cast<double>(size_of(dy.view.type)) + 2 * es, es), does),
          {dy, rows(from), weight(g, role, 1, h), rows(residual)}, {rows(to), d_w});
  };
  // d(middle) = d(output) + norm backward, into a buffer of its own.
  b_.at(Phase::backward, layer);
  const BufferId d_mid = transient("block_middle_gradient", es_ * n_ * h, Holds::other_activations, layer);
  norm_back(Component::dense, d_rows, mid, Role::feed_forward_norm, dx_, d_mid);
  const BufferId d_attention =
      transient("attention_normed_gradient", es_ * n_ * h, Holds::other_activations, layer);
  attention_backward(layer, saved, in, g, d_mid, d_attention, dw);
  const BufferId d_input = transient("block_input_gradient", es_ * n_ * h, Holds::other_activations, layer);
  norm_back(Component::attention, rows(d_attention), saved.input, Role::attention_norm, d_mid, d_input);
  dx_ = d_input;
  settle(w.dense, dw, last);
  if (last && updates_in_backward()) update(w);
}

// Gradient norm and loss over all ranks; fsdp2 updates here.
void NativeLowering::finish_step() {
  b_.at(Phase::optimizer, -1);
  const Operand sums = matrix(sums_, Type::f64, 1, 4);
  if (world_ != kNoGroup)
    b_.op(remote(OpKind::all_reduce, Stream::gather, Component::optimizer, world_, 32), {sums}, {sums});
  if (plan_.clip)
    b_.op(local(OpKind::clip_factor, Component::optimizer, {{1, kFp32, kFp32}}), {sum(0)},
          {matrix(clip_, Type::f32, 1, 1)});
  if (!fsdp_) return;
  for (const Weights& w : layers_) update(w);
  update(head_);
}

// In the order of their use. The CPU's updates are issued as many ahead of it as their rings hold: who issues
// waits for each layer's routing, and behind eight layers whose states were in HBM the CPU began 90 ms late
// (reports/validation-h200x4.md).
std::vector<const NativeLowering::Weights*> NativeLowering::updated_by_cpu() const {
  std::vector<const Weights*> all;
  if (plan_.optimizer == plan::Optimizer::stream) return all;
  if (embedding_.on_host) all.push_back(&embedding_);
  for (const Weights& w : layers_)
    if (w.on_host) all.push_back(&w);
  if (head_.on_host) all.push_back(&head_);
  return all;
}

StepProgram NativeLowering::run() {
  make_groups();
  make_weights();
  valid_ = b_.persistent("valid_targets", 256, Holds::other_activations);
  if (in_.workload.balance_loss && c_.moe_layers() > 0)
    load_ = b_.persistent("router_load", 2 * kFp32 * c_.experts, Holds::other_activations);
  checkpoints_.resize(static_cast<size_t>(c_.layers));
  gathered_.resize(static_cast<size_t>(c_.layers));
  load_batches();

  const int layers = static_cast<int>(c_.layers);
  if (fsdp_) {
    b_.at(Phase::forward, layers);
    gather_part(head_.dense, root_, "");
  }
  for (int64_t micro = 0; micro < in_.workload.accumulate; ++micro) {
    const bool first = micro == 0, last = micro + 1 == in_.workload.accumulate;
    batch_ = batches_[static_cast<size_t>(micro)];
    checkpoints_.assign(static_cast<size_t>(layers), {});
    if (load_ != kNoBuffer) clear(Component::router, matrix(load_, Type::f32, 1, 2 * c_.experts));
    // The update of the step before: the CPU's as far ahead as its rings hold, the others a layer ahead of
    // the weights' use.
    const bool updating = first && deferred();
    const std::vector<const Weights*> by_cpu = updating ? updated_by_cpu() : std::vector<const Weights*>();
    size_t cpu_done = 0;
    const auto update_by_cpu = [&](size_t more) {
      for (; more > 0 && cpu_done < by_cpu.size(); --more) update(*by_cpu[cpu_done++]);
    };
    const auto update_before = [&](const Weights& w) {
      if (!updating) return;
      if (std::ranges::find(by_cpu, &w) != by_cpu.end()) return update_by_cpu(1);
      update(w);
      if (all_staged()) stage(w);
    };
    const auto prepare = [&](int layer) {
      update_before(layers_[static_cast<size_t>(layer)]);
      b_.at(Phase::forward, layer);
      gathered_[static_cast<size_t>(layer)] = gather(layer);
    };
    update_by_cpu(fresh_ring_.size());
    update_before(embedding_);
    embed_forward(micro);
    if (ahead()) prepare(0);
    for (int l = 0; l < layers; ++l) {
      if (!ahead()) prepare(l);
      if (ahead() && l + 1 < layers) prepare(l + 1);
      if (l + 1 == layers) {
        update_before(head_);
        if (updating && !all_staged()) {
          stage(embedding_);
          for (const Weights& w : layers_) stage(w);
        }
      }
      forward_layer(l);
    }
    if (load_ != kNoBuffer) {
      b_.at(Phase::forward, layers);
      const Operand load = matrix(load_, Type::f32, 1, 2 * c_.experts);
      if (world_ != kNoGroup)
        b_.op(remote(OpKind::all_reduce, Stream::gather, Component::router, world_, 2 * kFp32 * c_.experts),
              {load}, {load});
      Does does;
      does.accumulate = true;
      does.a = c_.moe_layers();
      does.b = n_ * layout_.ranks;
      does.c = in_.workload.accumulate;
      b_.op(local(OpKind::balance_loss, Component::router, {{2 * c_.experts, 2 * kFp32 * c_.experts, 8}},
                  does, world_),
            {load}, {sum(2)});
    }
    vocabulary(micro, last);
    if (ahead()) fetch(layers - 1);
    for (int l = layers - 1; l >= 0; --l) {
      if (!ahead()) gather_again(l);
      if (!ahead()) fetch(l);
      if (ahead() && l > 0) fetch(l - 1);
      backward_layer(l, last);
    }
    embed_backward(micro, last);
  }
  finish_step();
  StepProgram program = b_.finish();
  program.round_rows = round_rows();
  program.spill_slots = plan_.spill_slots;
  program.runnable = true;
  program.shards = std::move(shards_);
  return program;
}

StepProgram lower_native(const LoweringInput& input) {
  return NativeLowering(input).run();
}

}  // namespace mop::program
