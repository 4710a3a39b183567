// PyTorch FSDP2 (2.11) as it runs, buffer by buffer and kernel by kernel: fp32 shards, one group a block and
// one root group (embedding, final norm, untied head), bf16 all-gather into a flat buffer and copy-out, the
// next group prefetched, reshard after forward, bf16 or fp32 reduce-scatter, CPU offload; and TorchTitan's
// expert, context and tensor parallelism. Facts: design notes gpu.md, "What PyTorch FSDP2 does";
// torch.distributed.fsdp's _fsdp_param_group.py (order of waits and of frees).
#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/integer.h"
#include "sim/program/builder.h"
#include "sim/program/lower.h"

namespace mop::program {
namespace {

using plan::Recompute;
using plan::Runtime;

// Kernels that eager PyTorch launches for one layer operation, counted in profiles of
// tests/peers/fsdp2_pytorch.py (reports/measurements/h200x4/fsdp2_profiles.json). A compiled block fuses the
// element-wise ones.
namespace eager {
constexpr int kRmsNorm =
    8;  // to fp32, square, mean, add eps, rsqrt, multiply, to bf16, multiply by the weight
constexpr int kRmsNormBackward = 16;
constexpr int kRope = 10;  // q and k: two multiplies, negate, concatenate, add
constexpr int kRopeBackward = 12;
constexpr int kRouter = 7;  // to fp32, softmax, top-k (2), renormalise, to bf16
constexpr int kRouterBackward = 8;
constexpr int kSort = 29;  // radix sort of the ids, histogram, offsets
constexpr int kGateMultiply = 2;
constexpr int kGateMultiplyBackward = 4;
constexpr int kIndexAdd = 2;  // clear, add
constexpr int kSwiglu = 2;
constexpr int kSwigluBackward = 4;
constexpr int kClampedSwiglu = 7, kClampedSwigluBackward = 18, kExpertBias = 2, kExpertBiasBackward = 3;
constexpr int kGroupedGemm = 2;  // prepare the problem list, multiply
constexpr int kAttention = 2, kAttentionBackward = 5;
constexpr int kCrossEntropy = 4, kCrossEntropyBackward = 5;
constexpr int kEmbeddingBackward = 10;
constexpr int kShardCopyIn = 12, kCopyOut = 2, kChunkCat = 2;
constexpr int kAdam = 2, kNorm = 4, kScale = 4;
}  // namespace eager

class PytorchLowering {
 public:
  explicit PytorchLowering(const LoweringInput& input)
      : in_(input), c_(input.model), plan_(input.plan), layout_(input.layout) {}
  StepProgram run();

 private:
  // One FSDP parameter group: a block, or the root.
  struct Group {
    int layer;
    int64_t dense = 0, experts = 0;  // parameters of this rank's tp or ep part before FSDP sharding
    int64_t dense_shard = 0, expert_shard = 0;
    BufferId shard = kNoBuffer;      // fp32 parameters: HBM, or the host when offloaded
    BufferId gradient = kNoBuffer;   // fp32 sharded gradients; made when first reduced
    BufferId gathered = kNoBuffer;   // flat all-gather output
    BufferId unsharded = kNoBuffer;  // bf16 parameters that kernels read
    BufferId unsharded_gradient = kNoBuffer;
    int64_t parameters() const { return dense + experts; }
    int64_t shards() const { return dense_shard + expert_shard; }
  };
  // What autograd keeps of a block between its forward (or recompute) and its backward.
  struct Saved {
    BufferId norm1 = kNoBuffer, normed1 = kNoBuffer, latents = kNoBuffer, qk_norm = kNoBuffer,
             qkv = kNoBuffer, attention = kNoBuffer, lse = kNoBuffer, gathered_kv = kNoBuffer,
             norm2 = kNoBuffer, normed2 = kNoBuffer, router = kNoBuffer, permuted = kNoBuffer,
             gate_up = kNoBuffer, act = kNoBuffer, down = kNoBuffer, weighted = kNoBuffer,
             shared_gate_up = kNoBuffer, shared_act = kNoBuffer;
  };

  BufferId buffer(const char* label, int64_t bytes, Holds holds) {
    return b_.buffer(label, bytes, holds, layer_);
  }
  BufferId event() { return b_.buffer("event", 0, Holds::other_activations, layer_); }
  void at(Phase phase, int layer) {
    phase_ = phase;
    layer_ = layer;
    b_.at(phase, layer);
  }

  // A memory-bound operation over `elements` and the bytes an element that one fused kernel moves. Inside a
  // compiled block it is that kernel, unless PyTorch has it as an operation of its own (`always_eager`).
  struct Traffic {
    double read, written;
  };
  void kernel(OpKind kind, Component part, int64_t elements, Traffic t, int kernels,
              std::initializer_list<Operand> reads, std::initializer_list<Operand> writes,
              bool always_eager = false) {
    const bool fused = compiled() && layer_ >= 0 && layer_ < c_.layers && !always_eager;
    const double n = static_cast<double>(elements);
    OpSpec spec{kind,
                Stream::compute,
                part,
                {{elements, static_cast<int64_t>(n * t.read), static_cast<int64_t>(n * t.written)}}};
    spec.kernels = static_cast<uint16_t>(fused ? 1 : kernels);
    spec.eager = !fused;
    b_.op(spec, reads, writes);
  }
  // A name for what autograd keeps: the buffer moves on without work.
  void alias(BufferId from, BufferId to) {
    OpSpec spec{OpKind::copy, Stream::compute, Component::other, {}};
    spec.kernels = 0;
    b_.op(spec, {from}, {to});
  }
  void gemm(Component part, int64_t m, int64_t n, int64_t k, std::initializer_list<Operand> reads,
            std::initializer_list<Operand> writes) {
    b_.op({OpKind::gemm, Stream::compute, part, {{m, n, k}}}, reads, writes);
  }
  void grouped(int64_t rows, int64_t n, int64_t k, int64_t experts, std::initializer_list<Operand> reads,
               std::initializer_list<Operand> writes) {
    OpSpec spec{OpKind::grouped_gemm, Stream::compute, Component::experts, {{rows, n, k, experts}}};
    spec.kernels = eager::kGroupedGemm;
    b_.op(spec, reads, writes);
  }
  void collective(OpKind kind, Stream stream, Component part, uint16_t group, int64_t bytes,
                  std::initializer_list<Operand> reads, std::initializer_list<Operand> writes,
                  int64_t received = 0) {
    b_.op({kind, stream, part, {{bytes, received}}, group}, reads, writes);
  }

  void make_groups();
  Group make_group(int layer, int64_t dense, int64_t experts);
  void unshard(Group& g);       // all-gather, ahead of use
  void wait_unshard(Group& g);  // copy-out, when needed
  void reshard(Group& g);
  void reduce_gradients(Group& g);

