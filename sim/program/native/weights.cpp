// Where parameters, gradients and optimizer states are, and how they move: gathers ahead of use, reduction of
// gradients, updates.
#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/integer.h"
#include "sim/program/native/lowering.h"

namespace mop::program {

using plan::Optimizer;
using plan::Place;

namespace {

constexpr int64_t kStreamBucket = int64_t{1}
                                  << 26;  // parameters in flight of a GPU-streamed update, over its ring
constexpr int64_t kShardUnit = 8;         // elements: shards keep vector alignment

}  // namespace

void NativeLowering::make_groups() {
  const auto group = [&](Axis axis, const plan::Span& span) {
    return span.size > 1 ? b_.group(axis, span.size, span.stride) : kNoGroup;
  };
  dense_group_ = group(Axis::shard, layout_.dense);
  replicas_ = group(Axis::replicate, layout_.dense_replicas);
  expert_ = group(Axis::expert, layout_.expert);
  combine_ = group(Axis::expert, layout_.expert);  // its own communicator: runs beside dispatch
  expert_shards_ = group(Axis::expert_shard, layout_.expert_shard);
  world_ = group(Axis::world, {layout_.ranks, 1});
  sequence_ = group(Axis::context, layout_.sequence);
  if (fsdp_) return;
  spill_group_ = group(Axis::expert, layout_.expert);
  vocabulary_ = group(Axis::vocabulary, layout_.vocabulary);
  vocabulary_replicas_ = group(Axis::vocabulary_replicas, layout_.vocabulary_replicas);
  statistics_ = group(Axis::vocabulary, layout_.vocabulary);
  embedding_group_ = group(Axis::shard, layout_.dense);
}

bool NativeLowering::states_on_host(int layer) const {
  if (fsdp_) return plan_.offloaded();
  if (plan_.optimizer == Optimizer::hbm) return false;
  const bool all = plan_.optimizer != Optimizer::split && plan_.optimizer_hbm_layers == 0;
  return all || layer >= plan_.optimizer_hbm_layers;
}

NativeLowering::Part NativeLowering::make_part(FlatGroup flat, Component component, int64_t parameters,
                                               int64_t used, const plan::Span& shards, uint16_t scatter,
                                               uint16_t replicas, int64_t replica_count, Space weights,
                                               Space gradients) {
  Part p;
  p.flat = flat;
  p.component = component;
  p.shard = ceil_div(ceil_div(parameters, shards.size), kShardUnit) * kShardUnit;
  p.parameters = p.shard * shards.size;
  p.used = used;
  p.scatter = scatter;
  p.replicas = replicas;
  p.replica_count = replica_count;
  const bool experts = flat.part == FlatPart::experts;
  p.weights = b_.persistent(experts ? "expert_weights" : "dense_weights", size_of(wt_) * p.shard,
                            Holds::weights, flat.layer, weights);
  p.gradient = b_.persistent(experts ? "expert_gradient" : "dense_gradient", size_of(ht_) * p.shard,
                             Holds::gradients, flat.layer, gradients);
  return p;
}

void NativeLowering::make_states(Weights& w) {
  w.bucket = w.elements();
  // The CPU has no weights beside the states.
  const bool by_cpu = w.on_host && plan_.optimizer != Optimizer::stream;
  w.master = fsdp_ ? Master::weights : by_cpu || wt_ != Type::bf16 ? Master::states : Master::low;
  // Of those on the host the first ones; the head's come last.
  const int64_t staged = plan_.optimizer_staged_layers, end = plan_.optimizer_hbm_layers + staged;
  const bool streams = w.on_host && !fsdp_ && plan_.optimizer == Optimizer::stream;
  if (streams && staged > 0 && (w.layer < end || all_staged())) {
    w.staged = b_.persistent("staged_states", state_bytes(w.master) * w.bucket, Holds::staging, w.layer);
  } else if (streams) {
    w.buckets = ceil_div(w.elements(), kStreamBucket);
    w.bucket = ceil_div(ceil_div(w.elements(), w.buckets), kShardUnit) * kShardUnit;
  }
  // One a block: what comes up does not wait for another one's way down.
  for (int64_t i = 0; i < w.buckets; ++i)
    w.states.push_back(b_.persistent("optimizer_states", state_bytes(w.master) * w.bucket,
                                     Holds::optimizer_states, w.layer, w.on_host ? Space::host : Space::hbm));
}

void NativeLowering::register_shard(const Weights& w, const Part& part, int64_t first,
                                    const plan::Span& outer, int64_t outer_elements,
                                    const plan::Span& inner) {
  Shard s;
  s.flat = part.flat;
  s.weights = part.weights;
  s.gradient = part.gradient;
  s.states = w.states;
  s.weights_type = wt_;
  s.gradient_type = ht_;
  s.states_first = first;
  s.states_bucket = w.bucket;
  s.master = w.master;
  s.outer = outer;
  s.inner = inner;
  s.outer_elements = outer_elements;
  s.elements = part.shard;
  s.replicas = part.replica_count;
  shards_.push_back(s);
}

void NativeLowering::make_weights() {
  // Gradients wait for the clip factor beside the engine that will read them. With accumulation they add up
  // in HBM.
  const auto spaces = [&](int layer) {
    const bool host = states_on_host(layer), cpu = host && (fsdp_ || plan_.optimizer != Optimizer::stream);
    return std::pair{fsdp_ && host ? Space::host : Space::hbm,
                     cpu && !held_in_hbm() ? Space::host : Space::hbm};
  };
  int64_t most_dense = 0, most_experts = 0;
  for (int l = 0; l < c_.layers; ++l) {
    Weights w;
    w.layer = l;
    w.on_host = states_on_host(l);
    const auto [weights, gradients] = spaces(l);
    const int64_t dense = params_.elements({FlatPart::dense, l});
    w.dense = make_part({FlatPart::dense, l}, Component::dense, dense, dense, layout_.dense, dense_group_,
                        replicas_, layout_.dense_replicas.size, weights, gradients);
    most_dense = std::max(most_dense, w.dense.parameters);
    if (c_.moe[static_cast<size_t>(l)]) {
      const int64_t experts = params_.elements({FlatPart::experts, l}) / layout_.expert.size;
      // fsdp2's replicas hold every expert too.
      w.experts = make_part({FlatPart::experts, l}, Component::experts, experts, experts,
                            layout_.expert_shard, expert_shards_, fsdp_ ? replicas_ : kNoGroup,
                            fsdp_ ? layout_.dense_replicas.size : 1, weights, gradients);
      most_experts = std::max(most_experts, w.experts.parameters);
      if (c_.correction_bias)
        w.correction = b_.persistent("correction_bias", kFp32 * c_.experts, Holds::weights, l);
    }
    make_states(w);
    register_shard(w, w.dense, 0, {}, 0, layout_.dense);
    if (w.experts.exists())
      register_shard(w, w.experts, w.dense.shard, layout_.expert, w.experts.used, layout_.expert_shard);
    if (w.correction != kNoBuffer) {
      Shard s;
      s.flat = {FlatPart::router_bias, l};
      s.weights = w.correction;
      s.weights_type = Type::f32;
      s.elements = c_.experts;
      s.replicas = layout_.ranks;
      shards_.push_back(s);
    }
    layers_.push_back(w);
  }
  const int layers = static_cast<int>(c_.layers);
  const auto end = [&](Weights& w, int layer, FlatPart part, Component component, int64_t parameters,
                       const plan::Span& shards, uint16_t scatter, uint16_t replicas, int64_t replica_count) {
    w.layer = layer;
    w.on_host = states_on_host(layer);
    const auto [weights, gradients] = spaces(layer);
    w.dense = make_part({part, layer}, component, parameters, parameters, shards, scatter, replicas,
                        replica_count, weights, gradients);
    make_states(w);
  };
  if (fsdp_) {
    end(head_, layers, FlatPart::root, Component::weights, params_.elements({FlatPart::root, layers}),
        layout_.dense, dense_group_, replicas_, layout_.dense_replicas.size);
    register_shard(head_, head_.dense, 0, {}, 0, layout_.dense);
    root_ = b_.persistent("gathered_root", es_ * head_.dense.parameters, Holds::gathered_weights, layers);
  } else {
    // The ends' shards are blocks of columns and of rows: what a rank works with, never gathered.
    end(embedding_, -1, FlatPart::embedding, Component::embedding, c_.vocab * params_.embedding_columns(), {},
        kNoGroup, replicas_, layout_.dense_replicas.size);
    register_shard(embedding_, embedding_.dense, 0, {}, 0, layout_.dense);
    shards_.back().elements = c_.vocab * params_.embedding_columns();
    end(head_, layers, FlatPart::head, Component::vocabulary,
        ceil_div(c_.vocab, layout_.vocabulary.size) * c_.hidden, {}, kNoGroup, vocabulary_replicas_,
        layout_.vocabulary_replicas.size);
    register_shard(head_, head_.dense, 0, {}, 0, layout_.vocabulary);
    shards_.back().elements = ceil_div(c_.vocab, layout_.vocabulary.size) * c_.hidden;
  }
  if (!fsdp_ || plan_.reshard) {
    if (dense_group_ != kNoGroup || fsdp_)
      make_ring(dense_slot_, "gathered_dense", es_ * most_dense, Holds::gathered_weights);
    if (most_experts > 0 && (expert_shards_ != kNoGroup || fsdp_))
      make_ring(expert_slot_, "gathered_experts", es_ * most_experts, Holds::gathered_weights);
  }
  int64_t most = std::max(embedding_.elements(), head_.elements()), most_part = most;
  bool any_on_host = false;
  for (const Weights& w : layers_) {
    most = std::max(most, w.elements());
    most_part = std::max({most_part, w.dense.shard, w.experts.shard});
    any_on_host |= w.on_host;
  }
  any_on_host |= head_.on_host;
  if (any_on_host && !fsdp_ && plan_.optimizer == Optimizer::stream) {
    if (!all_staged())
      make_ring(bucket_ring_, "state_bucket", state_bytes(head_.master) * std::min(most, kStreamBucket),
                Holds::staging);
  } else if (any_on_host) {
    if (fsdp_)  // a ring: uploads wait for their turn rather than run ahead with the whole model
      make_ring(uploaded_ring_, "uploaded_shard", kFp32 * most_part, Holds::gathered_weights);
    else
      make_ring(fresh_ring_, "updated_weights", es_ * most, Holds::staging, Space::host);
    if (held_in_hbm())
      make_ring(download_ring_, "gradient_download", size_of(ht_) * most, Holds::staging, Space::host);
    else
      make_ring(reduced_ring_, "reduced_gradient", size_of(ht_) * most_part, Holds::staging);
  }
  if (!fsdp_ && plan_.checkpoints == Place::host) {
    const int64_t input = es_ * n_ * c_.hidden;
    make_ring(input_ring_, "block_input", input, Holds::checkpoints);
    make_ring(fetched_input_, "block_input_fetched", input, Holds::checkpoints);
    if (save_attention_) {
      const int64_t attention = es_ * n_ * c_.heads * c_.v_dim(), lse = kFp32 * n_ * c_.heads;
      make_ring(attention_ring_, "attention_saved", attention, Holds::checkpoints);
      make_ring(lse_ring_, "attention_lse", lse, Holds::checkpoints);
      make_ring(fetched_attention_, "attention_fetched", attention, Holds::checkpoints);
      make_ring(fetched_lse_, "attention_lse_fetched", lse, Holds::checkpoints);
    }
  }
  sums_ = b_.persistent("step_sums", 256, Holds::other_activations);  // squared norm, loss, balance loss
  if (plan_.clip) clip_ = b_.persistent("clip_factor", 256, Holds::other_activations);
}

// Elements [first, first + count) of what is updated together, the dense shard first: of the weights or
// gradients themselves, or of a staging buffer that holds all of it.
std::vector<Operand> NativeLowering::segments(const Weights& w, int64_t first, int64_t count, bool gradients,
                                              BufferId in) const {
  std::vector<Operand> all;
  int64_t start = 0;
  for (const Part* part : {&w.dense, &w.experts}) {
    if (!part->exists()) continue;
    const int64_t from = std::max(first, start), to = std::min(first + count, start + part->shard);
    const Type type = gradients ? ht_ : in == kNoBuffer ? wt_ : ct_;
    if (from < to)
      all.push_back(matrix(in != kNoBuffer ? in
                           : gradients     ? part->gradient
                                           : part->weights,
                           type, 1, to - from, in != kNoBuffer ? from : from - start));
    start += part->shard;
  }
  return all;
}

// Takes the states down that an update has left in HBM, and brings them up for the one that the next step's
// forward begins with: both ways are busy all step, while the clip factor is not known yet. Where forward
// waits for others to come up, behind all of those.
void NativeLowering::stage(const Weights& w) {
  if (w.staged == kNoBuffer) return;
  b_.at(Phase::optimizer, w.layer);
  const int64_t bytes = state_bytes(w.master) * w.bucket;
  const Operand home = states_in(w.states[0], w), staged = states_in(w.staged, w);
  OpSpec down{OpKind::copy_d2h, Stream::d2h, Component::optimizer, {{bytes}}};
  down.does.deferred = deferred();
  b_.op(down, {staged}, {home});
  b_.op({OpKind::copy_h2d, Stream::h2d, Component::optimizer, {{bytes}}}, {home}, {staged});
}

// The update of what w holds: CPU Adam, Adam streamed through the GPU, or Adam in HBM.
void NativeLowering::update(const Weights& w) {
  b_.at(Phase::optimizer, w.layer);
  const int64_t count = w.elements();
  Does does;
  does.deferred = deferred();
  does.a = w.bucket;
  does.b = static_cast<int64_t>(w.master);
  const Operand factor = plan_.clip ? matrix(clip_, Type::f32, 1, 1) : Operand{};
  const int64_t each = state_bytes(w.master);
  const auto adam = [&](OpSpec spec, const Operand& states, const std::vector<Operand>& gradients,
                        const std::vector<Operand>& weights) {
    spec.does = does;
    std::vector<Operand> reads{factor, states}, writes{states};
    reads.insert(reads.end(), gradients.begin(), gradients.end());
    writes.insert(writes.end(), weights.begin(), weights.end());
    b_.op(spec, reads, writes);
  };
  const auto copy = [&](OpKind kind, Stream stream, int64_t bytes, const std::vector<Operand>& from,
                        const std::vector<Operand>& to) {
    OpSpec spec{kind, stream, Component::optimizer, {{bytes}}};
    spec.does.deferred = does.deferred;
    b_.op(spec, from, to);
  };
  const int64_t gradient = size_of(ht_), weights = size_of(wt_),
                read = each + gradient + (w.master == Master::states ? 0 : weights), written = each + weights;
  const auto on_gpu = [&](int64_t n) {
    return local(OpKind::adam, Component::optimizer, {{n, n * read, n * written}});
  };
  if (!w.on_host || w.staged != kNoBuffer) {  // all of them are in HBM
    adam(on_gpu(count), states_in(w.on_host ? w.staged : w.states[0], w),
         segments(w, 0, count, true, kNoBuffer), segments(w, 0, count, false, kNoBuffer));
    return;
  }
  if (!fsdp_ && plan_.optimizer == Optimizer::stream) {
    // Ring of buckets: one comes up, one is updated, one goes down.
    for (int64_t i = 0; i < w.buckets; ++i) {
      const int64_t first = i * w.bucket, n = std::min(w.bucket, count - first);
      const Operand home = states_in(w.states[static_cast<size_t>(i)], w),
                    staging = states_in(bucket_ring_[next_bucket_++ % bucket_ring_.size()], w);
      copy(OpKind::copy_h2d, Stream::h2d, each * w.bucket, {home}, {staging});
      adam(on_gpu(n), staging, segments(w, first, n, true, kNoBuffer),
           segments(w, first, n, false, kNoBuffer));
      copy(OpKind::copy_d2h, Stream::d2h, each * w.bucket, {staging}, {home});
    }
    return;
  }
  const size_t turn = next_update_++ % 2;
  BufferId gradients = kNoBuffer;  // where the CPU reads them
  if (held_in_hbm()) {
    gradients = download_ring_[turn];
    copy(OpKind::copy_d2h, Stream::d2h, gradient * count, segments(w, 0, count, true, kNoBuffer),
         segments(w, 0, count, true, gradients));
  }
  const BufferId fresh = fsdp_ ? kNoBuffer : fresh_ring_[turn];  // fsdp2's weights are on the host themselves
  adam({OpKind::adam_host, Stream::host, Component::optimizer, {{count, kHostAdamTraffic * count}}},
       states_in(w.states[0], w), segments(w, 0, count, true, gradients),
       segments(w, 0, count, false, fresh));
  if (!fsdp_)
    copy(OpKind::copy_h2d, Stream::h2d, es_ * count, segments(w, 0, count, false, fresh),
         segments(w, 0, count, false, kNoBuffer));
}

// A part's weights, whole, in the compute type.
BufferId NativeLowering::gather_part(const Part& part, BufferId slot, const char* label) {
  Operand own = matrix(part.weights, wt_, 1, part.shard);
  if (!fsdp_ && part.scatter == kNoGroup) return part.weights;
  const BufferId whole =
      slot != kNoBuffer ? slot
                        : b_.buffer(label, es_ * part.parameters, Holds::gathered_weights, part.flat.layer);
  const Operand full = matrix(whole, ct_, 1, part.parameters);
  if (fsdp_) {
    if (on_host(part.weights)) {
      const Operand uploaded = matrix(uploaded_ring_[next_upload_++ % 2], Type::f32, 1, part.shard);
      b_.op({OpKind::copy_h2d, Stream::h2d, Component::weights, {{kFp32 * part.shard}}}, {own}, {uploaded});
      own = uploaded;
    }
    const Operand narrow =
        part.scatter == kNoGroup
            ? full
            : matrix(transient("cast_shard", es_ * part.shard, Holds::gathered_weights, part.flat.layer), ct_,
                     1, part.shard);
    b_.op({OpKind::cast,
           Stream::gather,
           Component::weights,
           {{part.shard, kFp32 * part.shard, es_ * part.shard}}},
          {own}, {narrow});
    own = narrow;
  }
  if (part.scatter != kNoGroup)
    b_.op(remote(OpKind::all_gather, Stream::gather, part.component, part.scatter, es_ * part.parameters),
          {own}, {full});
  return whole;
}

NativeLowering::Gathered NativeLowering::gather(int layer) {
  const Weights& w = layers_[static_cast<size_t>(layer)];
  const auto turn = static_cast<size_t>(layer) % 2;
  Gathered g;
  g.layer = layer;
  g.correction = w.correction;
  g.dense = gather_part(w.dense, dense_slot_[turn], "gathered_dense");
  if (w.experts.exists()) g.experts = gather_part(w.experts, expert_slot_[turn], "gathered_experts");
  return g;
}

// Where producers accumulate a gradient: straight into the held shard when nothing has to be reduced,
// converted or moved, else into a buffer that settle() empties. Padding is cleared.
BufferId NativeLowering::gradient_target(const char* label, const Part& part, int layer) {
  BufferId target = kNoBuffer;
  if (part.scatter == kNoGroup && ht_ == gt_) {
    target = on_host(part.gradient) ? reduced_ring_[next_reduced_++ % 2] : part.gradient;
    if (target != part.gradient)  // what the ring held before is gone
      written_.erase(written_.lower_bound({target, 0}), written_.lower_bound({target + 1, 0}));
  } else {
    target = transient(label, gs_ * part.parameters, Holds::unsharded_gradients, layer);
  }
  if (part.parameters > part.used)
    clear(part.component, matrix(target, gt_, 1, part.parameters - part.used, part.used));
  return target;
}

// From the gradient of a micro-batch to the shard that the update reads: reduce-scatter, convert or
// accumulate, sum over replicas, add to the squared norm, bring to the host. What follows a collective runs
// on its stream, so that backward goes on meanwhile, where a gather behind it on that stream soon lets the
// compute stream know that the gradient's bytes are free again.
void NativeLowering::settle(const Part& part, BufferId whole, bool last) {
  const bool collective = part.scatter != kNoGroup || part.replicas != kNoGroup;
  const Stream stream =
      collective && ahead() && gathers_again(part.flat.layer - 1) ? Stream::gather : Stream::compute;
  const Operand held = matrix(part.gradient, ht_, 1, part.shard);
  const bool home = on_host(part.gradient), add = whole != part.gradient && !home && again(held);
  Operand reduced = matrix(whole, gt_, 1, part.shard);
  // What the update reads, in HBM.
  const auto target = [&] {
    return home ? matrix(reduced_ring_[next_reduced_++ % 2], ht_, 1, part.shard) : held;
  };
  if (part.scatter != kNoGroup) {
    const bool direct = ht_ == gt_ && !add;
    const Operand to =
        direct ? target()
               : matrix(transient("reduced_gradient", gs_ * part.shard, Holds::gradients, part.flat.layer),
                        gt_, 1, part.shard);
    b_.op(remote(OpKind::reduce_scatter, Stream::gather, part.component, part.scatter, gs_ * part.parameters),
          {matrix(whole, gt_, 1, part.parameters)}, {to});
    reduced = to;
  }
  const bool there = reduced.view.type == ht_ && (home || reduced.buffer == part.gradient);
  if (!there) {
    Does does;
    does.accumulate = add;
    const int64_t to_bytes = size_of(ht_) * part.shard;
    const Operand to = target();
    std::vector<Operand> reads{reduced};
    if (add) reads.push_back({});
    OpSpec convert = local(add ? OpKind::add : OpKind::cast, Component::optimizer,
                           {{part.shard, gs_ * part.shard + (add ? to_bytes : 0), to_bytes}}, does);
    convert.stream = stream;
    b_.op(convert, reads, std::array{to});
    reduced = to;
  }
  if (!last) return;
  if (part.replicas != kNoGroup)
    b_.op(
        remote(OpKind::all_reduce, Stream::gather, part.component, part.replicas, size_of(ht_) * part.shard),
        {reduced}, {reduced});
  if (plan_.clip) {
    Does does;
    does.accumulate = true;
    does.a = part.replica_count;
    OpSpec square =
        local(OpKind::square_sum, Component::optimizer, {{part.shard, size_of(ht_) * part.shard, 0}}, does);
    square.stream = stream;
    b_.op(square, {reduced}, {sum(0)});
  }
  if (home)
    b_.op({OpKind::copy_d2h, Stream::d2h, Component::optimizer, {{size_of(ht_) * part.shard}}}, {reduced},
          {held});
}

}  // namespace mop::program
