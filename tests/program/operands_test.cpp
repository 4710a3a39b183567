// Programs that run: every operation has the operands that ops.h gives for its kind, their sizes fit one
// another and its shape, and each lies inside its buffer whatever this rank's position in the group.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "sim/plan/rounds.h"
#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

// Bytes of a slot from a view's start to the end of its last element, for the rank with the largest offset.
int64_t end_of(const View& v, int64_t ranks) {
  const int64_t last = (v.count - 1) * v.stride + (v.rows - 1) * v.ld + v.cols;
  return v.offset + v.rank_stride * (ranks - 1) + last * size_of(v.type);
}

class Checker {
 public:
  explicit Checker(const Lowered& lowered) : l_(lowered), p_(lowered.program) {}

  // What is wrong, an operation and a fault a line.
  std::vector<std::string> faults() {
    regions();
    for (id_ = 0; id_ < p_.ops.size(); ++id_) {
      op_ = &p_.ops[id_];
      const auto operands = p_.operands(*op_);
      const auto first_write = std::ranges::find(operands, true, &Use::write);
      reads_ = {operands.begin(), first_write};
      writes_ = {first_write, operands.end()};
      require(std::ranges::all_of(writes_, &Use::write), "what it reads stands first");
      for (const Use& use : operands)
        if (use.buffer != kNoBuffer) inside(use);
      kind();
    }
    return std::move(faults_);
  }

 private:
  void require(bool holds, const char* what) {
    if (!holds && faults_.size() < 20) faults_.push_back(p_.op_name(id_) + ": " + what);
  }

  void regions() {
    for (size_t r = 1; r < p_.regions.size(); ++r) {
      const Region& region = p_.regions[r];
      id_ = region.first;
      require(region.first < region.last && region.last <= p_.ops.size(), "a region has operations");
      require(region.plan != kNoOp && region.plan < region.first, "a plan precedes its region");
      if (region.plan == kNoOp) continue;
      const Op& plan = p_.ops[region.plan];
      require(plan.kind == OpKind::plan_routing && plan.layer == region.layer && plan.region == 0,
              "the plan is its layer's");
      for (OpId op = region.first; op < region.last; ++op)
        require(p_.ops[op].region == r && p_.ops[op].layer == region.layer && p_.ops[op].routed != Routed::no,
                "all of a region works on routed rows");
    }
    for (id_ = 0; id_ < p_.ops.size(); ++id_) {
      const Op& op = p_.ops[id_];
      const bool inside =
          op.region != 0 && id_ >= p_.regions[op.region].first && id_ < p_.regions[op.region].last;
      require((op.routed != Routed::no) == inside, "routed work is inside of a region");
      require(inside || (!op.does.first_round && !op.does.last_round), "rounds are of regions");
    }
  }

  int64_t ranks() const { return op_->group == kNoGroup ? 1 : p_.groups[op_->group].size; }

  void inside(const Use& use) {
    const Buffer& buffer = p_.buffers[use.buffer];
    const View& v = use.view;
    require(v.rows > 0 && v.cols > 0 && v.count > 0, "a view has elements");
    require(v.offset >= 0 && v.rank_stride >= 0 && v.ld >= v.cols, "strides are at least what they span");
    require(v.count == 1 || v.stride >= (v.rows - 1) * v.ld + v.cols, "matrices of a view do not overlap");
    require(v.offset % size_of(v.type) == 0 && v.rank_stride % size_of(v.type) == 0, "elements are aligned");
    require(v.rank_stride == 0 || op_->group != kNoGroup, "an index is of a group");
    require(end_of(v, ranks()) <= buffer.bytes / buffer.slots, "a view lies inside its buffer's slot");
  }