  void embed_forward();
  void embed_backward();
  Saved block_forward(int layer, BufferId x, BufferId out);
  void block_backward(int layer, BufferId x, const Saved& s, BufferId d_out, BufferId d_in);
  void attention_forward(int layer, Saved& s, const Group& g, BufferId mid);
  void attention_backward(int layer, const Saved& s, const Group& g, BufferId d_mid, BufferId d_normed);
  void attend(OpKind kind, int layer, std::initializer_list<Operand> reads,
              std::initializer_list<Operand> writes, BufferId kv);
  // Expert parallelism splits tokens over tp and experts over ep; without it tp splits each expert.
  struct RoutedWork {
    bool parallel;
    int64_t tokens, sent, rows, intermediate, experts;  // of this rank; rows: that it computes
  };
  RoutedWork routed_work(int layer) const {
    const bool parallel = expert_ != kNoGroup;
    const int64_t tokens = parallel ? n_ : t_, sent = tokens * c_.top_k;
    return {parallel,
            tokens,
            sent,
            parallel ? in_.loads[static_cast<size_t>(layer)].computed : sent,
            c_.expert_intermediate / (parallel ? 1 : plan_.tensor),
            c_.experts / layout_.expert.size};
  }
  void moe_forward(int layer, Saved& s, const Group& g, BufferId normed, BufferId y);
  void moe_backward(int layer, const Saved& s, const Group& g, BufferId d_y, BufferId d_normed);
  void head_and_loss();
  void optimizer();

  int64_t heads() const { return c_.heads / plan_.tensor; }
  int64_t kv_heads() const {
    return c_.attention == model::Attention::mla ? heads() : c_.kv_heads / plan_.tensor;
  }
  int64_t q_width() const { return heads() * c_.qk_dim(); }
  int64_t kv_width() const { return kv_heads() * (c_.qk_dim() + c_.v_dim()); }
  // Recompute ends with the last tensor that backward needs, before the index-add; a compiled block runs
  // through.
  bool recompute_ends_early() const {
    return phase_ == Phase::recompute && !compiled() && c_.shared_intermediate == 0;
  }
  bool clamped() const { return c_.activation == model::Activation::clamped_swiglu; }
  bool compiled() const { return plan_.runtime == Runtime::compiled; }

  const LoweringInput& in_;
  const model::ModelConfig& c_;
  const plan::Plan& plan_;
  const plan::Layout& layout_;
  Builder b_;

