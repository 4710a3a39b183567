// StepProgram: what one rank does in one training step, as operations on named streams over named buffers. It
// knows no durations, no CUDA and no plan: the lowering (native/, lower_pytorch.cpp) is the only place
// that decides what is sharded and what overlaps. The simulator prices it; an executor walks it.
#pragma once
#include <array>
#include <cstdint>
#include <ranges>
#include <span>
#include <string>
#include <vector>

#include "sim/program/master.h"
#include "sim/program/parameters.h"

namespace mop::program {

// Streams run their operations first in, first out; overlap exists only between streams.
enum class Stream : uint8_t {
  compute,   // kernels
  gather,    // weight all-gathers and gradient reduce-scatters of the dense path and the F groups
  dispatch,  // tokens to experts
  combine,   // expert outputs back
  sequence,  // attention all-to-alls, ring or tensor-parallel collectives
  spill,     // weights and gradients of spilled experts
  h2d,
  d2h,   // host copies
  host,  // CPU optimizer
};
inline constexpr int kStreams = 9;
const char* name(Stream stream);

enum class Phase : uint8_t { forward, recompute, backward, optimizer };
const char* name(Phase phase);

// What a piece of work or memory belongs to: the rows of every breakdown.
enum class Component : uint8_t {
  embedding,
  attention,
  dense,
  router,
  experts,
  shared_experts,
  vocabulary,
  optimizer,
  weights,
  other,
};
inline constexpr int kComponents = 10;
const char* name(Component component);

// What each computes, and its operands: ops.h. Here: what its Shape says, for whoever prices it.
enum class OpKind : uint8_t {
  gemm,           // (m, n, k)
  grouped_gemm,   // (rows, n, k, experts, touched): rows spread over experts, one weight each; touched:
                  // experts with any rows, where most have few, or whose gradients are written; else 0
  attention_fwd,  // see AttentionShape
  attention_bwd,
  // Memory-bound kernels: (elements, bytes read, bytes written); of rope, rope_bwd also (width of the norm
  // before it, 0: none)
  rms_norm,
  rms_norm_bwd,
  rope,
  rope_bwd,
  mla_keys,
  mla_keys_bwd,
  swiglu,
  swiglu_bwd,
  clamped_swiglu,
  clamped_swiglu_bwd,
  expert_bias,
  expert_bias_bwd,
  column_sum,
  add,
  sum_replicas,
  cast,
  copy,
  concatenate,
  clear,
  topk,
  topk_bwd,
  balance_loss,
  sort,
  permute,
  unpermute,
  unpermute_bwd,
  embedding,
  embedding_bwd,
  cross_entropy,
  cross_entropy_bwd,
  scale_bwd,
  square_sum,
  clip_factor,
  adam,
  scale,
  // Collectives over a group: (bytes of the full buffer); all_to_all and send_recv: (bytes sent, bytes
  // received) over all peers, itself included; of routed rows also (bytes with the node's other ranks, with
  // other nodes) and of spilled experts (bytes with other nodes), the larger of both directions
  all_gather,
  reduce_scatter,
  all_reduce,
  all_to_all,
  send_recv,
  copy_h2d,
  copy_d2h,  // (bytes)
  adam_host,
  norm_host,
  scale_host,    // (parameters, bytes of DRAM traffic)
  plan_routing,  // (experts, bytes read, bytes written): least-loaded plan from the exchanged counts
  next_batch,    // (bytes): tokens of the step from the data
};
const char* name(OpKind kind);
bool is_collective(OpKind kind);
bool is_pairwise(OpKind kind);  // a collective of sends and receives
bool is_memory_bound(OpKind kind);

// Operations whose real size is known at run time only: their shape is the capacity, and the interpreter
// scales it to the rows of the layer's ExpertLoad.
enum class Routed : uint8_t {
  no,
  compute,   // rows that this rank computes in the round
  dispatch,  // rows sent: those of its tokens; received: those that it computes
  combine,   // the other way round
  source,    // work on the rows that its tokens sent
  spill,     // weights of spilled experts: lent and borrowed
};

// What an all_to_all moves where.
enum class Exchange : uint8_t {
  none,
  rows_to_columns,  // rows of everyone, a part of the columns -> own rows, all columns
  columns_to_rows,  // own rows, all columns -> rows of everyone, a part of the columns
  dispatch,         // routed rows to those who compute them
  combine,          // and back
  spill_weights,    // weights of spilled experts to those who borrow them
  spill_gradients,  // their gradients back, added to the owner's
};

// Whether the executor packs or unpacks what travels, on the exchange's stream.
constexpr bool packs(Exchange exchange) {
  return exchange == Exchange::rows_to_columns || exchange == Exchange::columns_to_rows ||
         exchange == Exchange::dispatch || exchange == Exchange::combine;
}

// Whether all that travels goes to other ranks.
constexpr bool spills(Exchange exchange) {
  return exchange == Exchange::spill_weights || exchange == Exchange::spill_gradients;
}

// Details of what an operation computes, where its kind leaves them open (ops.h).
struct Does {
  bool accumulate = false;  // adds to what it writes
  bool transpose_a = false, transpose_b = false;
  bool deferred = false;     // works for the step before: nothing to do in the first step of a run
  bool first_round = false;  // in a repeat region: only in the first round of each pass
  bool last_round = false;   // only in the last one of each pass
  Exchange exchange = Exchange::none;
  int64_t a = 0, b = 0, c = 0;  // by kind
};

// Parameters of an operation, by kind; equal shapes are stored once.
struct Shape {
  std::array<int64_t, 9> v{};
  bool operator==(const Shape&) const = default;
};

// Attention of `batch` sequences: q_len queries against kv_len keys. causal 1: the last query sees all keys
// and each earlier one a key less (kv_len >= q_len); window 0: full. pairs = query-key pairs of one head and
// sequence.
struct AttentionShape {
  int64_t batch, q_len, kv_len, heads, kv_heads, qk_dim, v_dim, causal, window;
  Shape shape() const { return {{batch, q_len, kv_len, heads, kv_heads, qk_dim, v_dim, causal, window}}; }
  static AttentionShape of(const Shape& s) {
    return {s.v[0], s.v[1], s.v[2], s.v[3], s.v[4], s.v[5], s.v[6], s.v[7], s.v[8]};
  }
  double pairs() const;
};

enum class Space : uint8_t { hbm, host };

// What a buffer holds: the rows of the memory breakdown.
enum class Holds : uint8_t {
  weights,
  gradients,
  optimizer_states,
  gathered_weights,
  unsharded_gradients,
  checkpoints,
  attention_activations,
  expert_activations,
  expert_exchange,
  spilled_experts,
  vocabulary_activations,
  other_activations,
  staging,
};
inline constexpr int kHolds = 13;
const char* name(Holds holds);

using BufferId = uint32_t;
using OpId = uint32_t;
inline constexpr BufferId kNoBuffer = 0xffffffff;
inline constexpr OpId kNoOp = 0xffffffff;
inline constexpr uint16_t kNoGroup = 0xffff;

// Element types.
enum class Type : uint8_t { bf16, f32, f64, i32 };
const char* name(Type type);
int64_t size_of(Type type);  // bytes

struct Buffer {
  const char* label;  // "dense_weights"; together with the layer it is the buffer's name
  int32_t layer;      // -1: none
  Space space;
  Holds holds;
  bool persistent;  // lives across steps
  uint8_t slots;    // inside a repeat region: how many rounds' copies exist (bytes counts all of them)
  int64_t bytes;    // requested size; an arena rounds up to its alignment
  OpId first = kNoOp, last = 0;  // issue positions of the first and last use; persistent ones live always
};

struct Op {
  OpKind kind;
  Stream stream;
  Phase phase;
  Component component;
  int16_t layer;     // -1: none
  uint16_t group;    // communicator, kNoGroup for local work
  uint16_t kernels;  // kernels launched for it
  uint32_t region;   // 0: once a step; else index of the repeat region that it is in
  bool blocking;     // the launching thread waits for its completion
  bool eager;        // a sequence of PyTorch's eager kernels rather than one fused kernel
  Routed routed;
  Does does;
  uint32_t shape;
  uint32_t uses, use_count;  // range in StepProgram::uses
};

// What an operand is inside of its buffer: `count` row-major matrices of (rows, cols), `ld` elements between
// rows, `stride` elements between matrices, from `offset` bytes on; plus `rank_stride` bytes for each
// position of this rank in the operation's group. In a repeat region offset counts from the round's slot.
struct View {
  int64_t offset = 0, rank_stride = 0;
  int64_t rows = 0, cols = 0, ld = 0;
  int64_t count = 1, stride = 0;
  Type type = Type::bf16;
  int64_t elements() const { return count * rows * cols; }
  bool dense() const { return (rows == 1 || ld == cols) && (count == 1 || stride == rows * cols); }
};

// One operand. The operands of an operation stand in the order that ops.h gives for its kind, what it reads
// first, then what it writes; an optional one that is missing has kNoBuffer. Programs that only describe
// somebody else's run (PyTorch's) have no views.
struct Use {
  BufferId buffer = kNoBuffer;
  bool write = false;
  View view{};
};

// `to` starts after `from` has completed, `distance` iterations earlier: of the repeat region when both are
// in the same one, else of the step.
struct Dependency {
  OpId from, to;
  uint8_t distance;
};

// A body of operations repeated for as many rounds as the routed rows of its layer need; every rank of the
// expert group agrees on the count from the exchanged counts. Operations [first, last).
struct Region {
  OpId first = 0, last = 0;
  int16_t layer = -1;
  OpId plan = kNoOp;  // the plan_routing that knows how many rounds there are
};

enum class Axis : uint8_t {
  shard,
  replicate,
  tensor,
  context,
  expert,
  expert_shard,
  vocabulary,
  vocabulary_replicas,
  world
};

// A communicator: this rank's group is {base + i * stride, i < size}, base depending on the rank.
struct Group {
  Axis axis;
  int64_t size, stride;
  plan::Span span() const { return {size, stride}; }
};

// Where this rank's shard of a flat parameter group (parameters.h) is, for whoever fills, saves or checks it.
struct Shard {
  FlatGroup flat;
  BufferId weights = kNoBuffer, gradient = kNoBuffer;
  int64_t weights_offset = 0;  // bytes; likewise below
  int64_t gradient_offset = 0;
  Type weights_type = Type::bf16, gradient_type = Type::bf16;
  // Optimizer states: blocks of `states_bucket` elements, a buffer each, [master |] m | v in fp32 [| low bits
  // of the master], the shard's first element being element `states_first` of the first one. None where
  // nothing updates it.
  std::vector<BufferId> states;
  int64_t states_first = 0, states_bucket = 0;
  Master master = Master::states;
  // Elements [first, last) of the group; past its end: padding.
  // first = index in `outer` x outer_elements + index in `inner` x elements.
  plan::Span outer, inner;
  int64_t outer_elements = 0, elements = 0;
  int64_t replicas = 1;  // ranks that hold the same shard
};

struct StepProgram {
  std::vector<Op> ops;  // issue order: a topological order of the dependencies with distance 0
  std::vector<Use> uses;
  std::vector<Shape> shapes;
  std::vector<Buffer> buffers;
  std::vector<Dependency> dependencies;
  std::vector<Region> regions{1};  // [0] is the step itself
  std::vector<Group> groups;
  int64_t round_rows = 0;     // capacity of a streaming round, to which shapes of routed operations refer
  int64_t spill_slots = 0;    // spilled experts to which shapes of spill operations refer
  bool runnable = false;      // every operand has a view: an executor can run it
  std::vector<Shard> shards;  // where the parameters live (runnable programs)

  const Shape& shape(const Op& op) const { return shapes[op.shape]; }
  // All operands, missing ones included; those that are there.
  std::span<const Use> operands(const Op& op) const { return std::span(uses).subspan(op.uses, op.use_count); }
  auto uses_of(const Op& op) const {
    return operands(op) | std::views::filter([](const Use& use) { return use.buffer != kNoBuffer; });
  }
  std::string op_name(OpId id) const;          // "L12 backward experts grouped_gemm"
  std::string buffer_name(BufferId id) const;  // "checkpoint[12]"
};

// Work of one operation, in closed form from its shape.
double flops(OpKind kind, const Shape& shape);
double hbm_bytes(OpKind kind, const Shape& shape);  // read + written at least once

}  // namespace mop::program
