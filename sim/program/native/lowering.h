// The programs that our executor runs: Mixture-of-Parallelisms (arXiv 2607.01844; design notes in mop.md),
// and FSDP2's sharding with the same kernels (fsdp2 plans with runtime=native). One class in several files, a
// file a part of the model:
//   weights.cpp     persistent buffers, gathers, gradient reduction, the optimizer
//   attention.cpp   Ulysses over D
//   feed_forward.cpp, experts.cpp   the dense and shared feed-forwards; router, streaming rounds,
//   least-loaded plan embedding.cpp, vocabulary.cpp   the two ends step.cpp        the order of it all
//
// Order of one step: for every micro-batch forward layers (mop with clipping: each preceded by its deferred
// update on the first one, the CPU's two ahead), the vocabulary projection forward and backward together,
// backward layers; then the gradient norm, and fsdp2's update.
#pragma once
#include <array>
#include <set>
#include <vector>

#include "sim/program/lower.h"
#include "sim/program/native/views.h"
#include "sim/program/parameters.h"

namespace mop::program {

class NativeLowering {
 public:
  explicit NativeLowering(const LoweringInput& input);
  StepProgram run();

 private:
  // One flat group's persistent buffers.
  struct Part {
    FlatGroup flat;
    Component component = Component::other;
    int64_t parameters = 0;  // that a rank works with, padding included: shard x ranks of `scatter`
    int64_t used = 0;        // of them not padding
    int64_t shard = 0;
    BufferId weights = kNoBuffer, gradient = kNoBuffer;
    uint16_t scatter = kNoGroup, replicas = kNoGroup;
    int64_t replica_count = 1;
    bool exists() const { return weights != kNoBuffer; }
  };
  // What is updated together: a layer's two parts, or one of the ends.
  struct Weights {
    int layer = -1;
    Part dense, experts;
    BufferId correction = kNoBuffer;
    std::vector<BufferId> states;  // one a bucket
    BufferId staged = kNoBuffer;   // where its states wait in HBM for the clip factor
    bool on_host = false;
    Master master = Master::states;
    int64_t bucket = 0, buckets = 1;  // states: blocks of this many elements
    int64_t elements() const { return dense.shard + experts.shard; }
  };
  struct Gathered {
    int layer = -1;
    BufferId dense = kNoBuffer, experts = kNoBuffer, correction = kNoBuffer;
  };

  // ---- operations
  Shape traffic(int64_t elements, double read, double written) const {
    return {{elements, static_cast<int64_t>(static_cast<double>(elements) * read),
             static_cast<int64_t>(static_cast<double>(elements) * written)}};
  }
  // norm: how many columns it takes at a time, 0: there is none. reads: how many matrices are read.
  Shape rope_shape(int64_t elements, int64_t norm, int64_t reads = 1) const {
    return {{elements, reads * es_ * elements, es_ * elements, norm}};
  }
  static OpSpec local(OpKind kind, Component component, Shape shape, Does does = {},
                      uint16_t group = kNoGroup) {
    OpSpec spec{kind, Stream::compute, component, shape, group};
    spec.does = does;
    return spec;
  }
  static OpSpec remote(OpKind kind, Stream stream, Component component, uint16_t group, int64_t sent,
                       int64_t received = 0, Does does = {}) {
    OpSpec spec{kind, stream, component, {{sent, received}}, group};
    spec.does = does;
    return spec;
  }
  static OpSpec routed(OpSpec spec, Routed what) {
    spec.routed = what;
    return spec;
  }
  static Does exchanging(Exchange exchange) {
    Does does;
    does.exchange = exchange;
    return does;
  }
  // C = op(A) op(B) (+ bias); m, n, k from the views.
  void gemm(Component component, const Operand& a, bool transpose_a, const Operand& b, bool transpose_b,
            const Operand& c, bool accumulate = false, Operand bias = {}, uint16_t group = kNoGroup);
  // Y = X W^T + bias: W (out, in) of a layer's gathered dense weights.
  void linear(Component component, const Operand& x, const Operand& w, const Operand& y, Operand bias = {});
  void clear(Component component, const Operand& what);
  void column_sum(Component component, const Operand& x, const Operand& sum);

  // Whether this part of a gradient has been written before in the step: then the next one adds to it.
  bool again(const Operand& gradient) {
    return !written_.insert({gradient.buffer, gradient.view.offset}).second;
  }

