// Mixture-of-Parallelisms (arXiv 2607.01844; design notes in mop.md): dense weights sharded over W and
// gathered a layer ahead, Ulysses attention over D, experts over Ep x F with least-loaded planning in
// streaming rounds, the vocabulary over P, host-resident optimizer states updated under the next forward.
//
// Order of one step: for every micro-batch forward layers (each preceded by its deferred update on the first
// one), the vocabulary projection forward and backward together, backward layers; then the gradient norm.
#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/integer.h"
#include "sim/program/builder.h"
#include "sim/program/lower.h"

namespace mop::program {
namespace {

using plan::Optimizer;
using plan::Place;

constexpr int64_t kStateBytes = 12;  // fp32 master weight, first and second moment of a parameter
constexpr int64_t kHostTrafficBytes =
    28;  // DRAM bytes of one CPU Adam update of a parameter: 14 read, 14 written
constexpr int64_t kStreamBucket = int64_t{1}
                                  << 26;  // parameters in flight of a GPU-streamed update, over its ring
constexpr int64_t kMlpTile = 8192;        // tokens of a tile of the dense feed-forwards
constexpr int64_t kIds = 8;               // bytes of a token or row id on the wire

class MopLowering {
 public:
  explicit MopLowering(const LoweringInput& input)
      : in_(input), c_(input.model), plan_(input.plan), layout_(input.layout) {}

  StepProgram run();

 private:
  // One layer's persistent buffers.
  struct Weights {
    BufferId dense = kNoBuffer, experts = kNoBuffer;                   // bf16 shards
    BufferId dense_gradient = kNoBuffer, expert_gradient = kNoBuffer;  // what the update reads: shards
    BufferId states = kNoBuffer;
    int64_t dense_shard = 0, expert_shard = 0;  // parameters
    bool on_host = false;                       // states on the host
  };
  struct Checkpoint {
    BufferId input = kNoBuffer, attention = kNoBuffer, lse = kNoBuffer, gates = kNoBuffer;  // live in HBM
    BufferId host = kNoBuffer;
  };
  struct Gathered {
    BufferId dense = kNoBuffer, experts = kNoBuffer;
  };

  Shape rows(int64_t elements, double read, double written) const {
    return {{elements, static_cast<int64_t>(static_cast<double>(elements) * read),
             static_cast<int64_t>(static_cast<double>(elements) * written)}};
  }
  OpSpec local(OpKind kind, Component component, Shape shape, Routed routed = Routed::no) const {
    OpSpec spec{kind, Stream::compute, component, shape};
    spec.routed = routed;
    return spec;
  }
  OpSpec remote(OpKind kind, Stream stream, Component component, uint16_t group, int64_t sent,
                int64_t received = 0, Routed routed = Routed::no) const {
    OpSpec spec{kind, stream, component, {{sent, received}}, group};
    spec.routed = routed;
    return spec;
  }
  void gemm(Component component, int64_t m, int64_t n, int64_t k, std::initializer_list<BufferId> reads,
            std::initializer_list<BufferId> writes) {
    b_.op(local(OpKind::gemm, component, {{m, n, k}}), reads, writes);
  }

  void make_groups();
  void make_weights();
  Weights layer_weights(int layer, int64_t dense_parameters, int64_t expert_parameters);
  bool states_on_host(int layer) const;

  // CPU Adam with clipping reads gradients that wait on the host; accumulation, or an update without waiting,
  // keeps them in HBM until they are complete.
  bool held_in_hbm() const { return !plan_.clip || in_.workload.accumulate > 1; }
  BufferId block_buffer(int layer) {  // input of a layer: (N, H)
    if (plan_.checkpoints == Place::host) return input_ring_[static_cast<size_t>(layer) % 3];
    return transient("block_input", kBf16 * n_ * c_.hidden, Holds::checkpoints, layer);
  }
  bool on_host(BufferId buffer) const { return b_.at(buffer).space == Space::host; }

  void update(const Weights& w, int layer);
  Gathered gather(int layer);
  // One gradient on its way from a micro-batch to the update.
  struct Part {
    int64_t parameters, shard;  // before and after the reduce-scatter
    BufferId held;
    uint16_t scatter, replicas;
    Component component;
    int layer;
  };
  BufferId gradient_target(const char* label, int64_t parameters, BufferId held, uint16_t scatter, int layer);
  void settle(const Part& part, BufferId whole, bool last);

  void embed_forward();
  void embed_backward(bool last);
  void forward_layer(int layer);
  void backward_layer(int layer, bool last);
  std::vector<BufferId> checkpoint_parts(const Checkpoint& saved) const;
  void offload(int layer);
  void fetch(int layer);
  void vocabulary(bool last);
  void tokens_move(BufferId x, BufferId d_x, BufferId gradient);
  void weights_move(BufferId x, BufferId d_x, BufferId gradient);

  struct Latents {
    BufferId normed = kNoBuffer, q = kNoBuffer, kv = kNoBuffer;
  };
  struct HeadChunk {
    BufferId q = kNoBuffer, kv = kNoBuffer;
  };
  Latents attention_inputs(int layer, BufferId x, const Gathered& g);
  HeadChunk project_chunk(int layer, int64_t chunk, const Latents& in, const Gathered& g, HeadChunk earlier);
  void attention_forward(int layer, const Latents& in, const Gathered& g, BufferId out, BufferId lse);
  void attention_backward(int layer, const Latents& in, const Gathered& g, BufferId out, BufferId lse,
                          BufferId d_out, BufferId d_normed, BufferId gradient);
  AttentionShape attention_shape(int layer) const;
  int64_t kv_chunks() const;
  int64_t kv_heads_on_wire() const;
  bool latent() const {
    return c_.attention == model::Attention::mla && plan_.mla_exchange == plan::MlaExchange::latent;
  }

  void feed_forward(int layer, Component part, int64_t width, BufferId x, const Gathered& g, BufferId out);
  void feed_forward_backward(int layer, Component part, int64_t width, BufferId x, const Gathered& g,
                             BufferId d_out, BufferId d_x, BufferId gradient);
  BufferId route(int layer, BufferId x, const Gathered& g);
  BufferId plan_rounds(int layer, BufferId gates);
  BufferId borrow(int layer, BufferId rounds, const Gathered& g);
  int64_t round_rows() const;
  void experts_forward(int layer, BufferId x, const Gathered& g, BufferId gates, BufferId y);
  void experts_backward(int layer, BufferId x, const Gathered& g, BufferId gates, BufferId d_y, BufferId d_x,
                        BufferId d_gates, BufferId gradient);

  // A ring of buffers that outlive the streams using them: writing one again waits for whoever still reads
  // it.
  template <size_t K>
  void make_ring(std::array<BufferId, K>& ring, const char* label, int64_t bytes, Holds holds,
                 Space space = Space::hbm) {
    for (BufferId& slot : ring) slot = b_.persistent(label, bytes, holds, -1, space);
  }
  BufferId transient(const char* label, int64_t bytes, Holds holds, int layer) {
    return b_.buffer(label, bytes, holds, layer);
  }

  const LoweringInput& in_;
  const model::ModelConfig& c_;
  const plan::Plan& plan_;
  const plan::Layout& layout_;
  Builder b_;