  // ---- operands by position; null: missing
  const View* in(size_t i) const { return view(reads_, i); }
  const View* out(size_t i) const { return view(writes_, i); }
  static const View* view(std::span<const Use> uses, size_t i) {
    return i >= uses.size() || uses[i].buffer == kNoBuffer ? nullptr : &uses[i].view;
  }
  static bool is(const View* v, int64_t rows, int64_t cols, int64_t count = 1) {
    return v != nullptr && v->rows == rows && v->cols == cols && v->count == count;
  }
  static bool absent_or(const View* v, int64_t rows, int64_t cols, int64_t count = 1) {
    return v == nullptr || is(v, rows, cols, count);
  }
  static bool same(const View* a, const View* b) {
    return a != nullptr && b != nullptr && is(a, b->rows, b->cols, b->count);
  }
  bool compute(const View* v) const { return v != nullptr && v->type == (wide() ? Type::f32 : Type::bf16); }
  bool wide() const { return l_.work.precision == plan::Precision::fp32; }
  static bool typed(const View* v, Type type) { return v != nullptr && v->type == type; }
  static int64_t bytes(const View& v) { return v.elements() * size_of(v.type); }
  static int64_t bytes_of(std::span<const Use> uses) {
    int64_t sum = 0;
    for (const Use& use : uses) sum += use.buffer == kNoBuffer ? 0 : bytes(use.view);
    return sum;
  }
  int64_t v(int i) const { return p_.shape(*op_).v[static_cast<size_t>(i)]; }
  void operands(size_t reads, size_t writes) {
    require(reads_.size() == reads && writes_.size() == writes, "it has the operands of its kind");
  }
  // Nothing is written over what is read.
  void apart() {
    for (const Use& w : writes_)
      for (const Use& r : reads_)
        require(w.buffer == kNoBuffer || w.buffer != r.buffer, "it does not write over what it reads");
  }
  int64_t tokens() const { return l_.tokens(); }
  int64_t own_experts() const { return l_.model.experts / l_.layout.expert.size; }
  bool spills() const {
    return l_.plan.family == plan::Family::mop && l_.plan.least_loaded && l_.layout.expert.size > 1;
  }
  int64_t capacity() const { return p_.round_rows; }
  bool rounds(const View* r) const {
    return typed(r, Type::i32) && bytes(*r) == plan::round_plan_bytes(static_cast<int>(l_.layout.expert.size),
                                                                      static_cast<int>(l_.model.experts),
                                                                      static_cast<int>(l_.plan.spill_slots));
  }
  // A matrix of each own expert, and of each slot where experts may be borrowed.
  void of_experts(const View* own, const View* spilled, int64_t rows, int64_t cols) {
    require(is(own, rows, cols, own_experts()), "a matrix of each own expert");
    require(spills() ? is(spilled, rows, cols, l_.plan.spill_slots) : spilled == nullptr,
            "a matrix of each borrowed expert");
  }