  Operand weight(const Gathered& g, model::Role role, int64_t rows, int64_t cols, int64_t skip = 0) const {
    return matrix(g.dense, ct_, rows, cols, params_.offset({FlatPart::dense, g.layer}, role) + skip);
  }
  Operand bias(const Gathered& g, bool has, model::Role role, int64_t n, int64_t skip = 0) const {
    return has ? weight(g, role, 1, n, skip) : Operand{};
  }
  Operand gradient(BufferId whole, int layer, model::Role role, int64_t rows, int64_t cols,
                   int64_t skip = 0) const {
    return matrix(whole, gt_, rows, cols, params_.offset({FlatPart::dense, layer}, role) + skip);
  }
  BufferId transient(const char* label, int64_t bytes, Holds holds, int layer) {
    return b_.buffer(label, bytes, holds, layer);
  }
  bool on_host(BufferId buffer) const { return b_.at(buffer).space == Space::host; }
  // A ring of buffers that outlive the streams using them: writing one again waits for whoever still reads
  // it.
  template <size_t K>
  void make_ring(std::array<BufferId, K>& ring, const char* label, int64_t bytes, Holds holds,
                 Space space = Space::hbm) {
    for (BufferId& slot : ring) slot = b_.persistent(label, bytes, holds, -1, space);
  }

  // ---- weights.cpp
  void make_groups();
  void make_weights();
  Part make_part(FlatGroup flat, Component component, int64_t parameters, int64_t used,
                 const plan::Span& shards, uint16_t scatter, uint16_t replicas, int64_t replica_count,
                 Space weights, Space gradients);
  void make_states(Weights& w);
  void register_shard(const Weights& w, const Part& part, int64_t first, const plan::Span& outer,
                      int64_t outer_elements, const plan::Span& inner);
  bool states_on_host(int layer) const;
  // Gradients wait in HBM until they are complete, or go to the host as they are reduced.
  bool held_in_hbm() const { return !plan_.clip || in_.workload.accumulate > 1; }
  // Updates come under the next step's forward: they wait for the clip factor, or their states are on their
  // way all the time. Else in backward, or after it under fsdp2.
  bool deferred() const { return !fsdp_ && (plan_.clip || plan_.optimizer == plan::Optimizer::stream); }
  // Stream: all states that are on the host come up ahead, those of the ends, too.
  bool all_staged() const {
    return plan_.optimizer_staged_layers > 0 &&
           plan_.optimizer_hbm_layers + plan_.optimizer_staged_layers >= c_.layers;
  }
  bool updates_in_backward() const { return !fsdp_ && !deferred(); }
  Gathered gather(int layer);
  BufferId gather_part(const Part& part, BufferId slot, const char* label);
  BufferId gradient_target(const char* label, const Part& part, int layer);
  void settle(const Part& part, BufferId whole, bool last);
  void stage(const Weights& w);
  void update(const Weights& w);
  std::vector<const Weights*> updated_by_cpu() const;
  // Of one block, in a buffer that holds it: its home, where it is staged, a place of the ring.
  Operand states_in(BufferId buffer, const Weights& w) const {
    return matrix(buffer, Type::f32, 1, state_bytes(w.master) * w.bucket / kFp32);
  }
  std::vector<Operand> segments(const Weights& w, int64_t first, int64_t count, bool gradients,
                                BufferId in) const;

  // ---- embedding.cpp, vocabulary.cpp
  void embed_forward(int64_t micro);
  void embed_backward(int64_t micro, bool last);
  void vocabulary(int64_t micro, bool last);
  void tokens_move(BufferId x, BufferId d_x, const Operand& w, const Operand& dw, int64_t micro);
  void weights_move(BufferId x, BufferId d_x, const Operand& w, const Operand& dw, int64_t micro);

  struct Latents {
    BufferId normed = kNoBuffer;
    BufferId q_raw = kNoBuffer, q = kNoBuffer;    // (N, q_lora) before and after its norm
    BufferId kv_raw = kNoBuffer, kv = kNoBuffer;  // (N, kv_lora + rope); kv: normed and rotated
    BufferId kv_all = kNoBuffer;                  // of the whole sequence, where latents are exchanged
  };
  struct HeadChunk {
    Operand q_raw, q;       // (N, heads x qk) of this rank's tokens: before and after norm and rotation
    Operand k_raw, v_own;   // likewise; values have neither
    Operand queries, k, v;  // what attention reads: (S, heads x qk), (S, kv heads x qk), (S, kv heads x v)
  };
  // A tile of a gated feed-forward, before and after the activation.
  struct GatedTile {
    Operand hidden, act;
  };
  struct RoundsPlan {
    Operand order, rounds;
    OpId op = kNoOp;
  };
  // Of what a block computes in forward for its backward. products: what they wrote (not the router's, nor
  // those of MLA's heads, which are wide and cheap); norms, rotations and activations are computed again.
  enum class Keeps : uint8_t { nothing, products, all };
  // What is kept of a block between its forward and its backward: its input, the attention output, the gates
  // and where the rows go, and what keeps() says.
  struct Checkpoint {
    BufferId input = kNoBuffer, attention = kNoBuffer, lse = kNoBuffer, gates = kNoBuffer;  // live in HBM
    BufferId host = kNoBuffer;
    BufferId middle = kNoBuffer, normed = kNoBuffer, logits = kNoBuffer;
    Latents latents{};
    std::vector<HeadChunk> heads{};
    std::vector<GatedTile> tiles{};
    GatedTile experts{};
    RoundsPlan rounds{};
  };