  int64_t n_ = 0;         // tokens a rank (N)
  int64_t s_ = 0;         // tokens of its sequences (D x N)
  int64_t gradient_ = 2;  // bytes of a gradient
  // The experts' activation; their biases ride in the grouped matmuls' epilogues.
  OpKind swiglu_ = OpKind::swiglu, swiglu_bwd_ = OpKind::swiglu_bwd;
  uint16_t dense_group_ = kNoGroup, replicas_ = kNoGroup, sequence_ = kNoGroup, expert_ = kNoGroup,
           combine_ = kNoGroup, spill_group_ = kNoGroup, expert_shards_ = kNoGroup, vocabulary_ = kNoGroup,
           vocabulary_replicas_ = kNoGroup, world_ = kNoGroup, embedding_group_ = kNoGroup,
           statistics_ = kNoGroup;
  std::vector<Weights> layers_;
  Weights embedding_, head_;
  std::array<BufferId, 2> dense_slot_{kNoBuffer, kNoBuffer}, expert_slot_{kNoBuffer, kNoBuffer};
  BufferId clip_ = kNoBuffer, norm_ = kNoBuffer, x_ = kNoBuffer, dx_ = kNoBuffer;
  std::vector<Checkpoint> checkpoints_;
  std::vector<Gathered> gathered_;
  // Rings of what crosses between the compute stream and the copy streams.
  std::array<BufferId, 3> input_ring_{}, bucket_ring_{};
  std::array<BufferId, 2> attention_ring_{}, lse_ring_{}, fetched_input_{}, fetched_attention_{},
      fetched_lse_{}, reduced_ring_{}, download_ring_{}, fresh_ring_{};
  size_t next_bucket_ = 0, next_reduced_ = 0, next_update_ = 0;
};

void MopLowering::make_groups() {
  const auto group = [&](Axis axis, const plan::Span& span) {
    return span.size > 1 ? b_.group(axis, span.size, span.stride) : kNoGroup;
  };
  dense_group_ = group(Axis::shard, layout_.dense);
  replicas_ = group(Axis::replicate, layout_.dense_replicas);
  sequence_ = group(Axis::context, layout_.sequence);
  expert_ = group(Axis::expert, layout_.expert);
  combine_ = group(Axis::expert, layout_.expert);  // its own communicator: runs beside dispatch
  spill_group_ = group(Axis::expert, layout_.expert);
  expert_shards_ = group(Axis::expert_shard, layout_.expert_shard);
  vocabulary_ = group(Axis::vocabulary, layout_.vocabulary);
  vocabulary_replicas_ = group(Axis::vocabulary_replicas, layout_.vocabulary_replicas);
  statistics_ = group(Axis::vocabulary, layout_.vocabulary);
  embedding_group_ = group(Axis::shard, layout_.dense);
  world_ = group(Axis::world, {layout_.ranks, 1});
}

bool MopLowering::states_on_host(int layer) const {
  if (plan_.optimizer == Optimizer::hbm) return false;
  return plan_.optimizer != Optimizer::split || layer >= plan_.optimizer_hbm_layers;
}

MopLowering::Weights MopLowering::layer_weights(int layer, int64_t dense_parameters,
                                                int64_t expert_parameters) {
  Weights w;
  w.dense_shard = dense_parameters;
  w.expert_shard = expert_parameters;
  w.on_host = states_on_host(layer);
  const bool cpu = w.on_host && plan_.optimizer != Optimizer::stream;
  const Space states = w.on_host ? Space::host : Space::hbm;
  // Gradients wait for the clip factor beside the engine that will read them. With accumulation they add up
  // in HBM.
  const Space held = cpu && !held_in_hbm() ? Space::host : Space::hbm;
  const auto gradient = [&](const char* label, int64_t parameters) {
    return b_.persistent(label, gradient_ * parameters, Holds::gradients, layer, held);
  };
  if (dense_parameters > 0) {
    w.dense = b_.persistent("dense_weights", kBf16 * dense_parameters, Holds::weights, layer);
    w.dense_gradient = gradient("dense_gradient", dense_parameters);
  }
  if (expert_parameters > 0) {
    w.experts = b_.persistent("expert_weights", kBf16 * expert_parameters, Holds::weights, layer);
    w.expert_gradient = gradient("expert_gradient", expert_parameters);
  }
  w.states = b_.persistent("optimizer_states", kStateBytes * (dense_parameters + expert_parameters),
                           Holds::optimizer_states, layer, states);
  return w;
}

void MopLowering::make_weights() {
  const model::Parameters& p = in_.parameters;
  int64_t most_dense = 0, most_experts = 0;
  for (int l = 0; l < c_.layers; ++l) {
    const model::LayerParameters& layer = p.layers[static_cast<size_t>(l)];
    layers_.push_back(layer_weights(l, ceil_div(layer.dense(), layout_.dense.size),
                                    ceil_div(layer.experts, layout_.ranks)));
    most_dense = std::max(most_dense, layer.dense());
    most_experts = std::max(most_experts, layer.experts / layout_.expert.size);
  }
  embedding_ = layer_weights(-1, ceil_div(p.embedding, layout_.dense.size), 0);
  head_ = layer_weights(static_cast<int>(c_.layers),
                        ceil_div(c_.vocab, layout_.vocabulary.size) * c_.hidden + p.final_norm, 0);
  if (layout_.dense.size > 1)
    for (auto& slot : dense_slot_)
      slot = b_.persistent("gathered_dense", kBf16 * most_dense, Holds::gathered_weights);
  if (layout_.expert_shard.size > 1)
    for (auto& slot : expert_slot_)
      slot = b_.persistent("gathered_experts", kBf16 * most_experts, Holds::gathered_weights);
  int64_t most = embedding_.dense_shard,
          most_part = embedding_.dense_shard;  // of a layer; of one of its two parts
  bool any_on_host = false;
  for (const Weights& w : layers_) {
    most = std::max(most, w.dense_shard + w.expert_shard);
    most_part = std::max({most_part, w.dense_shard, w.expert_shard});
    any_on_host |= w.on_host;
  }
  most = std::max(most, head_.dense_shard);
  most_part = std::max(most_part, head_.dense_shard);
  if (any_on_host && plan_.optimizer == Optimizer::stream) {
    make_ring(bucket_ring_, "state_bucket", kStateBytes * std::min(most, kStreamBucket), Holds::staging);
  } else if (any_on_host) {
    make_ring(fresh_ring_, "updated_weights", kBf16 * most, Holds::staging, Space::host);
    if (held_in_hbm())
      make_ring(download_ring_, "gradient_download", gradient_ * most, Holds::staging, Space::host);
    else
      make_ring(reduced_ring_, "reduced_gradient", gradient_ * most_part, Holds::staging);
  }
  if (plan_.checkpoints == Place::host) {
    const int64_t input = kBf16 * n_ * c_.hidden;
    make_ring(input_ring_, "block_input", input, Holds::checkpoints);
    make_ring(fetched_input_, "block_input_fetched", input, Holds::checkpoints);
    if (plan_.save_attention) {
      const int64_t attention = kBf16 * n_ * c_.heads * c_.v_dim(), lse = kFp32 * n_ * c_.heads;
      make_ring(attention_ring_, "attention_saved", attention, Holds::checkpoints);
      make_ring(lse_ring_, "attention_lse", lse, Holds::checkpoints);
      make_ring(fetched_attention_, "attention_fetched", attention, Holds::checkpoints);
      make_ring(fetched_lse_, "attention_lse_fetched", lse, Holds::checkpoints);
    }
  }
  if (plan_.clip) {
    norm_ = b_.persistent("squared_norm", 256, Holds::other_activations);
    clip_ = b_.persistent("clip_factor", 256, Holds::other_activations);
  }
}

// The update of one layer's shard: host CPU Adam, Adam streamed through the GPU, or Adam in HBM.
void MopLowering::update(const Weights& w, int layer) {
  const int64_t parameters = w.dense_shard + w.expert_shard;
  std::vector<BufferId> gradients, weights;
  if (w.dense != kNoBuffer) gradients.push_back(w.dense_gradient), weights.push_back(w.dense);
  if (w.experts != kNoBuffer) gradients.push_back(w.expert_gradient), weights.push_back(w.experts);
  std::vector<BufferId> reads = gradients;
  if (plan_.clip) reads.push_back(clip_);
  b_.at(Phase::optimizer, layer);
  const auto adam = [&](int64_t count) {
    return local(OpKind::adam, Component::optimizer,
                 rows(count, static_cast<double>(kStateBytes + gradient_), kStateBytes + kBf16));
  };
  if (!w.on_host) {
    std::vector<BufferId> all = reads, writes = weights;
    all.push_back(w.states);
    writes.push_back(w.states);
    b_.op(adam(parameters), all, writes);
    return;
  }
  if (plan_.optimizer == Optimizer::stream) {
    // Ring of buckets: one comes up, one is updated, one goes down.
    const int64_t buckets = ceil_div(parameters, kStreamBucket), bucket = ceil_div(parameters, buckets);
    for (int64_t i = 0; i < buckets; ++i) {
      const int64_t bytes = kStateBytes * bucket;
      const BufferId staging = bucket_ring_[next_bucket_++ % bucket_ring_.size()];
      b_.op({OpKind::copy_h2d, Stream::h2d, Component::optimizer, {{bytes}}}, {w.states}, {staging});
      std::vector<BufferId> all = reads, writes = weights;
      all.push_back(staging);
      writes.push_back(staging);
      b_.op(adam(bucket), all, writes);
      b_.op({OpKind::copy_d2h, Stream::d2h, Component::optimizer, {{bytes}}}, {staging}, {w.states});
    }
    return;
  }
  const size_t turn = next_update_++ % 2;
  std::vector<BufferId> host_reads = reads;
  if (held_in_hbm()) {
    host_reads = {download_ring_[turn]};
    if (plan_.clip) host_reads.push_back(clip_);
    b_.op({OpKind::copy_d2h, Stream::d2h, Component::optimizer, {{gradient_ * parameters}}}, gradients,
          std::array{download_ring_[turn]});
  }
  b_.op(
      {OpKind::adam_host, Stream::host, Component::optimizer, {{parameters, kHostTrafficBytes * parameters}}},
      host_reads, std::array{w.states, fresh_ring_[turn]});
  b_.op({OpKind::copy_h2d, Stream::h2d, Component::optimizer, {{kBf16 * parameters}}},
        std::array{fresh_ring_[turn]}, weights);
}

MopLowering::Gathered MopLowering::gather(int layer) {
  const Weights& w = layers_[static_cast<size_t>(layer)];
  const model::LayerParameters& p = in_.parameters.layers[static_cast<size_t>(layer)];
  Gathered g{w.dense, w.experts};
  if (dense_group_ != kNoGroup) {
    g.dense = dense_slot_[static_cast<size_t>(layer) % 2];
    b_.op(remote(OpKind::all_gather, Stream::gather, Component::dense, dense_group_, kBf16 * p.dense()),
          {w.dense}, {g.dense});
  }
  if (expert_shards_ != kNoGroup && p.experts > 0) {
    g.experts = expert_slot_[static_cast<size_t>(layer) % 2];
    b_.op(remote(OpKind::all_gather, Stream::gather, Component::experts, expert_shards_,
                 kBf16 * p.experts / layout_.expert.size),
          {w.experts}, {g.experts});
  }
  return g;
}

// Where a producer accumulates the gradient of `parameters`: straight into the held shard when nothing has to
// be reduced or moved, else into a buffer that settle() empties.
BufferId MopLowering::gradient_target(const char* label, int64_t parameters, BufferId held, uint16_t scatter,
                                      int layer) {
  if (scatter == kNoGroup) return on_host(held) ? reduced_ring_[next_reduced_++ % 2] : held;
  return transient(label, gradient_ * parameters, Holds::unsharded_gradients, layer);
}

// From the gradient of a micro-batch to the shard that the update reads: reduce-scatter, accumulate, sum over
// replicas, add to the squared norm, bring to the host.
void MopLowering::settle(const Part& part, BufferId whole, bool last) {
  const int64_t shard_bytes = gradient_ * part.shard;
  const bool once = in_.workload.accumulate == 1;
  BufferId reduced = whole;
  if (part.scatter != kNoGroup) {
    if (once && !on_host(part.held))
      reduced = part.held;
    else if (once)
      reduced = reduced_ring_[next_reduced_++ % 2];
    else
      reduced = transient("reduced_gradient", shard_bytes, Holds::gradients, part.layer);
    b_.op(remote(OpKind::reduce_scatter, Stream::gather, part.component, part.scatter,
                 gradient_ * part.parameters),
          {whole}, {reduced});
  }
  if (!once && reduced != part.held) {
    b_.op(local(OpKind::add, Component::optimizer, {{part.shard, 2 * shard_bytes, shard_bytes}}), {reduced},
          {part.held});
    reduced = part.held;
  }
  if (!last) return;
  if (part.replicas != kNoGroup)
    b_.op(remote(OpKind::all_reduce, Stream::gather, part.component, part.replicas, shard_bytes), {reduced},
          {reduced});
  if (plan_.clip)
    b_.op(local(OpKind::square_sum, Component::optimizer, {{part.shard, shard_bytes, 0}}), {reduced},
          {norm_});
  if (reduced != part.held)
    b_.op({OpKind::copy_d2h, Stream::d2h, Component::optimizer, {{shard_bytes}}}, {reduced}, {part.held});
}

void MopLowering::embed_forward() {
  b_.at(Phase::forward, -1);
  x_ = block_buffer(0);
  const BufferId table = embedding_.dense;
  if (embedding_group_ == kNoGroup) {
    b_.op(local(OpKind::embedding, Component::embedding, rows(n_ * c_.hidden, kBf16, kBf16)), {table}, {x_});
    return;
  }
  // Each rank looks up the rows that it owns for whoever asks: ids go out, rows come back.
  const BufferId ids = transient("embedding_ids", kIds * n_, Holds::other_activations, -1);
  const BufferId found = transient("embedding_rows", kBf16 * n_ * c_.hidden, Holds::other_activations, -1);
  b_.op(remote(OpKind::all_to_all, Stream::sequence, Component::embedding, embedding_group_, kIds * n_,
               kIds * n_),
        {}, {ids});
  b_.op(local(OpKind::embedding, Component::embedding, rows(n_ * c_.hidden, kBf16, kBf16)), {ids, table},
        {found});
  b_.op(remote(OpKind::all_to_all, Stream::sequence, Component::embedding, embedding_group_,
               kBf16 * n_ * c_.hidden, kBf16 * n_ * c_.hidden),
        {found}, {x_});
}

void MopLowering::embed_backward(bool last) {
  b_.at(Phase::backward, -1);
  BufferId arrived = dx_;
  if (embedding_group_ != kNoGroup) {
    arrived = transient("embedding_row_gradients", kBf16 * n_ * c_.hidden, Holds::other_activations, -1);
    b_.op(remote(OpKind::all_to_all, Stream::sequence, Component::embedding, embedding_group_,
                 kBf16 * n_ * c_.hidden, kBf16 * n_ * c_.hidden),
          {dx_}, {arrived});
  }
  const Part part{embedding_.dense_shard,
                  embedding_.dense_shard,
                  embedding_.dense_gradient,
                  kNoGroup,
                  replicas_,
                  Component::embedding,
                  -1};
  const BufferId gradient =
      gradient_target("embedding_gradient", part.parameters, part.held, part.scatter, -1);
  b_.op(local(OpKind::embedding_bwd, Component::embedding,
              {{n_ * c_.hidden, kBf16 * n_ * c_.hidden, gradient_ * (part.shard + n_ * c_.hidden)}}),
        {arrived}, {gradient});
  settle(part, gradient, last);
  if (last && !plan_.clip) update(embedding_, -1);
}

// ---- attention ----

// The part of the attention that is not divided over heads: norm, and for MLA the latents of q and of k and
// v.
MopLowering::Latents MopLowering::attention_inputs(int layer, BufferId x, const Gathered& g) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden;
  Latents out;
  out.normed = transient("attention_normed", kBf16 * n_ * h, Holds::attention_activations, layer);
  b_.op(local(OpKind::rms_norm, part, rows(n_ * h, kBf16, kBf16)), {x, g.dense}, {out.normed});
  if (c_.attention == model::Attention::gqa) return out;
  if (c_.q_lora_rank > 0) {
    out.q = transient("q_latent", kBf16 * n_ * c_.q_lora_rank, Holds::attention_activations, layer);
    gemm(part, n_, c_.q_lora_rank, h, {out.normed, g.dense}, {out.q});
    b_.op(local(OpKind::rms_norm, part, rows(n_ * c_.q_lora_rank, kBf16, kBf16)), {out.q, g.dense}, {out.q});
  }
  const int64_t kv = c_.kv_lora_rank + c_.qk_rope_dim;
  out.kv = transient("kv_latent", kBf16 * n_ * kv, Holds::attention_activations, layer);
  gemm(part, n_, kv, h, {out.normed, g.dense}, {out.kv});
  b_.op(local(OpKind::rms_norm, part, rows(n_ * kv, kBf16, kBf16)), {out.kv, g.dense}, {out.kv});
  if (latent() && sequence_ != kNoGroup) {
    const BufferId all =
        transient("kv_latent_gathered", kBf16 * s_ * kv, Holds::attention_activations, layer);
    b_.op(remote(OpKind::all_gather, Stream::sequence, part, sequence_, kBf16 * s_ * kv), {out.kv}, {all});
    out.kv = all;
  }
  return out;
}

int64_t MopLowering::kv_heads_on_wire() const {
  if (c_.attention == model::Attention::mla) return c_.heads;
  return std::max(c_.kv_heads,
                  layout_.sequence.size);  // each head goes to D / kv_heads ranks when D is larger
}

int64_t MopLowering::kv_chunks() const {
  return kv_heads_on_wire() / layout_.sequence.size % plan_.head_chunks == 0 ? plan_.head_chunks : 1;
}

// Queries of one chunk of heads for the whole sequence, and its keys and values unless an earlier chunk
// brought them.
MopLowering::HeadChunk MopLowering::project_chunk(int layer, int64_t chunk, const Latents& in,
                                                  const Gathered& g, HeadChunk earlier) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden, qd = c_.qk_dim(), vd = c_.v_dim(), d = layout_.sequence.size;
  const int64_t heads = c_.heads / plan_.head_chunks;
  const bool mla = c_.attention == model::Attention::mla;
  const BufferId q_from = mla && c_.q_lora_rank > 0 ? in.q : in.normed;
  const int64_t q_width = mla && c_.q_lora_rank > 0 ? c_.q_lora_rank : h;