  void kind() {
    const model::ModelConfig& c = l_.model;
    const Does& does = op_->does;
    const int64_t n = tokens(), k = c.top_k, e = c.experts, h = c.hidden, i = c.expert_intermediate,
                  r = capacity();
    switch (op_->kind) {
      case OpKind::gemm:
        operands(3, 1);
        apart();
        require(does.transpose_a ? is(in(0), v(2), v(0)) : is(in(0), v(0), v(2)), "A is (m, k)");
        require(does.transpose_b ? is(in(1), v(1), v(2)) : is(in(1), v(2), v(1)), "B is (k, n)");
        require(is(out(0), v(0), v(1)), "C is (m, n)");
        require(absent_or(in(2), 1, v(1)), "the bias is (1, n)");
        require(compute(in(0)) && compute(in(1)), "A and B are of the compute type");
        break;
      case OpKind::column_sum:
        operands(1, 1);
        require(is(out(0), 1, in(0)->cols) && v(0) == in(0)->elements(), "a sum a column");
        break;
      case OpKind::rms_norm:
        operands(3, 2);
        require(same(in(0), out(0)) && in(1)->rows == 1 && in(0)->cols % in(1)->cols == 0,
                "y is x's, w divides it");
        require((in(2) == nullptr) == (out(1) == nullptr), "a residual makes a sum");
        require(in(2) == nullptr || (same(in(2), in(0)) && same(out(1), in(0))), "the sum is x's");
        require(v(0) == in(0)->elements(), "elements");
        break;
      case OpKind::rms_norm_bwd:
        operands(4, 2);
        require(same(in(0), in(1)) && same(out(0), in(1)) && same(out(1), in(2)),
                "gradients are as what they are of");
        require(in(3) == nullptr || same(in(3), in(1)), "d_sum is x's");
        require(v(0) == in(0)->elements() && in(1)->cols % in(2)->cols == 0, "elements");
        break;
      case OpKind::rope:
        operands(3, 1);
        require(same(in(0), out(0)) && is(in(1), 1, in(0)->rows), "a position a row");
        head_widths(in(0), in(2));
        break;
      case OpKind::rope_bwd:
        operands(4, 2);
        require(same(in(0), out(0)) && is(in(1), 1, in(0)->rows), "a position a row");
        require((in(2) == nullptr) == (in(3) == nullptr) && (in(3) == nullptr) == (out(1) == nullptr),
                "with a norm: its input, weight and gradient");
        require(in(2) == nullptr || (same(in(2), in(0)) && same(in(3), out(1))),
                "gradients are as what they are of");
        head_widths(in(0), in(3));
        break;
      case OpKind::mla_keys:
      case OpKind::mla_keys_bwd: {
        operands(2, 2);
        const bool forward = op_->kind == OpKind::mla_keys;
        const View *kv = forward ? in(0) : out(0), *rope = forward ? in(1) : out(1),
                   *key = forward ? out(0) : in(0), *value = forward ? out(1) : in(1);
        const int64_t heads = kv->cols / (does.a + does.b);
        require(does.a == c.qk_nope_dim && does.b == c.v_head_dim && does.c == c.qk_rope_dim,
                "the model's widths");
        require(is(kv, kv->rows, heads * (does.a + does.b)) && is(rope, kv->rows, does.c) &&
                    is(key, kv->rows, heads * (does.a + does.c)) && is(value, kv->rows, heads * does.b),
                "keys and values of every head");
        require(v(0) == key->elements() + value->elements(), "elements");
        break;
      }
      case OpKind::attention_fwd:
      case OpKind::attention_bwd:
        attention();
        break;
      case OpKind::swiglu:
      case OpKind::clamped_swiglu:
        operands(2, 1);
        require(is(in(0), out(0)->rows, 2 * out(0)->cols) && v(0) == out(0)->elements(), "gate and up");
        require(op_->region == 0 ? in(1) == nullptr : rounds(in(1)) && is(out(0), r, i),
                "rounds of routed rows");
        break;
      case OpKind::swiglu_bwd:
      case OpKind::clamped_swiglu_bwd:
        require(is(in(0), in(1)->rows, 2 * in(1)->cols) && same(in(0), out(0)), "gate and up");
        require(v(0) == in(1)->elements(), "elements");
        if (op_->region == 0) {
          operands(2, 1);
          break;
        }
        operands(8, 3);
        require(rounds(in(2)) && is(in(3), 1, r) && is(in(4), r, i) && is(in(5), r, h), "routed rows");
        require(is(out(1), r, i) && is(out(2), 1, r) && typed(out(2), Type::f32), "gradients of the gates");
        if (c.expert_bias)
          of_experts(in(6), in(7), 1, h);
        else
          require(in(6) == nullptr && in(7) == nullptr, "no bias");
        break;
      case OpKind::topk:
        operands(2, 3);
        require(is(in(0), n, e) && typed(in(0), Type::f32), "a logit a token and expert");
        require(c.correction_bias ? is(in(1), 1, e) && typed(in(1), Type::f32) : in(1) == nullptr,
                "correction bias");
        gates(out(0), out(1));
        require(l_.work.balance_loss ? is(out(2), 1, 2 * e) && typed(out(2), Type::f32) : out(2) == nullptr,
                "load");
        require(v(0) == n * e, "elements");
        break;
      case OpKind::topk_bwd:
        operands(5, 1);
        require(is(in(0), n, k) && is(in(3), n, e) && is(out(0), n, e), "a gradient a logit");
        gates(in(1), in(2));
        require(l_.work.balance_loss ? is(in(4), 1, 2 * e) : in(4) == nullptr, "load");
        require(does.a == c.moe_layers() && does.b == n * l_.layout.ranks && does.c == l_.work.accumulate,
                "rows of all ranks and micro-batches");
        break;
      case OpKind::balance_loss:
        operands(1, 1);
        require(is(in(0), 1, 2 * e) && is(out(0), 1, 1) && typed(out(0), Type::f64) && does.accumulate,
                "one sum");
        break;
      case OpKind::sort:
        operands(1, 2);
        require(is(in(0), n, k) && is(out(0), 1, n * k) && is(out(1), 1, e), "every copy, every expert");
        require(typed(out(0), Type::i32) && typed(out(1), Type::i32), "counts are integers");
        break;
      case OpKind::plan_routing:
        operands(1, 1);
        require(is(in(0), l_.layout.expert.size, e) && rounds(out(0)), "everyone's counts");
        require(v(1) == bytes(*in(0)) && v(2) == bytes(*out(0)), "bytes");
        break;
      case OpKind::permute:
        operands(5, 3);
        apart();
        require(is(in(0), n, h) && rounds(in(2)) && is(out(0), r, h), "rows of a round");
        order(in(1));
        require((in(3) == nullptr) == (out(1) == nullptr) && (in(4) == nullptr) == (out(2) == nullptr),
                "pairs");
        require(in(3) == nullptr || (is(in(3), n, h) && is(out(1), r, h)), "rows of gradients");
        require(in(4) == nullptr || (is(in(4), n, k) && is(out(2), 1, r)), "a weight a row");
        break;
      case OpKind::unpermute:
        operands(4, 1);
        require(is(in(0), r, h) && rounds(in(2)) && is(in(3), n, k) && is(out(0), n, h) && does.accumulate,
                "rows of a round");
        order(in(1));
        break;
      case OpKind::unpermute_bwd:
        operands(4, 2);
        require(is(in(0), r, h) && rounds(in(2)) && is(in(3), 1, r) && is(out(0), n, h) && is(out(1), n, k),
                "rows of a round");
        order(in(1));
        break;
      case OpKind::grouped_gemm:
        apart();
        require(v(0) == r && v(3) == own_experts(), "rows of a round over the own experts");
        if (does.transpose_a) {
          operands(3, 2);
          require(is(in(0), r, v(1)) && is(in(1), r, v(2)) && rounds(in(2)), "rows of a round");
          of_experts(out(0), out(1), v(1), v(2));
          break;
        }
        operands(6, 1);
        require(is(in(0), r, v(2)) && rounds(in(1)) && is(out(0), r, v(1)), "rows of a round");
        of_experts(in(2), in(3), does.transpose_b ? v(1) : v(2), does.transpose_b ? v(2) : v(1));
        if (c.expert_bias && op_->phase != Phase::backward)
          of_experts(in(4), in(5), 1, v(1));
        else
          require(in(4) == nullptr && in(5) == nullptr, "no bias");
        break;
      case OpKind::expert_bias_bwd:
        operands(3, 2);
        require(in(0)->rows == r && rounds(in(1)) && absent_or(in(2), 1, r), "rows of a round");
        of_experts(out(0), out(1), 1, in(0)->cols);
        break;
      case OpKind::add:
        operands(2, 1);
        require(in(0)->elements() == out(0)->elements() && v(0) == out(0)->elements(), "elements");
        require(in(1) == nullptr ? does.accumulate : same(in(1), out(0)), "what is added");
        break;
      case OpKind::cast:
        operands(1, 1);
        require(in(0)->elements() == out(0)->elements() && v(0) == out(0)->elements(), "elements");
        require(v(1) == bytes(*in(0)) && v(2) == bytes(*out(0)), "bytes");
        break;
      case OpKind::clear:
        operands(0, 1);
        require(v(0) == out(0)->elements() && v(2) == bytes(*out(0)), "elements");
        break;
      case OpKind::sum_replicas:
        operands(1, 1);
        apart();
        require(does.a > 1 && out(0)->cols % does.b == 0 && is(in(0), out(0)->rows, out(0)->cols * does.a),
                "copies of every head");
        require(v(0) == in(0)->elements(), "elements");
        break;
      case OpKind::embedding:
        operands(2, 1);
        require(in(1)->rows == c.vocab && is(out(0), in(0)->cols, in(1)->cols) && in(0)->rows == 1,
                "a row an id");
        require(typed(in(0), Type::i32) && v(0) == out(0)->elements(), "elements");
        break;
      case OpKind::embedding_bwd:
        operands(2, 1);
        require(out(0)->rows == c.vocab && is(in(1), in(0)->cols, out(0)->cols) && in(0)->rows == 1,
                "a row an id");
        require(typed(in(0), Type::i32) && v(0) == in(1)->elements(), "elements");
        break;
      case OpKind::cross_entropy:
        operands(2, 1);
        require(in(0)->rows == in(1)->rows * in(1)->cols && typed(in(1), Type::i32), "a target a row");
        require(is(out(0), in(0)->rows, 3) && typed(out(0), Type::f32), "three statistics a row");
        require(v(0) == in(0)->elements() && does.a >= 0 && does.a < ranks(), "a block of the group");
        break;
      case OpKind::cross_entropy_bwd:
        operands(4, 2);
        require(
            same(in(0), out(0)) && reads_[0].buffer == writes_[0].buffer && in(0)->offset == out(0)->offset,
            "logits become their gradient");
        require(in(0)->rows == in(2)->rows * in(2)->cols && in(1)->cols == 3 && in(1)->rows == in(0)->rows,
                "statistics and a target a row");
        require(is(in(3), 1, 1) && typed(in(3), Type::f64) && absent_or(out(1), 1, 1), "sums");
        require(does.c == 0 || (in(1)->count == ranks() && does.b * ranks() == in(0)->rows),
                "everyone's rows");
        break;
      case OpKind::next_batch: {
        operands(0, 5);
        const int64_t t = l_.work.sequences * l_.work.context;
        require(is(out(0), 1, n) && is(out(1), 1, n) && is(out(2), 1, n) && is(out(3), 1, t),
                "tokens of the rank");
        require(is(out(4), 1, 1) && typed(out(4), Type::f64) && does.a < l_.work.accumulate, "their targets");
        break;
      }
      case OpKind::square_sum:
        operands(1, 1);
        require(is(out(0), 1, 1) && typed(out(0), Type::f64) && v(0) == in(0)->elements(), "one sum");
        require(does.a >= 1 && l_.layout.ranks % does.a == 0 && does.accumulate, "of so many replicas");
        break;
      case OpKind::clip_factor:
        operands(1, 1);
        require(is(in(0), 1, 1) && is(out(0), 1, 1) && typed(out(0), Type::f32), "one factor");
        break;
      case OpKind::adam:
      case OpKind::adam_host:
        adam();
        break;
      case OpKind::copy_h2d:
      case OpKind::copy_d2h:
        require(bytes_of(reads_) == bytes_of(writes_) && v(0) == bytes_of(reads_),
                "as many bytes as are read");
        spaces();
        break;
      case OpKind::all_gather:
        operands(1, 1);
        apart();
        require(in(0)->type == out(0)->type && ranks() * in(0)->elements() == out(0)->elements(),
                "everyone's part");
        require(v(0) == bytes(*out(0)), "bytes of the whole");
        break;
      case OpKind::reduce_scatter:
        operands(1, 1);
        apart();
        require(ranks() * out(0)->elements() == in(0)->elements(), "a part of the sum");
        require(v(0) == bytes(*in(0)), "bytes of the whole");
        break;
      case OpKind::all_reduce:
        operands(1, 1);
        require(
            same(in(0), out(0)) && reads_[0].buffer == writes_[0].buffer && in(0)->offset == out(0)->offset,
            "in place");
        require(v(0) == bytes(*in(0)), "bytes of the whole");
        break;
      case OpKind::send_recv:
        operands(1, 1);
        apart();
        require(in(0)->type == out(0)->type && in(0)->elements() == out(0)->elements(), "as much as is sent");
        require(v(0) == bytes(*in(0)) && v(1) == bytes(*out(0)), "bytes");
        break;
      case OpKind::all_to_all:
        apart();
        exchange();
        break;
      default:
        require(false, "it is in the instruction set");
    }
  }