  int64_t t_ = 0;  // tokens that the attention of a tensor-parallel group works on
  int64_t n_ = 0;  // tokens of the rank's residual stream: t / tp
  uint16_t shard_ = kNoGroup, replicas_ = kNoGroup, tensor_ = kNoGroup, context_ = kNoGroup,
           expert_ = kNoGroup, expert_shards_ = kNoGroup, world_ = kNoGroup;
  std::vector<Group> blocks_;
  Group root_;
  std::vector<BufferId> inputs_;  // (L + 1) block inputs: what checkpointing keeps
  std::vector<Saved> saved_;      // without checkpointing
  BufferId states_ = kNoBuffer, norm_ = kNoBuffer;
  BufferId d_x_ = kNoBuffer, embedding_gradient_ = kNoBuffer;
  BufferId held_gather_ =
      kNoBuffer;  // forward: the previous group's all-gather output, freed at the next copy-out
  BufferId copied_out_ = kNoBuffer;  // event: the copy-out that the next all-gather waits for
  BufferId copied_in_ = kNoBuffer;   // event: the last cast of a shard into an all-gather output
  BufferId copying_out_ =
      kNoBuffer;  // event: the last copy-out, for the all-gather after the next in forward
  BufferId held_reduce_ = kNoBuffer;  // reduce-scatter input kept until the next group's
  BufferId reduced_ = kNoBuffer;      // event: that reduce-scatter is done
  BufferId downloaded_ = kNoBuffer;   // event: its gradients are on the host
  bool forward_pass_ = true;
  Phase phase_ = Phase::forward;
  int layer_ = -1;
};

void PytorchLowering::make_groups() {
  const auto group = [&](Axis axis, const plan::Span& span) {
    return span.size > 1 ? b_.group(axis, span.size, span.stride) : kNoGroup;
  };
  shard_ = group(Axis::shard, layout_.dense);
  replicas_ = group(Axis::replicate, layout_.dense_replicas);
  tensor_ = group(Axis::tensor, layout_.tensor);
  context_ = group(Axis::context, layout_.context);
  if (plan_.expert > 1) {
    expert_ = group(Axis::expert, layout_.expert);
    expert_shards_ = group(Axis::expert_shard, layout_.expert_shard);
  } else {
    expert_shards_ = shard_;
  }
  world_ = group(Axis::world, {layout_.ranks, 1});
}

PytorchLowering::Group PytorchLowering::make_group(int layer, int64_t dense, int64_t experts) {
  Group g;
  g.layer = layer;
  g.dense = ceil_div(dense, plan_.tensor);  // norms and router are replicated over tp: under 0.1 % of a block
  g.experts = plan_.expert > 1 ? experts / plan_.expert : ceil_div(experts, plan_.tensor);
  g.dense_shard = ceil_div(g.dense, layout_.dense.size);
  g.expert_shard = ceil_div(g.experts, layout_.expert_shard.size);
  const Space home = plan_.offloaded() ? Space::host : Space::hbm;
  g.shard = b_.persistent("parameters_fp32", kFp32 * g.shards(), Holds::weights, layer, home);
  return g;
}

// _fsdp_param_group.unshard: copy-in (cast to bf16 into this rank's part of the flat output) and all-gather,
// on their own stream. It waits for the copy-out before the last one (the event that the all-gather streams
// wait on).
void PytorchLowering::unshard(Group& g) {
  if (g.gathered != kNoBuffer || g.unsharded != kNoBuffer) return;
  const int64_t bytes = kBf16 * g.parameters();
  BufferId source = g.shard;
  if (plan_.offloaded()) {
    source = buffer("uploaded_shard", kFp32 * g.shards(), Holds::gathered_weights);
    // Uploads and casts share the copy-in stream: this one follows the cast before it.
    std::vector<Operand> reads{g.shard};
    if (copied_out_ != kNoBuffer) reads.push_back(copied_out_);
    if (copied_in_ != kNoBuffer) reads.push_back(copied_in_);
    b_.op({OpKind::copy_h2d, Stream::h2d, Component::weights, {{kFp32 * g.shards()}}}, reads,
          std::array{Operand(source)});
  }
  g.gathered = buffer("all_gather_output", bytes, Holds::gathered_weights);
  OpSpec cast{OpKind::cast,
              Stream::gather,
              Component::weights,
              {{g.shards(), kFp32 * g.shards(), kBf16 * g.shards()}}};
  cast.kernels = eager::kShardCopyIn;
  cast.eager = true;
  copied_in_ = event();
  if (copied_out_ != kNoBuffer)
    b_.op(cast, {source, copied_out_}, {g.gathered, copied_in_});
  else
    b_.op(cast, {source}, {g.gathered, copied_in_});
  if (shard_ != kNoGroup)
    collective(OpKind::all_gather, Stream::gather, Component::weights, shard_, kBf16 * g.dense, {},
               {g.gathered});
  if (g.experts > 0 && expert_shards_ != kNoGroup)
    collective(OpKind::all_gather, Stream::gather, Component::weights, expert_shards_, kBf16 * g.experts, {},
               {g.gathered});
}

// _fsdp_param_group.wait_for_unshard: the compute stream waits, splits the flat output into parameters; in
// forward the previous group's flat output is freed only now, so that its copy-out overlaps this all-gather.
void PytorchLowering::wait_unshard(Group& g) {
  if (g.unsharded != kNoBuffer) return;
  ensure(g.gathered != kNoBuffer, "a group is gathered before it is used");
  g.unsharded = buffer("unsharded_parameters", kBf16 * g.parameters(), Holds::gathered_weights);
  const BufferId done = event();
  OpSpec split{OpKind::copy,
               Stream::compute,
               Component::weights,
               {{g.parameters(), kBf16 * g.parameters(), kBf16 * g.parameters()}}};
  split.kernels = eager::kCopyOut;
  split.eager = true;
  b_.op(split, {g.gathered}, {g.unsharded, done});
  if (held_gather_ != kNoBuffer) b_.touch(held_gather_);
  held_gather_ = forward_pass_ ? g.gathered : kNoBuffer;
  copied_out_ = forward_pass_ ? copying_out_ : done;
  copying_out_ = done;
  g.gathered = kNoBuffer;
}

void PytorchLowering::reshard(Group& g) {
  g.unsharded = kNoBuffer;
}

// _fsdp_param_group.post_backward and foreach_reduce: wait for the previous reduce-scatter and free its
// input, copy the unsharded gradients into the input, reduce-scatter, cast to fp32 (and accumulate);
// offloaded: copy down.
void PytorchLowering::reduce_gradients(Group& g) {
  const bool narrow = plan_.reduce == plan::Reduce::bf16;
  const int64_t unit = narrow ? kBf16 : kFp32;
  reshard(g);
  const BufferId input = buffer("reduce_scatter_input", unit * g.parameters(), Holds::unsharded_gradients);
  OpSpec copy_in{OpKind::concatenate,
                 Stream::compute,
                 Component::weights,
                 {{g.parameters(), kBf16 * g.parameters(), unit * g.parameters()}}};
  copy_in.kernels = eager::kChunkCat;
  copy_in.eager = true;
  std::vector<Operand> gradients{g.unsharded_gradient};
  if (&g == &root_) gradients.push_back(embedding_gradient_);
  if (reduced_ != kNoBuffer) gradients.push_back(reduced_);
  b_.op(copy_in, gradients, std::array{Operand(input)});
  const BufferId output = buffer("reduce_scatter_output", unit * g.shards(), Holds::gradients);
  reduced_ = event();
  const auto reduce = [&](uint16_t group, int64_t parameters) {
    const std::array<Operand, 2> reads{input, downloaded_};
    b_.op({OpKind::reduce_scatter, Stream::gather, Component::weights, {{unit * parameters}}, group},
          std::span(reads).first(downloaded_ == kNoBuffer ? 1 : 2), std::array<Operand, 2>{output, reduced_});
  };
  if (shard_ != kNoGroup) reduce(shard_, g.dense);
  if (g.experts > 0 && expert_shards_ != kNoGroup) reduce(expert_shards_, g.experts);
  if (replicas_ != kNoGroup)
    collective(OpKind::all_reduce, Stream::gather, Component::weights, replicas_, unit * g.shards(), {},
               {output});
  const bool fresh = g.gradient == kNoBuffer;
  BufferId target = g.gradient;
  if (fresh)
    g.gradient = b_.buffer("sharded_gradients", kFp32 * g.shards(), Holds::gradients, g.layer,
                           plan_.offloaded() ? Space::host : Space::hbm);
  target = g.gradient;
  if (plan_.offloaded()) target = buffer("reduced_gradients_fp32", kFp32 * g.shards(), Holds::gradients);
  OpSpec cast{OpKind::cast,
              Stream::gather,
              Component::weights,
              {{g.shards(), unit * g.shards() + (fresh ? 0 : kFp32 * g.shards()), kFp32 * g.shards()}}};
  cast.kernels = 1;
  cast.eager = true;
  b_.op(cast, {output, input}, {target});
  if (plan_.offloaded()) {
    downloaded_ = event();
    b_.op({OpKind::copy_d2h, Stream::d2h, Component::weights, {{kFp32 * g.shards()}}}, {target},
          {g.gradient, downloaded_});
  }
  held_reduce_ = input;
  g.unsharded_gradient = kNoBuffer;
}

void PytorchLowering::embed_forward() {
  at(Phase::forward, -1);
  inputs_[0] = buffer("block_input", kBf16 * n_ * c_.hidden, Holds::checkpoints);
  kernel(OpKind::embedding, Component::embedding, n_ * c_.hidden, {2, 2}, 1, {root_.unsharded}, {inputs_[0]});
}

void PytorchLowering::embed_backward() {
  at(Phase::backward, -1);
  const int64_t elements = c_.vocab * c_.hidden / plan_.tensor;
  // Sort of the ids and a scatter into a cleared table, which a tied head's gradient is added to.
  embedding_gradient_ = buffer("embedding_gradient", kBf16 * elements, Holds::unsharded_gradients);
  kernel(OpKind::embedding_bwd, Component::embedding, elements, {2, 4}, eager::kEmbeddingBackward, {d_x_},
         {embedding_gradient_});
}

// ---- attention ----

// Forward or backward kernels of one rank's attention: one call, or the steps of the ring with K and V
// travelling.
void PytorchLowering::attend(OpKind kind, int layer, std::initializer_list<Operand> reads,
                             std::initializer_list<Operand> writes, BufferId kv) {
  const int64_t window = plan_.windows ? c_.window[static_cast<size_t>(layer)] : 0;
  AttentionShape shape{in_.workload.sequences,
                       in_.workload.context,
                       in_.workload.context,
                       heads(),
                       kv_heads(),
                       c_.qk_dim(),
                       c_.v_dim(),
                       1,
                       window};
  const int64_t cp = plan_.context;
  const auto op = [&](BufferId keys_values) {
    OpSpec spec{kind, Stream::compute, Component::attention, shape.shape()};
    spec.kernels = kind == OpKind::attention_fwd ? eager::kAttention : eager::kAttentionBackward;
    std::vector<Operand> all(reads);
    all.push_back(keys_values);
    b_.op(spec, all, std::span(writes.begin(), writes.size()));
  };
  if (cp == 1) return op(kv);
  const int64_t part = in_.workload.context / cp;
  const int64_t kv_bytes = kBf16 * in_.workload.sequences * part * kv_width();
  const int64_t traffic =
      kind == OpKind::attention_fwd ? kv_bytes : 2 * kv_bytes;  // backward: their gradients travel too
  shape.q_len = shape.kv_len = part;
  // Two blocks in turn: the one after the next waits for the work on this one.
  std::array<BufferId, 2> ring{};
  for (size_t i = 0; i < std::min<size_t>(ring.size(), static_cast<size_t>(cp - 1)); ++i)
    ring[i] = buffer("ring_keys_values", traffic, Holds::attention_activations);
  for (int64_t step = 0; step < cp; ++step) {
    const BufferId now = kv;
    if (step + 1 < cp) {
      kv = ring[static_cast<size_t>(step % 2)];
      collective(OpKind::send_recv, Stream::sequence, Component::attention, context_, traffic, {now}, {kv},
                 traffic);
    }
    // Balanced: every step but the first has half of a block's pairs on every rank. Unbalanced: rank r
    // attends fully to the r blocks before its own, and waits through the others' steps without work.
    if (step > 0) {
      shape.causal = shape.window = 0;
      shape.kv_len = plan_.balanced_ring ? part / 2 : part;
      if (window > 0)
        shape.kv_len = std::min(shape.kv_len, window - (step - 1) * part);  // blocks within the window
    }
    if ((plan_.balanced_ring || step <= in_.context_rank) && shape.kv_len > 0)
      op(now);
    else
      alias(now, writes.begin()->buffer);
  }
}

void PytorchLowering::attention_forward(int layer, Saved& s, const Group& g, BufferId mid) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden, qkv = q_width() + kv_width();
  const BufferId w = g.unsharded;
  BufferId normed = s.normed1;
  if (tensor_ != kNoGroup) {
    normed = buffer("normed_gathered", kBf16 * t_ * h, Holds::attention_activations);
    collective(OpKind::all_gather, Stream::sequence, part, tensor_, kBf16 * t_ * h, {s.normed1}, {normed});
    s.normed1 = normed;
  }
  s.qkv = buffer("qkv", kBf16 * t_ * qkv, Holds::attention_activations);
  if (c_.attention == model::Attention::mla) {
    const int64_t q_lora = c_.q_lora_rank, kv = c_.kv_lora_rank + c_.qk_rope_dim;
    s.latents = buffer("latents", t_ * (q_lora + kv) * (compiled() ? kBf16 : kBf16 + kFp32 + kBf16),
                       Holds::attention_activations);
    if (q_lora > 0) {
      gemm(part, t_, q_lora, h, {normed, w}, {s.latents});
      kernel(OpKind::rms_norm, part, t_ * q_lora, {2, 2}, eager::kRmsNorm, {w}, {s.latents});
    }
    gemm(part, t_, q_width(), q_lora > 0 ? q_lora : h, {q_lora > 0 ? s.latents : normed, w}, {s.qkv});
    gemm(part, t_, kv, h, {normed, w}, {s.latents});
    kernel(OpKind::rms_norm, part, t_ * kv, {2, 2}, eager::kRmsNorm, {w}, {s.latents});
    gemm(part, t_, heads() * (c_.qk_nope_dim + c_.v_dim()), c_.kv_lora_rank, {s.latents, w}, {s.qkv});
  } else {
    gemm(part, t_, q_width(), h, {normed, w}, {s.qkv});
    gemm(part, t_, kv_width() / 2, h, {normed, w}, {s.qkv});
    gemm(part, t_, kv_width() / 2, h, {normed, w}, {s.qkv});
  }
  const int64_t qk = t_ * (heads() + kv_heads()) * c_.qk_dim();
  if (c_.qk_norm != model::QkNorm::none) {
    s.qk_norm =
        buffer("qk_norm_saved", qk * (compiled() ? kBf16 : kFp32 + kBf16), Holds::attention_activations);
    kernel(OpKind::rms_norm, part, qk, {2, 2}, 2 * eager::kRmsNorm, {s.qkv, w}, {s.qkv, s.qk_norm});
  }
  const BufferId rotated = buffer("rotated", kBf16 * qk, Holds::attention_activations);
  kernel(OpKind::rope, part, qk, {2, 2}, eager::kRope, {s.qkv}, {rotated});
  alias(rotated, s.qkv);  // autograd keeps the rotated q and k: v alone stays of qkv
  s.attention = buffer("attention_output", kBf16 * t_ * heads() * c_.v_dim(), Holds::attention_activations);
  s.lse = buffer("attention_lse", kFp32 * t_ * heads(), Holds::attention_activations);
  attend(OpKind::attention_fwd, layer, {s.qkv}, {s.attention, s.lse}, s.qkv);
  if (tensor_ != kNoGroup) {
    const BufferId partial = buffer("attention_partial", kBf16 * t_ * h, Holds::attention_activations);
    gemm(part, t_, h, heads() * c_.v_dim(), {s.attention, w}, {partial});
    collective(OpKind::reduce_scatter, Stream::sequence, part, tensor_, kBf16 * t_ * h, {partial}, {mid});
  } else {
    gemm(part, t_, h, heads() * c_.v_dim(), {s.attention, w}, {mid});
  }
}

void PytorchLowering::attention_backward(int layer, const Saved& s, const Group& g, BufferId d_mid,
                                         BufferId d_normed) {
  const Component part = Component::attention;
  const int64_t h = c_.hidden, o = heads() * c_.v_dim();
  const BufferId w = g.unsharded, dw = g.unsharded_gradient;
  BufferId d_out = d_mid;
  if (tensor_ != kNoGroup) {
    d_out = buffer("middle_gradient_gathered", kBf16 * t_ * h, Holds::attention_activations);
    collective(OpKind::all_gather, Stream::sequence, part, tensor_, kBf16 * t_ * h, {d_mid}, {d_out});
  }
  const BufferId d_attention = buffer("attention_gradient", kBf16 * t_ * o, Holds::attention_activations);
  gemm(part, t_, o, h, {d_out, w}, {d_attention});
  gemm(part, o, h, t_, {s.attention, d_out}, {dw});
  const BufferId d_qkv =
      buffer("qkv_gradient", kBf16 * t_ * (q_width() + kv_width()), Holds::attention_activations);
  attend(OpKind::attention_bwd, layer, {s.qkv, s.attention, s.lse, d_attention}, {d_qkv}, s.qkv);
  const int64_t qk = t_ * (heads() + kv_heads()) * c_.qk_dim();
  const BufferId unrotated = buffer("unrotated_gradient", kBf16 * qk, Holds::attention_activations);
  kernel(OpKind::rope_bwd, part, qk, {2, 2}, eager::kRopeBackward, {d_qkv}, {unrotated});
  if (c_.qk_norm != model::QkNorm::none)
    kernel(OpKind::rms_norm_bwd, part, qk, {6, 2}, 2 * eager::kRmsNormBackward, {unrotated, s.qk_norm, w},
           {d_qkv, dw});
  else
    alias(unrotated, d_qkv);
  BufferId d_x = d_normed;
  if (tensor_ != kNoGroup)
    d_x = buffer("normed_gradient_partial", kBf16 * t_ * h, Holds::attention_activations);
  const auto linear = [&](int64_t out, int64_t in, BufferId x, BufferId d_in) {
    gemm(part, t_, in, out, {d_qkv, w}, {d_in});
    gemm(part, out, in, t_, {d_qkv, x}, {dw});
  };
  if (c_.attention == model::Attention::mla) {
    const int64_t q_lora = c_.q_lora_rank, kv = c_.kv_lora_rank + c_.qk_rope_dim;
    const BufferId d_latents =
        buffer("latents_gradient", kBf16 * t_ * (q_lora + kv), Holds::attention_activations);
    linear(heads() * (c_.qk_nope_dim + c_.v_dim()), c_.kv_lora_rank, s.latents, d_latents);
    linear(q_width(), q_lora > 0 ? q_lora : h, q_lora > 0 ? s.latents : s.normed1,
           q_lora > 0 ? d_latents : d_x);
    kernel(OpKind::rms_norm_bwd, part, t_ * (q_lora + kv), {6, 2},
           (q_lora > 0 ? 2 : 1) * eager::kRmsNormBackward, {s.latents, w}, {d_latents, dw});
    if (q_lora > 0) linear(q_lora, h, s.normed1, d_x);
    linear(kv, h, s.normed1, d_x);
  } else {
    linear(q_width(), h, s.normed1, d_x);
    linear(kv_width() / 2, h, s.normed1, d_x);
    linear(kv_width() / 2, h, s.normed1, d_x);
    kernel(OpKind::add, part, 2 * t_ * h, {4, 2}, 2, {d_x}, {d_x});  // the three input gradients add up
  }
  if (tensor_ != kNoGroup)
    collective(OpKind::reduce_scatter, Stream::sequence, part, tensor_, kBf16 * t_ * h, {d_x}, {d_normed});
}

// ---- experts ----

void PytorchLowering::moe_forward(int layer, Saved& s, const Group& g, BufferId normed, BufferId y) {
  const Component part = Component::experts;
  const auto [parallel, tokens, sent, rows, i, experts] = routed_work(layer);
  const int64_t h = c_.hidden;
  const BufferId w = g.unsharded;

  s.router =
      buffer("router_saved", tokens * (2 * kFp32 * c_.experts + 3 * 8 * c_.top_k), Holds::other_activations);
  gemm(Component::router, tokens, c_.experts, h, {normed, w}, {s.router});
  kernel(OpKind::topk, Component::router, tokens * c_.experts, {4, 1}, eager::kRouter, {}, {s.router});
  kernel(OpKind::sort, Component::router, sent, {64, 64}, eager::kSort, {}, {s.router}, true);
  s.permuted = buffer("permuted", kBf16 * rows * h, Holds::expert_activations);
  if (parallel) {
    const BufferId send = buffer("dispatch_send", kBf16 * sent * h, Holds::expert_exchange);
    kernel(OpKind::permute, part, sent * h, {2, 2}, 1, {normed, s.router}, {send});
    // The split sizes are read on the CPU before the exchange can be launched.
    const BufferId counts = buffer("counts", 8 * c_.experts, Holds::expert_exchange);
    OpSpec exchange{
        OpKind::all_to_all, Stream::dispatch, Component::router, {{8 * c_.experts, 8 * c_.experts}}, expert_};
    exchange.blocking = true;
    b_.op(exchange, {s.router}, {counts});
    const BufferId arrived = buffer("dispatched", kBf16 * rows * h, Holds::expert_exchange);
    collective(OpKind::all_to_all, Stream::dispatch, part, expert_, kBf16 * sent * h, {send, counts},
               {arrived}, kBf16 * rows * h);
    kernel(OpKind::permute, part, rows * h, {2, 2}, 1, {arrived}, {s.permuted});  // by expert
  } else {
    kernel(OpKind::permute, part, rows * h, {2, 2}, 1, {normed, s.router}, {s.permuted});
  }
  s.gate_up = buffer("expert_gate_up", kBf16 * rows * 2 * i, Holds::expert_activations);
  // Eager keeps silu(gate) too; clamped: both clamped halves, the sigmoid and the product.
  s.act = buffer("expert_swiglu",
                 kBf16 * rows * i *
                     (compiled()  ? 1
                      : clamped() ? 5
                                  : 2),
                 Holds::expert_activations);
  s.down = buffer("expert_output", kBf16 * rows * h, Holds::expert_activations);
  grouped(rows, 2 * i, h, experts, {s.permuted, w}, {s.gate_up});
  if (c_.expert_bias) {
    const BufferId biased = buffer("expert_gate_up", kBf16 * rows * 2 * i, Holds::expert_activations);
    kernel(OpKind::expert_bias, part, rows * 2 * i, {2, 2}, eager::kExpertBias, {s.gate_up, w}, {biased});
    s.gate_up = biased;
  }
  kernel(clamped() ? OpKind::clamped_swiglu : OpKind::swiglu, part, rows * i, {4, 2},
         clamped() ? eager::kClampedSwiglu : eager::kSwiglu, {s.gate_up}, {s.act});
  grouped(rows, h, i, experts, {s.act, w}, {s.down});
  if (c_.expert_bias) {
    const BufferId biased = buffer("expert_output", kBf16 * rows * h, Holds::expert_activations);
    kernel(OpKind::expert_bias, part, rows * h, {2, 2}, eager::kExpertBias, {s.down, w}, {biased});
    s.down = biased;
  }
  if (parallel) {
    const BufferId ordered = buffer("combine_send", kBf16 * rows * h, Holds::expert_exchange);
    const BufferId home = buffer("combined", kBf16 * sent * h, Holds::expert_exchange);
    kernel(OpKind::permute, part, rows * h, {2, 2}, 1, {s.down}, {ordered});
    collective(OpKind::all_to_all, Stream::dispatch, part, expert_, kBf16 * rows * h, {ordered}, {home},
               kBf16 * sent * h);
    s.down = home;  // what the gate multiply saves
  }
  s.weighted = buffer("weighted", kBf16 * sent * h, Holds::expert_activations);
  kernel(OpKind::scale, part, sent * h, {2, 2}, eager::kGateMultiply, {s.down, s.router}, {s.weighted});
  if (!recompute_ends_early())
    kernel(OpKind::unpermute, part, sent * h, {2, 0.5}, eager::kIndexAdd, {s.weighted, s.router}, {y}, true);
  if (c_.shared_intermediate > 0) {
    const int64_t width = c_.shared_intermediate / plan_.tensor;
    s.shared_gate_up = buffer("shared_gate_up", kBf16 * t_ * 2 * width, Holds::other_activations);
    s.shared_act =
        buffer("shared_swiglu", kBf16 * t_ * width * (compiled() ? 1 : 2), Holds::other_activations);
    gemm(Component::shared_experts, t_, width, h, {normed, w}, {s.shared_gate_up});
    gemm(Component::shared_experts, t_, width, h, {normed, w}, {s.shared_gate_up});
    kernel(OpKind::swiglu, Component::shared_experts, t_ * width, {4, 2}, eager::kSwiglu, {s.shared_gate_up},
           {s.shared_act});
    gemm(Component::shared_experts, t_, h, width, {s.shared_act, w}, {y});
    kernel(OpKind::add, Component::shared_experts, t_ * h, {4, 2}, 1, {y}, {y});
  }
}

void PytorchLowering::moe_backward(int layer, const Saved& s, const Group& g, BufferId d_y,
                                   BufferId d_normed) {
  const Component part = Component::experts;
  const auto [parallel, tokens, sent, rows, i, experts] = routed_work(layer);
  const int64_t h = c_.hidden;
  const BufferId w = g.unsharded, dw = g.unsharded_gradient;

  if (c_.shared_intermediate > 0) {
    const Component shared = Component::shared_experts;
    const int64_t width = c_.shared_intermediate / plan_.tensor;
    const BufferId d_act = buffer("shared_swiglu_gradient", kBf16 * t_ * width, Holds::other_activations);
    const BufferId d_gate_up =
        buffer("shared_gate_up_gradient", kBf16 * t_ * 2 * width, Holds::other_activations);
    gemm(shared, t_, width, h, {d_y, w}, {d_act});
    gemm(shared, width, h, t_, {s.shared_act, d_y}, {dw});
    kernel(OpKind::swiglu_bwd, shared, t_ * width, {6, 4}, eager::kSwigluBackward, {s.shared_gate_up, d_act},
           {d_gate_up});
    gemm(shared, t_, h, 2 * width, {d_gate_up, w}, {d_normed});
    gemm(shared, 2 * width, h, t_, {d_gate_up, s.normed2}, {dw});
  }
  // Gradient of index-add: a gather; of the gate multiply: two products and a row sum.
  const BufferId d_weighted = buffer("weighted_gradient", kBf16 * sent * h, Holds::expert_activations);
  // Autograd's formula of index-add keeps its source, which only a compiled block sees through.
  if (compiled())
    kernel(OpKind::permute, part, sent * h, {2, 2}, 1, {d_y, s.router}, {d_weighted});
  else
    kernel(OpKind::permute, part, sent * h, {2, 2}, 1, {d_y, s.router, s.weighted}, {d_weighted});
  BufferId d_down = buffer("expert_output_gradient", kBf16 * sent * h, Holds::expert_activations);
  // The gate's gradient is the row sum of a product as large as the rows, which eager PyTorch writes out.
  const BufferId product =
      buffer("gate_product", compiled() ? 0 : kBf16 * sent * h, Holds::expert_activations);
  kernel(OpKind::scale_bwd, part, sent * h, {4, 2}, eager::kGateMultiplyBackward,
         {d_weighted, s.down, s.router}, {d_down, product});
  if (parallel) {
    const BufferId arrived = buffer("dispatched", kBf16 * rows * h, Holds::expert_exchange);
    collective(OpKind::all_to_all, Stream::dispatch, part, expert_, kBf16 * sent * h, {d_down}, {arrived},
               kBf16 * rows * h);
    const BufferId ordered = buffer("permuted_gradient", kBf16 * rows * h, Holds::expert_activations);
    kernel(OpKind::permute, part, rows * h, {2, 2}, 1, {arrived}, {ordered});
    d_down = ordered;
  }
  if (c_.expert_bias)
    kernel(OpKind::expert_bias_bwd, part, rows * h, {2, 0.01}, eager::kExpertBiasBackward, {d_down}, {dw},
           true);
  const BufferId d_act = buffer("expert_swiglu_gradient", kBf16 * rows * i, Holds::expert_activations);
  grouped(rows, i, h, experts, {d_down, w}, {d_act});
  grouped(rows, h, i, experts, {s.act, d_down}, {dw});
  const BufferId d_gate_up =
      buffer("expert_gate_up_gradient", kBf16 * rows * 2 * i, Holds::expert_activations);
  kernel(clamped() ? OpKind::clamped_swiglu_bwd : OpKind::swiglu_bwd, part, rows * i, {6, 4},
         clamped() ? eager::kClampedSwigluBackward : eager::kSwigluBackward, {s.gate_up, s.act, d_act},
         {d_gate_up});
  if (c_.expert_bias)
    kernel(OpKind::expert_bias_bwd, part, rows * 2 * i, {2, 0.01}, eager::kExpertBiasBackward, {d_gate_up},
           {dw}, true);
  const BufferId d_permuted = buffer("expert_input_gradient", kBf16 * rows * h, Holds::expert_activations);
  grouped(rows, h, 2 * i, experts, {d_gate_up, w}, {d_permuted});
  grouped(rows, 2 * i, h, experts, {s.permuted, d_gate_up}, {dw});
  BufferId d_rows = d_permuted;
  if (parallel) {
    const BufferId ordered = buffer("combine_send", kBf16 * rows * h, Holds::expert_exchange);
    d_rows = buffer("combined", kBf16 * sent * h, Holds::expert_exchange);
    kernel(OpKind::permute, part, rows * h, {2, 2}, 1, {d_permuted}, {ordered});
    collective(OpKind::all_to_all, Stream::dispatch, part, expert_, kBf16 * rows * h, {ordered}, {d_rows},
               kBf16 * sent * h);
  }
  kernel(OpKind::unpermute, part, sent * h, {2, 0.5}, eager::kIndexAdd, {d_rows, s.router}, {d_normed}, true);
  const BufferId d_logits = buffer("router_gradient", kFp32 * tokens * c_.experts, Holds::other_activations);
  kernel(OpKind::topk_bwd, Component::router, tokens * c_.experts, {6, 2}, eager::kRouterBackward,
         {s.router, d_weighted}, {d_logits});
  gemm(Component::router, tokens, h, c_.experts, {d_logits, w}, {d_normed});
  gemm(Component::router, c_.experts, h, tokens, {d_logits, s.normed2}, {dw});
}

// ---- blocks ----

PytorchLowering::Saved PytorchLowering::block_forward(int layer, BufferId x, BufferId out) {
  const Group& g = blocks_[static_cast<size_t>(layer)];
  const int64_t h = c_.hidden;
  const BufferId w = g.unsharded;
  Saved s;
  const auto norm = [&](BufferId from, BufferId& saved, BufferId& normed, const char* label) {
    // Autograd keeps the fp32 input and the normalised bf16 of an eager RMSNorm.
    saved = buffer(label, n_ * h * (compiled() ? 0 : kFp32 + kBf16), Holds::other_activations);
    normed = buffer("normed", kBf16 * n_ * h, Holds::other_activations);
    kernel(OpKind::rms_norm, Component::dense, n_ * h, {2, 2}, eager::kRmsNorm, {from, w}, {saved, normed});
  };
  norm(x, s.norm1, s.normed1, "norm1_saved");
  const BufferId mid = buffer("block_middle", kBf16 * n_ * h, Holds::other_activations);
  attention_forward(layer, s, g, mid);
  kernel(OpKind::add, Component::dense, n_ * h, {4, 2}, 1, {x, mid}, {mid});
  norm(mid, s.norm2, s.normed2, "norm2_saved");
  BufferId normed = s.normed2;
  const bool moe = c_.moe[static_cast<size_t>(layer)];
  if (tensor_ != kNoGroup && !(moe && expert_ != kNoGroup && c_.shared_intermediate == 0)) {
    normed = buffer("normed_gathered", kBf16 * t_ * h, Holds::other_activations);
    collective(OpKind::all_gather, Stream::sequence, Component::dense, tensor_, kBf16 * t_ * h, {s.normed2},
               {normed});
    s.normed2 = normed;
  }
  const BufferId y = buffer("feed_forward_output", kBf16 * t_ * h, Holds::other_activations);
  if (moe) {
    moe_forward(layer, s, g, normed, y);
  } else {
    const int64_t width = c_.dense_intermediate / plan_.tensor;
    s.gate_up = buffer("gate_up", kBf16 * t_ * 2 * width, Holds::other_activations);
    s.act = buffer("swiglu", kBf16 * t_ * width * (compiled() ? 1 : 2), Holds::other_activations);
    gemm(Component::dense, t_, width, h, {normed, w}, {s.gate_up});
    gemm(Component::dense, t_, width, h, {normed, w}, {s.gate_up});
    kernel(OpKind::swiglu, Component::dense, t_ * width, {4, 2}, eager::kSwiglu, {s.gate_up}, {s.act});
    gemm(Component::dense, t_, h, width, {s.act, w}, {y});
  }
  if (tensor_ != kNoGroup && !(moe && expert_ != kNoGroup && c_.shared_intermediate == 0))
    collective(OpKind::reduce_scatter, Stream::sequence, Component::dense, tensor_, kBf16 * t_ * h, {y},
               {out});
  if (!(moe && recompute_ends_early()))
    kernel(OpKind::add, Component::dense, n_ * h, {4, 2}, 1, {mid, y}, {out});
  return s;
}

void PytorchLowering::block_backward(int layer, BufferId x, const Saved& s, BufferId d_out, BufferId d_in) {
  Group& g = blocks_[static_cast<size_t>(layer)];
  const int64_t h = c_.hidden;
  const BufferId w = g.unsharded, dw = g.unsharded_gradient;
  const bool moe = c_.moe[static_cast<size_t>(layer)];
  const bool gathered = tensor_ != kNoGroup && !(moe && expert_ != kNoGroup && c_.shared_intermediate == 0);
  BufferId d_y = d_out;
  BufferId d_normed = buffer("normed_gradient", kBf16 * (gathered ? t_ : n_) * h, Holds::other_activations);
  if (gathered) {
    d_y = buffer("output_gradient_gathered", kBf16 * t_ * h, Holds::other_activations);
    collective(OpKind::all_gather, Stream::sequence, Component::dense, tensor_, kBf16 * t_ * h, {d_out},
               {d_y});
  }
  if (moe) {
    moe_backward(layer, s, g, d_y, d_normed);
  } else {
    const int64_t width = c_.dense_intermediate / plan_.tensor;
    const BufferId d_act = buffer("swiglu_gradient", kBf16 * t_ * width, Holds::other_activations);
    const BufferId d_gate_up = buffer("gate_up_gradient", kBf16 * t_ * 2 * width, Holds::other_activations);
    gemm(Component::dense, t_, width, h, {d_y, w}, {d_act});
    gemm(Component::dense, width, h, t_, {s.act, d_y}, {dw});
    kernel(OpKind::swiglu_bwd, Component::dense, t_ * width, {6, 4}, eager::kSwigluBackward,
           {s.gate_up, d_act}, {d_gate_up});
    gemm(Component::dense, t_, h, 2 * width, {d_gate_up, w}, {d_normed});
    gemm(Component::dense, 2 * width, h, t_, {d_gate_up, s.normed2}, {dw});
  }
  if (gathered) {
    const BufferId home = buffer("normed_gradient_home", kBf16 * n_ * h, Holds::other_activations);
    collective(OpKind::reduce_scatter, Stream::sequence, Component::dense, tensor_, kBf16 * t_ * h,
               {d_normed}, {home});
    d_normed = home;
  }
  const BufferId d_mid = buffer("block_middle_gradient", kBf16 * n_ * h, Holds::other_activations);
  kernel(OpKind::rms_norm_bwd, Component::dense, n_ * h, {6, 2}, eager::kRmsNormBackward,
         {d_normed, s.norm2, d_out, w}, {d_mid, dw});
  const BufferId d_normed1 = buffer("attention_normed_gradient", kBf16 * n_ * h, Holds::other_activations);
  attention_backward(layer, s, g, d_mid, d_normed1);
  kernel(OpKind::rms_norm_bwd, Component::dense, n_ * h, {6, 2}, eager::kRmsNormBackward,
         {d_normed1, s.norm1, x, d_mid, w}, {d_in, dw});
}

// Final norm, head and loss: chunk by chunk under checkpointing (each chunk's logits are computed again in
// backward), or all tokens at once.
void PytorchLowering::head_and_loss() {
  const Component part = Component::vocabulary;
  const int layer = static_cast<int>(c_.layers);
  const int64_t h = c_.hidden, vocab = c_.vocab / plan_.tensor;
  const int64_t chunk = plan_.loss_chunk == 0 ? t_ : std::min(plan_.loss_chunk, t_);
  const bool again = plan_.loss_chunk != 0;
  const BufferId x = inputs_[static_cast<size_t>(c_.layers)];
  at(Phase::forward, layer);
  const BufferId saved = buffer("final_norm_saved", n_ * h * (kFp32 + kBf16), Holds::vocabulary_activations);
  const BufferId normed = buffer("final_normed", kBf16 * t_ * h, Holds::vocabulary_activations);
  kernel(OpKind::rms_norm, part, n_ * h, {2, 2}, eager::kRmsNorm, {x, root_.unsharded}, {saved, normed});
  if (tensor_ != kNoGroup)
    collective(OpKind::all_gather, Stream::sequence, part, tensor_, kBf16 * t_ * h, {}, {normed});
  struct Logits {
    BufferId bf16, fp32;
  };
  const auto forward = [&](int64_t tokens) {
    Logits l{buffer("logits", kBf16 * tokens * vocab, Holds::vocabulary_activations),
             buffer("logits_fp32", kFp32 * tokens * vocab, Holds::vocabulary_activations)};
    gemm(part, tokens, vocab, h, {normed, root_.unsharded}, {l.bf16});
    // To fp32, then log-softmax (which backward needs) and the target's.
    const BufferId log_softmax = buffer("log_softmax", kFp32 * tokens * vocab, Holds::vocabulary_activations);
    kernel(OpKind::cross_entropy, part, tokens * vocab, {2, 4}, eager::kCrossEntropy, {l.bf16},
           {l.fp32, log_softmax});
    l.fp32 = log_softmax;
    return l;
  };
  std::vector<Logits> kept;
  for (int64_t done = 0; done < t_; done += chunk) kept.push_back(forward(std::min(chunk, t_ - done)));

  // Backward begins: FSDP gathers the root again, before the loss chunks run.
  forward_pass_ = false;
  at(Phase::backward, layer);
  if (plan_.reshard) reshard(root_);
  unshard(root_);
  wait_unshard(root_);
  if (plan_.prefetch) {
    at(Phase::backward, layer - 1);
    unshard(blocks_.back());
    at(Phase::backward, layer);
  }
  const int64_t head =
      (in_.parameters.head > 0 ? in_.parameters.head : in_.parameters.embedding) + in_.parameters.final_norm;
  root_.unsharded_gradient = buffer("head_gradient", kBf16 * head / plan_.tensor, Holds::unsharded_gradients);
  const BufferId d_normed = buffer("final_normed_gradient", kBf16 * t_ * h, Holds::vocabulary_activations);
  size_t index = kept.size();
  for (int64_t done = 0; done < t_; done += chunk) {
    const int64_t tokens = std::min(chunk, t_ - done);
    Logits l = kept[--index];
    if (again) {
      at(Phase::recompute, layer);
      l = forward(tokens);
      at(Phase::backward, layer);
    }
    // The loss's own gradient is as large as the logits: zeros but for the targets.
    const BufferId d_log =
        buffer("log_softmax_gradient", kFp32 * tokens * vocab, Holds::vocabulary_activations);
    const BufferId d_logits =
        buffer("logits_gradient_fp32", kFp32 * tokens * vocab, Holds::vocabulary_activations);
    kernel(OpKind::cross_entropy_bwd, part, tokens * vocab, {4, 2}, eager::kCrossEntropyBackward, {l.fp32},
           {d_log, d_logits});
    const BufferId narrow = buffer("logits_gradient", kBf16 * tokens * vocab, Holds::vocabulary_activations);
    alias(d_logits, narrow);  // the cast to bf16, part of the same measured rate
    gemm(part, tokens, h, vocab, {narrow, root_.unsharded}, {d_normed});
    gemm(part, vocab, h, tokens, {narrow, normed}, {root_.unsharded_gradient});
  }
  d_x_ = buffer("block_output_gradient", kBf16 * n_ * h, Holds::other_activations);
  if (tensor_ != kNoGroup)
    collective(OpKind::reduce_scatter, Stream::sequence, part, tensor_, kBf16 * t_ * h, {}, {d_normed});
  kernel(OpKind::rms_norm_bwd, part, n_ * h, {6, 2}, eager::kRmsNormBackward,
         {d_normed, saved, x, root_.unsharded}, {d_x_, root_.unsharded_gradient});
}

// clip_grad_norm_ and a fused AdamW over the sharded fp32 parameters; offloaded: both on the CPU, after
// everything.
void PytorchLowering::optimizer() {
  at(Phase::optimizer, -1);
  std::vector<Group*> groups;
  for (Group& g : blocks_) groups.push_back(&g);
  groups.push_back(&root_);
  const auto each = [&](OpKind kind, double read, double written, int kernels, bool write_weights,
                        bool norm_only) {
    for (Group* g : groups) {
      const double n = static_cast<double>(g->shards());
      OpSpec spec{kind,
                  plan_.offloaded() ? Stream::host : Stream::compute,
                  Component::optimizer,
                  {{g->shards(), static_cast<int64_t>(n * read), static_cast<int64_t>(n * written)}}};
      spec.kernels = static_cast<uint16_t>(kernels);
      spec.eager = true;
      if (plan_.offloaded()) {
        spec.kind = norm_only ? OpKind::norm_host : write_weights ? OpKind::adam_host : OpKind::scale_host;
        spec.shape = {{g->shards(), static_cast<int64_t>(n * (read + written))}};
        spec.blocking = true;
      }
      if (norm_only)
        b_.op(spec, {g->gradient}, {norm_});
      else if (write_weights)
        b_.op(spec, {g->gradient, norm_}, {g->shard, states_});
      else
        b_.op(spec, {norm_}, {g->gradient});
    }
  };
  if (plan_.clip) {
    each(OpKind::square_sum, 4, 0, eager::kNorm, false, true);
    if (world_ != kNoGroup) {
      OpSpec sum{OpKind::all_reduce, Stream::gather, Component::optimizer, {{256}}, world_};
      b_.op(sum, {}, {norm_});
    }
    each(OpKind::scale, 4, 4, eager::kScale, false, false);
  }
  each(OpKind::adam, 16, 12, eager::kAdam, true, false);
}

StepProgram PytorchLowering::run() {
  const plan::Workload& work = in_.workload;
  t_ = work.sequences * work.context / plan_.context;
  n_ = t_ / plan_.tensor;
  make_groups();
  const int layers = static_cast<int>(c_.layers);
  for (int l = 0; l < layers; ++l) {
    const model::LayerParameters& p = in_.parameters.layers[static_cast<size_t>(l)];
    blocks_.push_back(make_group(l, p.dense(), p.experts));
  }
  root_ = make_group(layers, in_.parameters.embedding + in_.parameters.head + in_.parameters.final_norm, 0);
  int64_t parameters = root_.shards();
  for (const Group& g : blocks_) parameters += g.shards();
  states_ = b_.persistent("adam_moments", 2 * kFp32 * parameters, Holds::optimizer_states, -1,
                          plan_.offloaded() ? Space::host : Space::hbm);
  norm_ = b_.persistent("gradient_norm", 256, Holds::other_activations, -1);
  inputs_.resize(static_cast<size_t>(layers) + 1);

  for (int64_t micro = 0; micro < work.accumulate; ++micro) {
    forward_pass_ = true;
    saved_.assign(static_cast<size_t>(layers), {});
    at(Phase::forward, layers);
    unshard(root_);
    wait_unshard(root_);
    embed_forward();
    for (int l = 0; l < layers; ++l) {
      Group& g = blocks_[static_cast<size_t>(l)];
      at(Phase::forward, l);
      // Implicit prefetch: this all-gather is launched after the kernels of the block before, which it
      // overlaps.
      unshard(g);
      wait_unshard(g);
      inputs_[static_cast<size_t>(l) + 1] = buffer("block_input", kBf16 * n_ * c_.hidden, Holds::checkpoints);
      saved_[static_cast<size_t>(l)] =
          block_forward(l, inputs_[static_cast<size_t>(l)], inputs_[static_cast<size_t>(l) + 1]);
      if (plan_.reshard) reshard(g);
    }
    if (held_gather_ != kNoBuffer) held_gather_ = kNoBuffer;
    head_and_loss();
    for (int l = layers - 1; l >= 0; --l) {
      Group& g = blocks_[static_cast<size_t>(l)];
      at(Phase::backward, l);
      unshard(g);
      wait_unshard(g);
      if (plan_.prefetch && l > 0) {
        at(Phase::backward, l - 1);
        unshard(blocks_[static_cast<size_t>(l) - 1]);
        at(Phase::backward, l);
      }
      const BufferId x = inputs_[static_cast<size_t>(l)];
      Saved s = saved_[static_cast<size_t>(l)];
      if (plan_.recompute == Recompute::full) {
        at(Phase::recompute, l);
        const BufferId out = buffer("block_output_again", kBf16 * n_ * c_.hidden, Holds::other_activations);
        s = block_forward(l, x, out);
        at(Phase::backward, l);
      }
      g.unsharded_gradient =
          buffer("unsharded_gradients", kBf16 * g.parameters(), Holds::unsharded_gradients);
      const BufferId d_in = buffer("block_input_gradient", kBf16 * n_ * c_.hidden, Holds::other_activations);
      block_backward(l, x, s, d_x_, d_in);
      d_x_ = d_in;
      if (held_reduce_ != kNoBuffer) b_.touch(held_reduce_);
      reduce_gradients(g);
    }
    embed_backward();
    at(Phase::backward, layers);
    if (held_reduce_ != kNoBuffer) b_.touch(held_reduce_);
    reduce_gradients(root_);
    held_reduce_ = kNoBuffer;
  }
  optimizer();
  return b_.finish();
}

}  // namespace

StepProgram lower_pytorch(const LoweringInput& input) {
  return PytorchLowering(input).run();
}

}  // namespace mop::program