  HeadChunk out = earlier;
  const BufferId q = transient("queries", kBf16 * n_ * heads * qd, Holds::attention_activations, layer);
  gemm(part, n_, heads * qd, q_width, {q_from, g.dense}, {q});
  b_.op(local(OpKind::rope, part, rows(n_ * heads * qd, kBf16, kBf16)), {q}, {q});

  const bool with_kv = chunk < kv_chunks();
  BufferId k = kNoBuffer;  // k and v side by side
  int64_t kv_bytes = 0;
  if (with_kv) {
    if (mla && latent()) {
      const int64_t own = heads / d;
      out.kv = transient("keys_values", kBf16 * s_ * own * (qd + vd), Holds::attention_activations, layer);
      gemm(part, s_, own * (c_.qk_nope_dim + vd), c_.kv_lora_rank, {in.kv, g.dense}, {out.kv});
      b_.op(local(OpKind::rope, part, rows(s_ * own * qd, kBf16, kBf16)), {out.kv, in.kv}, {out.kv});
    } else {
      const int64_t kv_heads =
          (mla ? c_.heads : c_.kv_heads) / std::min(kv_chunks(), mla ? c_.heads : c_.kv_heads);
      k = transient("keys_values", kBf16 * n_ * kv_heads * (qd + vd), Holds::attention_activations, layer);
      if (mla) {
        gemm(part, n_, kv_heads * (c_.qk_nope_dim + vd), c_.kv_lora_rank, {in.kv, g.dense}, {k});
      } else {
        gemm(part, n_, kv_heads * (qd + vd), h, {in.normed, g.dense}, {k});
      }
      b_.op(local(OpKind::rope, part, rows(n_ * kv_heads * qd, kBf16, kBf16)), {k}, {k});
      kv_bytes = kBf16 * n_ * kv_heads_on_wire() / kv_chunks() * (qd + vd);
      out.kv = k;
    }
  }
  out.q = q;
  if (sequence_ == kNoGroup) return out;