  void gates(const View* ids, const View* weights) {
    require(is(ids, tokens(), l_.model.top_k) && typed(ids, Type::i32), "ids of the experts");
    require(same(ids, weights) && typed(weights, Type::f32), "a weight an id");
  }

  void order(const View* order) {
    require(is(order, 1, l_.copies()) && typed(order, Type::i32), "every routed copy");
  }

  void head_widths(const View* x, const View* norm) {
    const Does& does = op_->does;
    require(does.a > 0 && x->cols % does.a == 0, "whole heads");
    require(does.b >= 0 && does.c > 0 && does.b + does.c <= does.a && does.c % 2 == 0,
            "rotated part of a head");
    require(norm == nullptr || (norm->rows == 1 && x->cols % norm->cols == 0), "whole groups are normalised");
    require(v(0) == x->elements(), "elements");
  }

  void attention() {
    const auto a = AttentionShape::of(p_.shape(*op_));
    const int64_t t = a.batch * a.q_len, q = a.heads * a.qk_dim, k = a.kv_heads * a.qk_dim,
                  vals = a.kv_heads * a.v_dim, o = a.heads * a.v_dim;
    const bool sinks = l_.model.sinks;
    const int64_t all_sinks = a.heads * ranks();
    require(t == l_.work.sequences * l_.work.context && a.kv_len == a.q_len && a.causal == 1,
            "whole sequences");
    require(op_->does.b == a.window, "the window is the layer's");
    require(a.heads % a.kv_heads == 0, "a key head has whole query heads");
    require(is(in(0), t, q) && is(in(1), t, k) && is(in(2), t, vals), "queries, keys and values");
    if (op_->kind == OpKind::attention_fwd) {
      operands(5, 2);
      require(is(in(3), 1, t) && typed(in(3), Type::i32), "starts");
      require(sinks ? is(in(4), 1, all_sinks) : in(4) == nullptr, "sinks of the group's heads");
      require(is(out(0), t, o) && is(out(1), t, a.heads) && typed(out(1), Type::f32), "outputs");
      return;
    }
    operands(8, 4);
    require(is(in(3), t, o) && is(in(4), t, o) && is(in(5), t, a.heads) && typed(in(5), Type::f32),
            "outputs");
    require(is(in(6), 1, t) && typed(in(6), Type::i32), "starts");
    require(sinks ? is(in(7), 1, all_sinks) && same(in(7), out(3)) : in(7) == nullptr && out(3) == nullptr,
            "sinks of the group's heads");
    require(same(in(0), out(0)) && same(in(1), out(1)) && same(in(2), out(2)), "a gradient of each");
  }