  // ---- attention.cpp
  // kept: what forward projected, where it is not to be done again.
  Latents attention_inputs(int layer, BufferId x, const Gathered& g, const Latents* kept = nullptr);
  HeadChunk project_chunk(int layer, int64_t chunk, const Latents& in, const Gathered& g,
                          const HeadChunk& earlier, const HeadChunk* kept = nullptr);
  void project_keys_values(int layer, int64_t chunk, const Latents& in, const Gathered& g, HeadChunk& out,
                           Operand& k, Operand& v);
  // Returns all chunks.
  std::vector<HeadChunk> attention_forward(int layer, const Latents& in, const Gathered& g, BufferId out,
                                           BufferId lse);
  void attention_backward(int layer, const Checkpoint& saved, const Latents& in, const Gathered& g,
                          BufferId d_out, BufferId d_normed, BufferId dw);
  void latent_backward(int layer, const Latents& in, const Gathered& g, BufferId d_q_latent,
                       BufferId d_kv_latent, BufferId d_normed, BufferId dw);
  AttentionShape attention_shape(int layer) const;
  bool mla() const { return c_.attention == model::Attention::mla; }
  // That the norm of queries or keys takes at a time; 0 without one.
  int64_t norm_columns(model::Role norm) const {
    if (c_.qk_norm == model::QkNorm::none) return 0;
    if (c_.qk_norm == model::QkNorm::per_head) return c_.qk_dim();
    return (norm == model::Role::q_norm ? c_.heads : c_.kv_heads) * c_.qk_dim();
  }
  bool latent() const { return mla() && plan_.mla_exchange == plan::MlaExchange::latent && !fsdp_; }
  bool kept_raw() const { return c_.qk_norm != model::QkNorm::none; }
  Operand own_keys(Operand keys, int64_t chunk, int64_t width) const;

  // ---- feed_forward.cpp, experts.cpp
  struct GatedRoles {
    model::Role gate, down;
  };
  void feed_forward(int layer, Component part, GatedRoles roles, int64_t width, BufferId x, const Gathered& g,
                    const Operand& out, Checkpoint& saved);
  void feed_forward_backward(int layer, Component part, GatedRoles roles, int64_t width, BufferId x,
                             const Gathered& g, BufferId d_out, const Operand& d_x, BufferId dw,
                             const Checkpoint& saved);
  struct Gates {
    Operand ids, weights;
  };
  Gates gates(BufferId saved) const;
  int64_t rounds_offset() const;  // in the same buffer, of i32 elements
  int64_t rounds_bytes() const;
  BufferId router_logits(int layer, BufferId x, const Gathered& g);
  void route(int layer, BufferId x, const Gathered& g, Checkpoint& saved);
  void router_backward(int layer, BufferId x, const Gathered& g, const Checkpoint& saved, BufferId d_gates,
                       BufferId d_x, BufferId dw);
  RoundsPlan plan_rounds(int layer, BufferId saved);
  struct ExpertWeights {
    Operand own, spilled;
  };
  ExpertWeights expert_weights(BufferId own, BufferId spilled, Type type, model::Role role, int64_t rows,
                               int64_t cols) const;
  BufferId spill_slots(int layer);
  void borrow(BufferId slots, const RoundsPlan& plan, const Gathered& g);
  int64_t round_rows() const;
  // Tokens that a source's rows of a round come from, for each of them. A round takes the next rows of every
  // flow (sim/plan/rounds.h): the copies of a token move in one round, where it is read, and its sum read and
  // written, once. Copies for an expert that least-loaded planning has split, or of a later pass, may not:
  // that is left out.
  double tokens_per_row() const { return 1 / static_cast<double>(c_.top_k); }
  // Without expert parallelism all rows of a rank can be one round, which can be kept.
  Keeps keeps_experts(int layer) const {
    return expert_ == kNoGroup && round_rows() == n_ * c_.top_k ? keeps(layer) : Keeps::nothing;
  }
  void experts_forward(int layer, BufferId x, const Gathered& g, BufferId y, Checkpoint& saved);
  void experts_backward(int layer, BufferId x, const Gathered& g, const Checkpoint& saved, BufferId d_y,
                        BufferId d_x, BufferId d_gates, BufferId dw);