  const int64_t q_bytes = kBf16 * n_ * heads * qd;
  out.q = transient("queries_exchanged", q_bytes, Holds::attention_activations, layer);
  if (kv_bytes > 0) {
    out.kv = transient("keys_values_exchanged", kv_bytes, Holds::attention_activations, layer);
    b_.op(
        remote(OpKind::all_to_all, Stream::sequence, part, sequence_, q_bytes + kv_bytes, q_bytes + kv_bytes),
        {q, k}, {out.q, out.kv});
  } else {
    b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, q_bytes, q_bytes), {q}, {out.q});
  }
  return out;
}

AttentionShape MopLowering::attention_shape(int layer) const {
  const int64_t d = layout_.sequence.size;
  const int64_t heads = c_.heads / d / plan_.head_chunks;
  const int64_t kv_heads =
      c_.attention == model::Attention::mla ? heads : kv_heads_on_wire() / d / kv_chunks();
  const int64_t window = plan_.windows ? c_.window[static_cast<size_t>(layer)] : 0;
  return {in_.workload.sequences,
          in_.workload.context,
          in_.workload.context,
          heads,
          std::min(heads, kv_heads),
          c_.qk_dim(),
          c_.v_dim(),
          1,
          window};
}

// out: (N, heads x v) bf16, all heads; lse: (S, heads / D) fp32. Chunk c + 1 is projected and exchanged while
// chunk c computes.
void MopLowering::attention_forward(int layer, const Latents& in, const Gathered& g, BufferId out,
                                    BufferId lse) {
  const Component part = Component::attention;
  const int64_t chunks = plan_.head_chunks;
  const int64_t o_bytes = kBf16 * n_ * c_.heads / chunks * c_.v_dim();
  HeadChunk next = project_chunk(layer, 0, in, g, {});
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const HeadChunk now = next;
    if (chunk + 1 < chunks) next = project_chunk(layer, chunk + 1, in, g, now);
    const OpSpec attend = local(OpKind::attention_fwd, part, attention_shape(layer).shape());
    if (sequence_ == kNoGroup) {
      b_.op(attend, {now.q, now.kv}, {out, lse});
      continue;
    }
    const BufferId own = transient("attention_output", o_bytes, Holds::attention_activations, layer);
    b_.op(attend, {now.q, now.kv}, {own, lse});
    b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, o_bytes, o_bytes), {own}, {out});
  }
}

// d_out: (N, H) gradient of the block's attention output; adds into d_normed (N, H) and the layer's dense
// gradient. The output is exchanged once more beside its gradient: keeping both layouts of it would cost N x
// heads x v more a layer.
void MopLowering::attention_backward(int layer, const Latents& in, const Gathered& g, BufferId out,
                                     BufferId lse, BufferId d_out, BufferId d_normed, BufferId gradient) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden, qd = c_.qk_dim(), vd = c_.v_dim(), d = layout_.sequence.size;
  const int64_t chunks = plan_.head_chunks, heads = c_.heads / chunks;
  const bool mla = c_.attention == model::Attention::mla;
  const int64_t kv_latent = c_.kv_lora_rank + c_.qk_rope_dim;
  const bool q_lora = mla && c_.q_lora_rank > 0;
  const int64_t q_width = q_lora ? c_.q_lora_rank : h;

  gemm(part, c_.heads * vd, h, n_, {out, d_out}, {gradient});
  BufferId d_q_latent = kNoBuffer, d_kv_latent = kNoBuffer;
  if (q_lora)
    d_q_latent =
        transient("q_latent_gradient", kBf16 * n_ * c_.q_lora_rank, Holds::attention_activations, layer);
  if (mla)
    d_kv_latent = transient("kv_latent_gradient", kBf16 * (latent() ? s_ : n_) * kv_latent,
                            Holds::attention_activations, layer);

  HeadChunk kv{};
  BufferId d_kv_local = kNoBuffer;  // gradients of keys and values that several chunks share
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t o_bytes = kBf16 * n_ * heads * vd, q_bytes = kBf16 * n_ * heads * qd;
    BufferId d_o = transient("attention_output_gradient", o_bytes, Holds::attention_activations, layer);
    gemm(part, n_, heads * vd, h, {d_out, g.dense}, {d_o});
    BufferId o = out;
    if (sequence_ != kNoGroup) {
      o = transient("attention_output_exchanged", o_bytes, Holds::attention_activations, layer);
      const BufferId arrived =
          transient("attention_output_gradient_exchanged", o_bytes, Holds::attention_activations, layer);
      b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, 2 * o_bytes, 2 * o_bytes),
            {out, d_o}, {o, arrived});
      d_o = arrived;
    }
    b_.at(Phase::recompute, layer);
    kv = project_chunk(layer, chunk, in, g, kv);
    b_.at(Phase::backward, layer);

    const bool fresh_kv = chunk < kv_chunks();
    const int64_t kv_heads_chunk = mla ? heads : std::max<int64_t>(1, c_.kv_heads / kv_chunks());
    const int64_t kv_bytes = latent() ? kBf16 * s_ * heads / d * (qd + vd)
                                      : kBf16 * n_ * kv_heads_on_wire() / kv_chunks() * (qd + vd);
    const BufferId d_q = transient("queries_gradient", q_bytes, Holds::attention_activations, layer);
    if (fresh_kv)
      d_kv_local = transient("keys_values_gradient", kv_bytes, Holds::attention_activations, layer);
    b_.op(local(OpKind::attention_bwd, part, attention_shape(layer).shape()), {kv.q, kv.kv, o, d_o, lse},
          {d_q, d_kv_local});

    // Keys and values that all chunks share go back after the last one.
    const bool return_kv = kv_chunks() == chunks || chunk + 1 == chunks;
    BufferId d_q_home = d_q, d_kv_home = d_kv_local;
    if (sequence_ != kNoGroup) {
      d_q_home = transient("queries_gradient_home", q_bytes, Holds::attention_activations, layer);
      if (return_kv && !latent()) {
        d_kv_home = transient("keys_values_gradient_home", kv_bytes, Holds::attention_activations, layer);
        b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, q_bytes + kv_bytes,
                     q_bytes + kv_bytes),
              {d_q, d_kv_local}, {d_q_home, d_kv_home});
      } else {
        b_.op(remote(OpKind::all_to_all, Stream::sequence, part, sequence_, q_bytes, q_bytes), {d_q},
              {d_q_home});
      }
    }
    b_.op(local(OpKind::rope_bwd, part, rows(n_ * heads * qd, kBf16, kBf16)), {d_q_home}, {d_q_home});
    const BufferId q_from = q_lora ? in.q : in.normed;
    gemm(part, q_width, heads * qd, n_, {q_from, d_q_home}, {gradient});
    gemm(part, n_, q_width, heads * qd, {d_q_home, g.dense}, {q_lora ? d_q_latent : d_normed});
    if (!return_kv) continue;
    if (mla) {
      const int64_t tokens = latent() ? s_ : n_, own = latent() ? heads / d : heads;
      gemm(part, c_.kv_lora_rank, own * (c_.qk_nope_dim + vd), tokens, {in.kv, d_kv_home}, {gradient});
      gemm(part, tokens, c_.kv_lora_rank, own * (c_.qk_nope_dim + vd), {d_kv_home, g.dense}, {d_kv_latent});
    } else {
      b_.op(local(OpKind::rope_bwd, part, rows(n_ * kv_heads_chunk * qd, kBf16, kBf16)), {d_kv_home},
            {d_kv_home});
      gemm(part, h, kv_heads_chunk * (qd + vd), n_, {in.normed, d_kv_home}, {gradient});
      gemm(part, n_, h, kv_heads_chunk * (qd + vd), {d_kv_home, g.dense}, {d_normed});
    }
  }
  if (!mla) return;
  if (latent() && sequence_ != kNoGroup) {
    const BufferId home =
        transient("kv_latent_gradient_home", kBf16 * n_ * kv_latent, Holds::attention_activations, layer);
    b_.op(remote(OpKind::reduce_scatter, Stream::sequence, part, sequence_, kBf16 * s_ * kv_latent),
          {d_kv_latent}, {home});
    d_kv_latent = home;
  }
  b_.op(local(OpKind::rms_norm_bwd, part, rows(n_ * kv_latent, 2 * kBf16, kBf16)), {d_kv_latent},
        {d_kv_latent});
  gemm(part, h, kv_latent, n_, {in.normed, d_kv_latent}, {gradient});
  gemm(part, n_, h, kv_latent, {d_kv_latent, g.dense}, {d_normed});
  if (!q_lora) return;
  b_.op(local(OpKind::rms_norm_bwd, part, rows(n_ * c_.q_lora_rank, 2 * kBf16, kBf16)), {d_q_latent},
        {d_q_latent});
  gemm(part, h, c_.q_lora_rank, n_, {in.normed, d_q_latent}, {gradient});
  gemm(part, n_, h, c_.q_lora_rank, {d_q_latent, g.dense}, {d_normed});
}