  void adam() {
    const Does& does = op_->does;
    const bool host = op_->kind == OpKind::adam_host;
    require(reads_.size() >= 3 && reads_.size() - 2 == writes_.size() - 1, "pairs of gradient and weight");
    require(absent_or(in(0), 1, 1) && (in(0) != nullptr) == l_.plan.clip, "the clip factor");
    require(same(in(1), out(0)) && reads_[1].buffer == writes_[0].buffer && in(1)->offset == out(0)->offset,
            "states in place");
    int64_t updated = 0;
    for (size_t i = 1; i < writes_.size(); ++i) {
      require(out(i)->elements() == in(i + 1)->elements(), "a gradient a weight");
      updated += out(i)->elements();
    }
    const auto master = static_cast<Master>(does.b);
    require((master == Master::weights) == (l_.plan.family == plan::Family::fsdp2),
            "fsdp2's weights are the master");
    require(master != Master::low || (!host && out(1)->type == Type::bf16),
            "low bits are of bf16 weights in HBM");
    require(typed(in(1), Type::f32) && in(1)->elements() * size_of(Type::f32) == state_bytes(master) * does.a,
            "a block of states");
    require(v(0) == updated && updated <= does.a, "elements");
    for (const Use& use : p_.uses_of(*op_))
      if (in(0) == nullptr || use.buffer != reads_[0].buffer)
        require((p_.buffers[use.buffer].space == Space::host) == host, "memory of who updates");
  }