  // ---- step.cpp
  Keeps keeps(int layer) const;
  void load_batches();
  BufferId block_buffer(int layer);
  void forward_layer(int layer);
  bool ahead() const { return !fsdp_ || plan_.prefetch; }  // weights are gathered a layer before their use
  bool gathers_again(int layer) const;
  void gather_again(int layer);
  void backward_layer(int layer, bool last);
  std::vector<Operand> checkpoint_parts(const Checkpoint& saved) const;
  void offload(int layer);
  void fetch(int layer);
  void finish_step();
  Operand ids(int64_t micro) const { return matrix(batches_[static_cast<size_t>(micro)], Type::i32, 1, n_); }
  Operand targets(int64_t micro) const {
    return matrix(batches_[static_cast<size_t>(micro)], Type::i32, 1, n_, n_);
  }
  Operand positions() const { return matrix(batch_, Type::i32, 1, n_, 2 * n_); }
  Operand starts() const { return matrix(batch_, Type::i32, 1, t_, 3 * n_); }
  Operand sum(int64_t index) const { return matrix(sums_, Type::f64, 1, 1, index); }

  const LoweringInput& in_;
  const model::ModelConfig& c_;
  const plan::Plan& plan_;
  const plan::Layout& layout_;
  const bool fsdp_;
  const ParameterLayout params_;
  const HeadChunks chunks_;
  Builder b_;
  std::vector<Shard> shards_;
  std::set<std::pair<BufferId, int64_t>> written_;

  Type ct_ = Type::bf16, gt_ = Type::bf16;  // compute type; type of gradients before they are reduced
  Type wt_ = Type::bf16, ht_ = Type::bf16;  // of weight shards; of gradients as the update reads them
  int64_t es_ = 2, gs_ = 2;                 // their bytes: compute, unreduced gradient
  int64_t n_ = 0;                           // tokens a rank (N)
  int64_t t_ = 0;                           // tokens of its sequences (D x N)
  bool save_attention_ = true;
  OpKind swiglu_ = OpKind::swiglu, swiglu_bwd_ = OpKind::swiglu_bwd;
  uint16_t dense_group_ = kNoGroup, replicas_ = kNoGroup, sequence_ = kNoGroup, expert_ = kNoGroup,
           combine_ = kNoGroup, spill_group_ = kNoGroup, expert_shards_ = kNoGroup, vocabulary_ = kNoGroup,
           vocabulary_replicas_ = kNoGroup, world_ = kNoGroup, embedding_group_ = kNoGroup,
           statistics_ = kNoGroup;
  std::vector<Weights> layers_;
  Weights embedding_, head_;  // fsdp2: head_ is the root group
  std::array<BufferId, 2> dense_slot_{kNoBuffer, kNoBuffer}, expert_slot_{kNoBuffer, kNoBuffer};
  BufferId root_ = kNoBuffer, root_gradient_ = kNoBuffer;  // fsdp2: gathered root group
  BufferId clip_ = kNoBuffer, sums_ = kNoBuffer, valid_ = kNoBuffer, load_ = kNoBuffer;
  std::vector<BufferId> batches_;
  BufferId batch_ = kNoBuffer;  // of the current micro-batch
  BufferId all_ids_ = kNoBuffer;
  BufferId x_ = kNoBuffer, dx_ = kNoBuffer;
  BufferId last_dense_gradient_ = kNoBuffer;  // mop: of the last layer, which has the final norm
  std::vector<Checkpoint> checkpoints_;
  std::vector<Gathered> gathered_;
  // Rings of what crosses between the compute stream and the copy streams.
  std::array<BufferId, 3> input_ring_{}, bucket_ring_{};
  std::array<BufferId, 2> attention_ring_{}, lse_ring_{}, fetched_input_{}, fetched_attention_{},
      fetched_lse_{}, reduced_ring_{}, download_ring_{}, fresh_ring_{}, uploaded_ring_{};
  size_t next_bucket_ = 0, next_reduced_ = 0, next_update_ = 0, next_upload_ = 0;
};

}  // namespace mop::program