// ---- feed-forward ----

// A gated feed-forward that every token visits (dense layer or shared experts), tile by tile along the
// sequence.
void MopLowering::feed_forward(int layer, Component part, int64_t width, BufferId x, const Gathered& g,
                               BufferId out) {
  const int64_t h = c_.hidden;
  for (int64_t done = 0; done < n_; done += kMlpTile) {
    const int64_t t = std::min(kMlpTile, n_ - done);
    const BufferId hidden = transient("gate_up", kBf16 * t * 2 * width, Holds::other_activations, layer);
    const BufferId act = transient("swiglu", kBf16 * t * width, Holds::other_activations, layer);
    gemm(part, t, 2 * width, h, {x, g.dense}, {hidden});
    b_.op(local(OpKind::swiglu, part, rows(t * width, 2 * kBf16, kBf16)), {hidden}, {act});
    gemm(part, t, h, width, {act, g.dense}, {out});
  }
}

void MopLowering::feed_forward_backward(int layer, Component part, int64_t width, BufferId x,
                                        const Gathered& g, BufferId d_out, BufferId d_x, BufferId gradient) {
  const int64_t h = c_.hidden;
  for (int64_t done = 0; done < n_; done += kMlpTile) {
    const int64_t t = std::min(kMlpTile, n_ - done);
    const BufferId hidden = transient("gate_up", kBf16 * t * 2 * width, Holds::other_activations, layer);
    const BufferId act = transient("swiglu", kBf16 * t * width, Holds::other_activations, layer);
    const BufferId d_act = transient("swiglu_gradient", kBf16 * t * width, Holds::other_activations, layer);
    b_.at(Phase::recompute, layer);
    gemm(part, t, 2 * width, h, {x, g.dense}, {hidden});
    b_.op(local(OpKind::swiglu, part, rows(t * width, 2 * kBf16, kBf16)), {hidden}, {act});
    b_.at(Phase::backward, layer);
    gemm(part, t, width, h, {d_out, g.dense}, {d_act});
    gemm(part, width, h, t, {act, d_out}, {gradient});
    b_.op(local(OpKind::swiglu_bwd, part, rows(t * width, 3 * kBf16, 2 * kBf16)), {hidden, d_act}, {hidden});
    gemm(part, h, 2 * width, t, {x, hidden}, {gradient});
    gemm(part, t, h, 2 * width, {hidden, g.dense}, {d_x});
  }
}

// ---- experts ----

// fp32 router: logits, top-k ids and gate weights (N, k), and the group's counts.
BufferId MopLowering::route(int layer, BufferId x, const Gathered& g) {
  const Component part = Component::router;
  const BufferId logits =
      transient("router_logits", kFp32 * n_ * c_.experts, Holds::other_activations, layer);
  const BufferId gates = transient("gates", (kFp32 + kFp32) * n_ * c_.top_k, Holds::checkpoints, layer);
  gemm(part, n_, c_.experts, c_.hidden, {x, g.dense}, {logits});
  b_.op(local(OpKind::topk, part,
              rows(n_ * c_.experts, kFp32,
                   8.0 * static_cast<double>(c_.top_k) / static_cast<double>(c_.experts))),
        {logits}, {gates});
  return gates;
}

// Counts of all ranks of the expert group, the least-loaded plan and the rounds: known to every rank alike.
BufferId MopLowering::plan_rounds(int layer, BufferId gates) {
  const int64_t bytes = kFp32 * c_.experts * layout_.expert.size;
  const BufferId rounds = transient("rounds", bytes, Holds::expert_exchange, layer);
  if (expert_ != kNoGroup) {
    const BufferId counts = transient("counts", bytes, Holds::expert_exchange, layer);
    b_.op(remote(OpKind::all_gather, Stream::dispatch, Component::router, expert_, bytes), {gates}, {counts});
    b_.op(local(OpKind::plan_routing, Component::router, {{c_.experts, bytes, bytes}}), {counts, gates},
          {rounds});
  } else {
    b_.op(local(OpKind::plan_routing, Component::router, {{c_.experts, bytes, bytes}}), {gates}, {rounds});
  }
  return rounds;
}

// Weights of borrowed experts, into the slots. kNoBuffer when nothing can spill.
BufferId MopLowering::borrow(int layer, BufferId rounds, const Gathered& g) {
  if (!plan_.least_loaded || expert_ == kNoGroup) return kNoBuffer;
  const int64_t bytes = kBf16 * plan_.spill_slots * in_.parameters.layers[static_cast<size_t>(layer)].expert;
  const BufferId slots = transient("spilled_weights", bytes, Holds::spilled_experts, layer);
  b_.op(remote(OpKind::all_to_all, Stream::spill, Component::experts, spill_group_, bytes, bytes,
               Routed::spill),
        {rounds, g.experts}, {slots});
  return slots;
}

int64_t MopLowering::round_rows() const {
  // Without expert parallelism nothing moves, but the rows are still gathered round by round.
  return std::min(plan_.round_rows, n_ * c_.top_k);
}

// y (N, H) fp32 += routed experts of x (N, H) bf16.
void MopLowering::experts_forward(int layer, BufferId x, const Gathered& g, BufferId gates, BufferId y) {
  const Component part = Component::experts;
  const BufferId rounds = plan_rounds(layer, gates);
  const BufferId spilled = borrow(layer, rounds, g);
  const int64_t r = round_rows(), h = c_.hidden, i = c_.expert_intermediate,
                e = c_.experts / layout_.expert.size;
  const Holds exchange = Holds::expert_exchange, act_holds = Holds::expert_activations;
  b_.begin_repeat(layer);
  {
    BufferId arrived = b_.buffer("dispatched", kBf16 * r * h, exchange, layer);
    const BufferId sent =
        expert_ == kNoGroup ? arrived : b_.buffer("dispatch_send", kBf16 * r * h, exchange, layer);
    b_.op(local(OpKind::permute, part, rows(r * h, kBf16, kBf16), Routed::source), {x, gates, rounds},
          {sent});
    if (expert_ != kNoGroup)
      b_.op(remote(OpKind::all_to_all, Stream::dispatch, part, expert_, kBf16 * r * h, kBf16 * r * h,
                   Routed::dispatch),
            {sent}, {arrived});
    const BufferId hidden = b_.scratch("expert_gate_up", kBf16 * r * 2 * i, act_holds, layer);
    const BufferId act = b_.scratch("expert_swiglu", kBf16 * r * i, act_holds, layer);
    const BufferId out = b_.buffer("expert_output", kBf16 * r * h, exchange, layer);
    std::vector<BufferId> in{arrived, g.experts}, in2{act, g.experts};
    if (spilled != kNoBuffer) in.push_back(spilled), in2.push_back(spilled);
    b_.op(local(OpKind::grouped_gemm, part, {{r, 2 * i, h, e}}, Routed::compute), in, std::array{hidden});
    b_.op(local(swiglu_, part, rows(r * i, 2 * kBf16, kBf16), Routed::compute), {hidden}, {act});
    b_.op(local(OpKind::grouped_gemm, part, {{r, h, i, e}}, Routed::compute), in2, std::array{out});
    BufferId home = out;
    if (expert_ != kNoGroup) {
      home = b_.buffer("combined", kBf16 * r * h, exchange, layer);
      b_.op(remote(OpKind::all_to_all, Stream::combine, part, combine_, kBf16 * r * h, kBf16 * r * h,
                   Routed::combine),
            {out}, {home});
    }
    b_.op(local(OpKind::unpermute, part, rows(r * h, kBf16 + kFp32, kFp32), Routed::source), {home, rounds},
          {y});
  }
  b_.end_repeat();
}