  void spaces() {
    const bool up = op_->kind == OpKind::copy_h2d;
    for (const Use& use : p_.uses_of(*op_))
      require((p_.buffers[use.buffer].space == Space::host) == (use.write != up), "between host and HBM");
  }

  void exchange() {
    const Does& does = op_->does;
    const size_t rounds_first = op_->routed == Routed::no ? 0 : 1;
    const int64_t r = capacity();
    if (rounds_first == 1) require(rounds(in(0)), "the rounds stand first");
    const auto x = reads_.subspan(rounds_first);
    switch (does.exchange) {
      case Exchange::columns_to_rows:
        require(x.size() == writes_.size() && v(0) == bytes_of(writes_) && v(1) == bytes_of(writes_),
                "bytes");
        for (size_t j = 0; j < x.size() && j < writes_.size(); ++j) {
          const View &from = x[j].view, &to = writes_[j].view;
          require(to.rows == ranks() * from.rows && from.type == to.type, "everyone's rows");
          // Heads: whole blocks, each for one rank or several. Columns of the embedding: rounded up, so that
          // the last ranks may have fewer of them, or none.
          const int64_t blocks = ceil_div(from.cols, to.cols);
          const bool heads = from.cols % to.cols == 0 && ranks() % blocks == 0;
          require(op_->component == Component::embedding ? to.cols == ceil_div(from.cols, ranks()) &&
                                                               (blocks == ranks() || ranks() % blocks != 0)
                                                         : heads,
                  "a block a rank");
        }
        break;
      case Exchange::rows_to_columns:
        require(x.size() == writes_.size() && v(0) == bytes_of(x) && v(1) == bytes_of(x), "bytes");
        for (size_t j = 0; j < x.size() && j < writes_.size(); ++j) {
          const View &from = x[j].view, &to = writes_[j].view;
          require(from.rows == ranks() * to.rows && from.type == to.type, "own rows");
          require(op_->component == Component::embedding ? from.cols == ceil_div(to.cols, ranks())
                                                         : to.cols == ranks() * from.cols,
                  "everyone's columns");
        }
        break;
      case Exchange::dispatch:
      case Exchange::combine:
        require(op_->routed == (does.exchange == Exchange::dispatch ? Routed::dispatch : Routed::combine),
                "routed");
        require(x.size() == writes_.size() && v(0) == bytes_of(x) && v(1) == bytes_of(writes_), "bytes");
        for (size_t j = 0; j < x.size() && j < writes_.size(); ++j) {
          require(same(&x[j].view, &writes_[j].view) && x[j].view.type == writes_[j].view.type, "alike");
          require(x[j].view.rows == r || is(&x[j].view, 1, r), "rows of a round");
        }
        break;
      case Exchange::spill_weights: {
        operands(2, 1);
        const int64_t each = l_.parameter_layout().expert_elements();
        of_experts(in(1), out(0), 1, each);
        require(v(0) == bytes(*out(0)) && v(1) == v(0) && does.first_round && !does.accumulate,
                "once a pass");
        break;
      }
      case Exchange::spill_gradients: {
        operands(2, 2);
        const int64_t each = l_.parameter_layout().expert_elements();
        of_experts(out(1), in(1), 1, each);
        require(same(in(1), out(0)) && in(1)->type == out(0)->type, "what returns is staged");
        require(v(0) == bytes(*in(1)) && v(1) == v(0) && does.last_round && does.accumulate, "once a pass");
        break;
      }
      case Exchange::none:
        require(false, "an exchange of its kind");
    }
  }