// d_y (N, H) bf16 in, d_x (N, H) fp32 += , gradients of gate weights and of the local experts. The gate
// weight is applied on the expert's side, so its gradient is a row-wise product of swiglu and its gradient
// and nothing has to be combined again.
void MopLowering::experts_backward(int layer, BufferId x, const Gathered& g, BufferId gates, BufferId d_y,
                                   BufferId d_x, BufferId d_gates, BufferId gradient) {
  const Component part = Component::experts;
  b_.at(Phase::recompute, layer);
  const BufferId rounds = plan_rounds(layer, gates);
  const BufferId spilled = borrow(layer, rounds, g);
  b_.at(Phase::backward, layer);
  const int64_t expert = in_.parameters.layers[static_cast<size_t>(layer)].expert;
  const int64_t r = round_rows(), h = c_.hidden, i = c_.expert_intermediate,
                e = c_.experts / layout_.expert.size;
  const Holds exchange = Holds::expert_exchange, act_holds = Holds::expert_activations;
  BufferId spilled_gradient = kNoBuffer;
  if (spilled != kNoBuffer)
    spilled_gradient =
        transient("spilled_gradients", gradient_ * plan_.spill_slots * expert, Holds::spilled_experts, layer);
  b_.begin_repeat(layer);
  {
    // Inputs again, and the output's gradients, in one exchange.
    const BufferId arrived = b_.buffer("dispatched", 2 * kBf16 * r * h, exchange, layer);
    const BufferId sent =
        expert_ == kNoGroup ? arrived : b_.buffer("dispatch_send", 2 * kBf16 * r * h, exchange, layer);
    b_.op(local(OpKind::permute, part, rows(2 * r * h, kBf16, kBf16), Routed::source),
          {x, d_y, gates, rounds}, {sent});
    if (expert_ != kNoGroup)
      b_.op(remote(OpKind::all_to_all, Stream::dispatch, part, expert_, 2 * kBf16 * r * h, 2 * kBf16 * r * h,
                   Routed::dispatch),
            {sent}, {arrived});
    const BufferId hidden = b_.scratch("expert_gate_up", kBf16 * r * 2 * i, act_holds, layer);
    const BufferId act = b_.scratch("expert_swiglu", kBf16 * r * i, act_holds, layer);
    const BufferId d_act = b_.scratch("expert_swiglu_gradient", kBf16 * r * i, act_holds, layer);
    const BufferId d_rows = b_.buffer("expert_input_gradient", kBf16 * r * h, exchange, layer);
    std::vector<BufferId> weights{g.experts}, gradients{gradient};
    if (spilled != kNoBuffer) weights.push_back(spilled), gradients.push_back(spilled_gradient);
    const auto with_weights = [&](std::initializer_list<BufferId> buffers) {
      std::vector<BufferId> all(buffers);
      all.insert(all.end(), weights.begin(), weights.end());
      return all;
    };
    const auto grouped = [&](int64_t n, int64_t k) {
      return local(OpKind::grouped_gemm, part, {{r, n, k, e}}, Routed::compute);
    };
    b_.at(Phase::recompute, layer);
    b_.op(grouped(2 * i, h), with_weights({arrived}), std::array{hidden});
    b_.op(local(swiglu_, part, rows(r * i, 2 * kBf16, kBf16), Routed::compute), {hidden}, {act});
    b_.at(Phase::backward, layer);
    b_.op(grouped(i, h), with_weights({arrived}), std::array{d_act});
    b_.op(grouped(h, i), std::array{arrived, act},
          gradients);  // weight gradient of down: same work, rows contracted
    b_.op(local(swiglu_bwd_, part, rows(r * i, 4 * kBf16, 2 * kBf16), Routed::compute), {hidden, act, d_act},
          {hidden});
    b_.op(grouped(2 * i, h), std::array{arrived, hidden}, gradients);  // weight gradient of gate and up
    b_.op(grouped(h, 2 * i), with_weights({hidden}), std::array{d_rows});
    BufferId home = d_rows;
    if (expert_ != kNoGroup) {
      home = b_.buffer("combined", kBf16 * r * h, exchange, layer);
      b_.op(remote(OpKind::all_to_all, Stream::combine, part, combine_, kBf16 * r * h, kBf16 * r * h,
                   Routed::combine),
            {d_rows}, {home});
    }
    b_.op(local(OpKind::unpermute, part, rows(r * h, kBf16 + kFp32, kFp32), Routed::source), {home, rounds},
          {d_x, d_gates});
  }
  b_.end_repeat();
  if (spilled == kNoBuffer) return;
  const int64_t bytes = gradient_ * plan_.spill_slots * expert;
  const BufferId returned = transient("returned_gradients", bytes, Holds::spilled_experts, layer);
  b_.op(remote(OpKind::all_to_all, Stream::spill, part, spill_group_, bytes, bytes, Routed::spill),
        {spilled_gradient}, {returned});
  OpSpec add = local(OpKind::add, part, {{plan_.spill_slots * expert, 2 * bytes, bytes}}, Routed::spill);
  b_.op(add, {returned}, {gradient});
}

// ---- blocks ----

void MopLowering::forward_layer(int layer) {
  const auto l = static_cast<size_t>(layer);
  const int64_t h = c_.hidden;
  const bool moe = c_.moe[l];
  const Gathered g = gathered_[l];
  b_.at(Phase::forward, layer);
  Checkpoint& saved = checkpoints_[l];
  saved.input = x_;
  const Latents in = attention_inputs(layer, x_, g);
  if (plan_.save_attention && plan_.checkpoints == Place::host) {
    saved.attention = attention_ring_[l % 2];
    saved.lse = lse_ring_[l % 2];
  } else {
    const Holds holds = plan_.save_attention ? Holds::checkpoints : Holds::attention_activations;
    saved.attention = transient("attention_saved", kBf16 * n_ * c_.heads * c_.v_dim(), holds, layer);
    saved.lse = transient("attention_lse", kFp32 * n_ * c_.heads, holds, layer);
  }
  attention_forward(layer, in, g, saved.attention, saved.lse);
  BufferId mid = transient("block_middle", kBf16 * n_ * h, Holds::other_activations, layer);
  gemm(Component::attention, n_, h, c_.heads * c_.v_dim(), {saved.attention, g.dense}, {mid});
  const BufferId normed = transient("feed_forward_normed", kBf16 * n_ * h, Holds::other_activations, layer);
  b_.op(local(OpKind::rms_norm, Component::dense, rows(n_ * h, 2 * kBf16, 2 * kBf16)), {x_, g.dense},
        {mid, normed});

  const BufferId next = block_buffer(layer + 1);
  if (moe) {
    saved.gates = route(layer, normed, g);
    const BufferId y = transient("expert_sum", kFp32 * n_ * h, Holds::expert_activations, layer);
    if (c_.shared_intermediate > 0) {
      feed_forward(layer, Component::shared_experts, c_.shared_intermediate, normed, g, y);
    } else {
      b_.op(local(OpKind::scale, Component::experts, rows(n_ * h, 0, kFp32)), {}, {y});  // cleared
    }
    experts_forward(layer, normed, g, saved.gates, y);
    b_.op(local(OpKind::add, Component::dense, rows(n_ * h, kBf16 + kFp32, kBf16)), {mid, y}, {next});
  } else {
    const BufferId y = transient("feed_forward_output", kBf16 * n_ * h, Holds::other_activations, layer);
    feed_forward(layer, Component::dense, c_.dense_intermediate, normed, g, y);
    b_.op(local(OpKind::add, Component::dense, rows(n_ * h, 2 * kBf16, kBf16)), {mid, y}, {next});
  }
  x_ = next;
  if (plan_.checkpoints == Place::host) offload(layer);
}