  const Lowered& l_;
  const StepProgram& p_;
  OpId id_ = 0;
  const Op* op_ = nullptr;
  std::span<const Use> reads_, writes_;
  std::vector<std::string> faults_;
};

std::vector<std::string> faults(const Lowered& l) {
  return Checker(l).faults();
}

TEST(Operands, OfTinyPrograms) {
  for (const Case& c : tiny_native_cases()) {
    SCOPED_TRACE(c.text());
    ASSERT_THAT(faults(c.lower()), ::testing::IsEmpty());
  }
}

TEST(Operands, OfShippedModels) {
  for (const std::string& name : model::shipped_models()) {
    if (name.starts_with("tiny")) continue;
    const model::ModelConfig c = model::read_config(name);
    const bool chunked = c.heads % 4 == 0 && c.qk_norm != model::QkNorm::full;
    for (const std::string& plan :
         {mop_plan(8, 16, 2, 8, chunked ? "head-chunks=2,reduce=fp32" : "reduce=fp32"),
          mop_plan(4, 8, 4, 16, "vp-scheme=weights,optimizer=stream,mla-exchange=latent,checkpoints=host"),
          mop_plan(2, 16, 1, 2, "save-attention=off,optimizer=host,clip=off"),
          std::string("fsdp2:runtime=native,ep=8"),
          std::string("fsdp2:runtime=native,replicate=2,offload=on,cp=4"),
          std::string("fsdp2:runtime=native,tp=2,cp=2,recompute=none")}) {
      SCOPED_TRACE(name + " " + plan);
      ASSERT_THAT(faults(lower_model(name, plan, 16, 8192)), ::testing::IsEmpty());
    }
  }
}