std::vector<BufferId> MopLowering::checkpoint_parts(const Checkpoint& saved) const {
  std::vector<BufferId> parts{saved.input};
  if (plan_.save_attention) parts.push_back(saved.attention), parts.push_back(saved.lse);
  return parts;
}

void MopLowering::offload(int layer) {
  Checkpoint& saved = checkpoints_[static_cast<size_t>(layer)];
  const std::vector<BufferId> parts = checkpoint_parts(saved);
  int64_t bytes = 0;
  for (const BufferId part : parts) bytes += b_.at(part).bytes;
  saved.host = b_.buffer("offloaded_checkpoint", bytes, Holds::checkpoints, layer, Space::host);
  b_.op({OpKind::copy_d2h, Stream::d2h, Component::other, {{bytes}}}, parts, std::array{saved.host});
}

// Brings a layer's checkpoint back ahead of its backward.
void MopLowering::fetch(int layer) {
  Checkpoint& saved = checkpoints_[static_cast<size_t>(layer)];
  if (saved.host == kNoBuffer) return;
  b_.at(Phase::backward, layer);
  const int64_t bytes = b_.at(saved.host).bytes;
  const size_t turn = static_cast<size_t>(layer) % 2;
  saved.input = fetched_input_[turn];
  if (plan_.save_attention) saved.attention = fetched_attention_[turn], saved.lse = fetched_lse_[turn];
  b_.op({OpKind::copy_h2d, Stream::h2d, Component::other, {{bytes}}}, std::array{saved.host},
        checkpoint_parts(saved));
}

void MopLowering::backward_layer(int layer, bool last) {
  const auto l = static_cast<size_t>(layer);
  const int64_t h = c_.hidden, hv = c_.heads * c_.v_dim();
  const bool moe = c_.moe[l];
  const Gathered g = gathered_[l];
  const model::LayerParameters& p = in_.parameters.layers[l];
  Checkpoint& saved = checkpoints_[l];
  const Weights& w = layers_[l];
  const Part dense{p.dense(),        w.dense_shard, w.dense_gradient, dense_group_, replicas_,
                   Component::dense, layer};
  const Part experts{p.experts / layout_.expert.size,
                     w.expert_shard,
                     w.expert_gradient,
                     expert_shards_,
                     kNoGroup,
                     Component::experts,
                     layer};

  b_.at(Phase::recompute, layer);
  const Latents in = attention_inputs(layer, saved.input, g);
  if (!plan_.save_attention) {
    saved.attention = transient("attention_again", kBf16 * n_ * hv, Holds::attention_activations, layer);
    saved.lse = transient("attention_lse_again", kFp32 * n_ * c_.heads, Holds::attention_activations, layer);
    attention_forward(layer, in, g, saved.attention, saved.lse);
  }
  const BufferId mid = transient("block_middle", kBf16 * n_ * h, Holds::other_activations, layer);
  gemm(Component::attention, n_, h, hv, {saved.attention, g.dense}, {mid});
  const BufferId normed = transient("feed_forward_normed", kBf16 * n_ * h, Holds::other_activations, layer);
  b_.op(local(OpKind::rms_norm, Component::dense, rows(n_ * h, 2 * kBf16, 2 * kBf16)), {saved.input, g.dense},
        {mid, normed});

  b_.at(Phase::backward, layer);
  const BufferId dense_gradient =
      gradient_target("dense_gradient_whole", dense.parameters, dense.held, dense.scatter, layer);
  const BufferId d_normed =
      transient("feed_forward_normed_gradient", kFp32 * n_ * h, Holds::other_activations, layer);
  if (moe) {
    const BufferId expert_gradient =
        gradient_target("expert_gradient_whole", experts.parameters, experts.held, experts.scatter, layer);
    const BufferId d_gates =
        transient("gates_gradient", kFp32 * n_ * c_.top_k, Holds::other_activations, layer);
    if (c_.shared_intermediate > 0) {
      feed_forward_backward(layer, Component::shared_experts, c_.shared_intermediate, normed, g, dx_,
                            d_normed, dense_gradient);
    } else {
      b_.op(local(OpKind::scale, Component::experts, rows(n_ * h, 0, kFp32)), {}, {d_normed});  // cleared
    }
    experts_backward(layer, normed, g, saved.gates, dx_, d_normed, d_gates, expert_gradient);
    settle(experts, expert_gradient, last);
    b_.at(Phase::backward, layer);
    const BufferId d_logits =
        transient("router_logits_gradient", kBf16 * n_ * c_.experts, Holds::other_activations, layer);
    b_.op(local(OpKind::topk_bwd, Component::router, rows(n_ * c_.experts, kBf16, kBf16)),
          {d_gates, saved.gates}, {d_logits});
    gemm(Component::router, c_.hidden, c_.experts, n_, {normed, d_logits}, {dense_gradient});
    gemm(Component::router, n_, c_.hidden, c_.experts, {d_logits, g.dense}, {d_normed});
  } else {
    feed_forward_backward(layer, Component::dense, c_.dense_intermediate, normed, g, dx_, d_normed,
                          dense_gradient);
  }
  // d(middle) = d(output) + norm backward, into a buffer of its own.
  const BufferId d_mid = transient("block_middle_gradient", kBf16 * n_ * h, Holds::other_activations, layer);
  b_.op(local(OpKind::rms_norm_bwd, Component::dense, rows(n_ * h, kFp32 + 2 * kBf16, kBf16)),
        {d_normed, mid, dx_, g.dense}, {d_mid, dense_gradient});
  const BufferId d_attention_normed =
      transient("attention_normed_gradient", kBf16 * n_ * h, Holds::other_activations, layer);
  attention_backward(layer, in, g, saved.attention, saved.lse, d_mid, d_attention_normed, dense_gradient);
  const BufferId d_input = transient("block_input_gradient", kBf16 * n_ * h, Holds::other_activations, layer);
  b_.op(local(OpKind::rms_norm_bwd, Component::attention, rows(n_ * h, 3 * kBf16, kBf16)),
        {d_attention_normed, saved.input, d_mid, g.dense}, {d_input, dense_gradient});
  dx_ = d_input;
  settle(dense, dense_gradient, last);
  if (last && !plan_.clip) update(layers_[l], layer);
}

// ---- vocabulary ----

void MopLowering::vocabulary(bool last) {
  const int layer = static_cast<int>(c_.layers);
  const int64_t h = c_.hidden;
  const Component part = Component::vocabulary;
  b_.at(Phase::forward, layer);
  const BufferId normed = transient("final_normed", kBf16 * n_ * h, Holds::vocabulary_activations, layer);
  b_.op(local(OpKind::rms_norm, part, rows(n_ * h, kBf16, kBf16)), {x_, head_.dense}, {normed});
  const BufferId d_normed =
      transient("final_normed_gradient", kFp32 * n_ * h, Holds::vocabulary_activations, layer);
  const Part head{head_.dense_shard,
                  head_.dense_shard,
                  head_.dense_gradient,
                  kNoGroup,
                  vocabulary_replicas_,
                  part,
                  layer};
  const BufferId gradient = gradient_target("head_gradient", head.parameters, head.held, head.scatter, layer);
  if (plan_.vocabulary_scheme == plan::VocabularyScheme::tokens || vocabulary_ == kNoGroup)
    tokens_move(normed, d_normed, gradient);
  else
    weights_move(normed, d_normed, gradient);
  b_.at(Phase::backward, layer);
  dx_ = transient("block_output_gradient", kBf16 * n_ * h, Holds::other_activations, layer);
  b_.op(local(OpKind::rms_norm_bwd, part, rows(n_ * h, kFp32 + kBf16, kBf16)), {d_normed, x_, head_.dense},
        {dx_, gradient});
  settle(head, gradient, last);
  if (last && !plan_.clip) update(head_, layer);
}

// X-gather: tiles of everyone's tokens visit each rank's columns; forward and backward in one visit.
void MopLowering::tokens_move(BufferId x, BufferId d_x, BufferId gradient) {
  const Component part = Component::vocabulary;
  const int layer = static_cast<int>(c_.layers);
  const int64_t h = c_.hidden, p = layout_.vocabulary.size, columns = ceil_div(c_.vocab, p);
  const Holds holds = Holds::vocabulary_activations;
  // Two of each, in turn: the exchange of a tile waits for the work on the one before the last.
  const int64_t tile_bytes = kBf16 * p * std::min(plan_.vocabulary_tile, n_) * h;
  std::array<BufferId, 2> tiles{}, d_tiles{};
  for (int64_t i = 0; i < 2 && vocabulary_ != kNoGroup && i * plan_.vocabulary_tile < n_; ++i) {
    tiles[static_cast<size_t>(i)] = transient("vocabulary_tile", tile_bytes, holds, layer);
    d_tiles[static_cast<size_t>(i)] = transient("vocabulary_tile_gradient", tile_bytes, holds, layer);
  }
  const auto turn = [&](int64_t done) { return static_cast<size_t>(done / plan_.vocabulary_tile % 2); };
  const auto gather_tile = [&](int64_t done) {
    if (vocabulary_ == kNoGroup || done >= n_) return x;
    const int64_t m = p * std::min(plan_.vocabulary_tile, n_ - done);
    const BufferId tile = tiles[turn(done)];
    b_.at(Phase::forward, layer);
    b_.op(remote(OpKind::all_gather, Stream::gather, part, vocabulary_, kBf16 * m * h), {x}, {tile});
    return tile;
  };
  BufferId next = gather_tile(0);
  for (int64_t done = 0; done < n_; done += plan_.vocabulary_tile) {
    const int64_t t = std::min(plan_.vocabulary_tile, n_ - done), m = p * t;
    const BufferId tile = next;
    next = gather_tile(done + plan_.vocabulary_tile);
    b_.at(Phase::forward, layer);
    const BufferId logits = transient("logits", kBf16 * m * columns, holds, layer);
    gemm(part, m, columns, h, {tile, head_.dense}, {logits});
    BufferId statistics = transient("loss_statistics", 3 * kFp32 * m, holds, layer);  // max, sum, target
    b_.op(local(OpKind::cross_entropy, part, {{m * columns, kBf16 * m * columns, 3 * kFp32 * m}}), {logits},
          {statistics});
    if (vocabulary_ != kNoGroup) {
      const BufferId all = transient("loss_statistics_gathered", 3 * kFp32 * m * p, holds, layer);
      b_.op(remote(OpKind::all_gather, Stream::sequence, part, statistics_, 3 * kFp32 * m * p), {statistics},
            {all});
      statistics = all;
    }
    b_.at(Phase::backward, layer);
    b_.op(local(OpKind::cross_entropy_bwd, part, rows(m * columns, kBf16, kBf16)), {statistics, logits},
          {logits});
    gemm(part, columns, h, m, {logits, tile}, {gradient});
    if (vocabulary_ != kNoGroup) {
      const BufferId d_tile = d_tiles[turn(done)];
      gemm(part, m, h, columns, {logits, head_.dense}, {d_tile});
      b_.op(remote(OpKind::reduce_scatter, Stream::gather, part, vocabulary_, kBf16 * m * h), {d_tile},
            {d_x});
    } else {
      gemm(part, m, h, columns, {logits, head_.dense}, {d_x});
    }
  }
}

// V-ring: blocks of columns visit every rank; first for the statistics, then for the gradients, whose blocks
// ride along.
void MopLowering::weights_move(BufferId x, BufferId d_x, BufferId gradient) {
  const Component part = Component::vocabulary;
  const int layer = static_cast<int>(c_.layers);
  const int64_t h = c_.hidden, p = layout_.vocabulary.size, columns = ceil_div(c_.vocab, p);
  const int64_t block = kBf16 * columns * h, tile = std::min(n_, plan_.vocabulary_tile * p);
  const Holds holds = Holds::vocabulary_activations;
  const BufferId statistics = transient("loss_statistics", 3 * kFp32 * n_, holds, layer);
  // Two blocks of weights, and two of gradients, in turn.
  std::array<BufferId, 2> blocks{}, gradient_blocks{};
  for (BufferId& slot : blocks) slot = transient("vocabulary_block", block, holds, layer);
  for (BufferId& slot : gradient_blocks)
    slot = transient("vocabulary_block_gradient", gradient_ * columns * h, holds, layer);
  const auto ring = [&](BufferId from, BufferId next, int64_t bytes) {
    b_.op(remote(OpKind::send_recv, Stream::gather, part, vocabulary_, bytes, bytes), {from}, {next});
    return next;
  };
  BufferId weights = head_.dense;
  b_.at(Phase::forward, layer);
  for (int64_t step = 0; step < p; ++step) {
    const BufferId now = weights;
    if (step + 1 < p) weights = ring(weights, blocks[static_cast<size_t>(step % 2)], block);
    for (int64_t done = 0; done < n_; done += tile) {
      const int64_t t = std::min(tile, n_ - done);
      const BufferId logits = transient("logits", kBf16 * t * columns, holds, layer);
      gemm(part, t, columns, h, {x, now}, {logits});
      b_.op(local(OpKind::cross_entropy, part, {{t * columns, kBf16 * t * columns, 3 * kFp32 * t}}), {logits},
            {statistics});
    }
  }
  weights = head_.dense;
  b_.at(Phase::backward, layer);
  BufferId riding = kNoBuffer;  // gradient of the block that is here
  for (int64_t step = 0; step < p; ++step) {
    const BufferId now = weights;
    const BufferId block_gradient = step == 0 ? gradient_blocks[1] : riding;
    if (step + 1 < p) weights = ring(weights, blocks[static_cast<size_t>(step % 2)], block);
    for (int64_t done = 0; done < n_; done += tile) {
      const int64_t t = std::min(tile, n_ - done);
      const BufferId logits = transient("logits", kBf16 * t * columns, holds, layer);
      gemm(part, t, columns, h, {x, now}, {logits});
      b_.op(local(OpKind::cross_entropy_bwd, part, rows(t * columns, kBf16, kBf16)), {statistics, logits},
            {logits});
      gemm(part, columns, h, t, {logits, x}, {block_gradient});
      gemm(part, t, h, columns, {logits, now}, {d_x});
    }
    if (step + 1 < p) {
      riding = ring(block_gradient, gradient_blocks[static_cast<size_t>(step % 2)], gradient_ * columns * h);
    } else {
      // One more hop brings every block home.
      b_.op(remote(OpKind::send_recv, Stream::gather, part, vocabulary_, gradient_ * columns * h,
                   gradient_ * columns * h),
            {block_gradient}, {gradient});
    }
  }
}

// ---- the step ----

StepProgram MopLowering::run() {
  n_ = tokens_per_rank(layout_, in_.workload);
  s_ = in_.workload.sequences * in_.workload.context;
  gradient_ = plan_.reduce == plan::Reduce::fp32 ? kFp32 : kBf16;
  if (c_.activation == model::Activation::clamped_swiglu)
    swiglu_ = OpKind::clamped_swiglu, swiglu_bwd_ = OpKind::clamped_swiglu_bwd;
  make_groups();
  make_weights();
  checkpoints_.resize(static_cast<size_t>(c_.layers));
  gathered_.resize(static_cast<size_t>(c_.layers));

  const int layers = static_cast<int>(c_.layers);
  for (int64_t micro = 0; micro < in_.workload.accumulate; ++micro) {
    const bool first = micro == 0, last = micro + 1 == in_.workload.accumulate;
    // The update of the step before, layer by layer, a layer ahead of the weights' use.
    const auto prepare = [&](int layer) {
      if (first && plan_.clip) update(layers_[static_cast<size_t>(layer)], layer);
      b_.at(Phase::forward, layer);
      gathered_[static_cast<size_t>(layer)] = gather(layer);
    };
    if (first && plan_.clip) update(embedding_, -1);
    embed_forward();
    prepare(0);
    for (int l = 0; l < layers; ++l) {
      if (l + 1 < layers) prepare(l + 1);
      if (l + 1 == layers && first && plan_.clip) update(head_, layers);
      forward_layer(l);
    }
    vocabulary(last);
    const auto prepare_backward = [&](int layer) {
      b_.at(Phase::backward, layer);
      // The last two layers' weights are still in the slots.
      if (layer < layers - 2) gathered_[static_cast<size_t>(layer)] = gather(layer);
      fetch(layer);
    };
    prepare_backward(layers - 1);
    for (int l = layers - 1; l >= 0; --l) {
      if (l > 0) prepare_backward(l - 1);
      backward_layer(l, last);
    }
    embed_backward(last);
  }
  if (plan_.clip) {
    b_.at(Phase::optimizer, -1);
    if (world_ != kNoGroup)
      b_.op(remote(OpKind::all_reduce, Stream::gather, Component::optimizer, world_, 256), {norm_}, {clip_});
    else
      b_.op(local(OpKind::scale, Component::optimizer, {{1, kFp32, kFp32}}), {norm_}, {clip_});
  }
  StepProgram program = b_.finish();
  program.round_rows = round_rows();
  program.spill_slots = plan_.spill_slots;
  return program;
}

}  // namespace

StepProgram lower_mop(const LoweringInput& input) {
  return MopLowering(input).run();
}

}  // namespace mop::program