// GPUs that divide nothing evenly: padded shards, columns and vocabularies.
TEST(Operands, OfOddGroups) {
  for (const char* name : kTinyModels)
    for (const std::string& plan :
         {mop_plan(4, 12, 2, 12), mop_plan(2, 6, 1, 6, "vp-scheme=weights,reduce=fp32"),
          std::string("fsdp2:runtime=native,ep=4")}) {
      SCOPED_TRACE(std::string(name) + " " + plan);
      ASSERT_THAT(faults(lower_model(name, plan, 12, 192)), ::testing::IsEmpty());
    }
}

TEST(Operands, OnlyOurProgramsRun) {
  for (const Case& c : tiny_cases()) {
    const Lowered l = c.lower();
    EXPECT_EQ(l.program.runnable, l.plan.native()) << c.text();
    EXPECT_EQ(l.program.shards.empty(), !l.plan.native()) << c.text();
  }
}

// The checker sees what it is there for.
TEST(Operands, FaultsAreFound) {
  const Case c = tiny_native_cases("tiny-gpt-oss")[0];
  const auto broken = [&](OpKind kind, const auto& change) {
    Lowered l = c.lower();
    for (Op& op : l.program.ops) {
      if (op.kind != kind) continue;
      change(l.program, op);
      return faults(l);
    }
    ADD_FAILURE() << "no " << name(kind);
    return std::vector<std::string>{};
  };
  const auto use = [](StepProgram& p, const Op& op, uint32_t i) -> Use& { return p.uses[op.uses + i]; };
  using ::testing::Contains;
  using ::testing::HasSubstr;
  EXPECT_THAT(broken(OpKind::gemm, [&](StepProgram& p, Op& op) { use(p, op, 3).view.offset += 2; }),
              Contains(HasSubstr("inside its buffer's slot")));
  EXPECT_THAT(broken(OpKind::gemm, [&](StepProgram& p, Op& op) { ++use(p, op, 0).view.cols; }),
              Contains(HasSubstr("A is (m, k)")));
  EXPECT_THAT(
      broken(OpKind::gemm, [&](StepProgram& p, Op& op) { use(p, op, 3).buffer = use(p, op, 0).buffer; }),
      Contains(HasSubstr("does not write over")));
  EXPECT_THAT(broken(OpKind::all_gather, [&](StepProgram& p, Op& op) { --use(p, op, 0).view.cols; }),
              Contains(HasSubstr("everyone's part")));
  EXPECT_THAT(broken(OpKind::adam, [&](StepProgram& p, Op& op) { --use(p, op, 2).view.cols; }),
              Contains(HasSubstr("a gradient a weight")));
  EXPECT_THAT(broken(OpKind::permute, [&](StepProgram& p, Op& op) { use(p, op, 1).buffer = kNoBuffer; }),
              Contains(HasSubstr("every routed copy")));
  EXPECT_THAT(broken(OpKind::grouped_gemm, [&](StepProgram& p, Op& op) { --use(p, op, 2).view.count; }),
              Contains(HasSubstr("own expert")));
  EXPECT_THAT(broken(OpKind::plan_routing, [&](StepProgram&, Op& op) { ++op.layer; }),
              Contains(HasSubstr("the plan is its layer's")));
}

}  // namespace
}  // namespace mop::program::testing
