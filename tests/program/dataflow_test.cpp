// Programs that run, walked element by element on the tiny models: nothing is read, or added to, that the
// step has not written before, and no contribution to a gradient is overwritten before it is read. State that
// lives on from step to step is weights, optimizer states and, for what is deferred, the gradients.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

// Which of an operation's outputs are added to: those marked + in ops.h, where Does says so.
bool adds_to(const Op& op, size_t output, int round) {
  switch (op.kind) {
    case OpKind::unpermute:
      return true;
    case OpKind::grouped_gemm:
    case OpKind::expert_bias_bwd:
      if (op.kind == OpKind::grouped_gemm && !op.does.transpose_a) return false;
      return round > 0 || (op.does.accumulate && output == 0);
    case OpKind::unpermute_bwd:
      return output == 0;
    case OpKind::attention_bwd:
      return output == 3 ? op.does.a == 1 : op.does.accumulate && output != 0;
    case OpKind::rms_norm_bwd:
    case OpKind::rope_bwd:
    case OpKind::mla_keys_bwd:
    case OpKind::cross_entropy_bwd:
      return op.does.accumulate && output == 1;
    case OpKind::topk:
      return op.does.accumulate && output == 2;
    case OpKind::next_batch:
      return op.does.accumulate && output == 4;
    case OpKind::all_to_all:
      return op.does.accumulate && output == 1;
    default:
      return op.does.accumulate;
  }
}

class Walk {
 public:
  // first: this rank comes first in all of its groups, else last.
  Walk(const Lowered& lowered, bool first) : p_(lowered.program), first_(first) {
    for (const Buffer& b : p_.buffers) {
      state_.emplace_back(static_cast<size_t>(b.bytes / b.slots / kUnit));
      const bool kept = b.persistent && (b.holds == Holds::weights || b.holds == Holds::optimizer_states);
      if (kept) std::memset(state_.back().data(), kWritten, state_.back().size());
    }
  }

  // One step, then what is deferred to the next one: that works on what this step left.
  std::vector<std::string> faults() {
    for (OpId id = 0; id < p_.ops.size() && faults_.empty();) {
      const Op& op = p_.ops[id];
      if (op.region == 0) {
        if (!op.does.deferred) run(id, 0);
        ++id;
        continue;
      }
      const Region& region = p_.regions[op.region];
      for (int round = 0; round < 2; ++round)
        for (id = region.first; id < region.last; ++id)
          if ((round == 0 || !p_.ops[id].does.first_round) && (round == 1 || !p_.ops[id].does.last_round))
            run(id, round);
    }
    after_step_ = state_;
    for (BufferId b = 0; b < p_.buffers.size(); ++b)
      if (!p_.buffers[b].persistent) std::memset(state_[b].data(), 0, state_[b].size());
    for (OpId id = 0; id < p_.ops.size() && faults_.empty(); ++id)
      if (p_.ops[id].does.deferred) run(id, 0);
    for (const Shard& s : p_.shards)
      if (s.gradient != kNoBuffer && !all(s.gradient, kRead))
        fault(0, "no update has read all of", s.gradient);
    return std::move(faults_);
  }

  static constexpr int64_t kUnit = 2;  // bytes that have a state of their own: the smallest element

  // Has an operation of the step put something other than zeros there?
  bool contributed(BufferId b, size_t unit) const { return (after_step_[b][unit] & kContributed) != 0; }

 private:
  static constexpr uint8_t kWritten = 1, kRead = 2, kContributed = 4;

  void fault(OpId id, const char* what, BufferId buffer) {
    if (faults_.size() < 10) faults_.push_back(p_.op_name(id) + " " + what + " " + p_.buffer_name(buffer));
  }
  bool all(BufferId b, uint8_t state) const {
    return std::ranges::all_of(state_[b], [&](uint8_t unit) { return (unit & state) == state; });
  }

  // f(states, how many) for every row of a view; rows that follow one another are one.
  template <typename F>
  void rows(const Op& op, const Use& use, F f) {
    const View& v = use.view;
    const int64_t index = op.group == kNoGroup || first_ ? 0 : p_.groups[op.group].size - 1;
    const int64_t element = size_of(v.type) / kUnit, joined = v.ld == v.cols ? v.rows : 1;
    uint8_t* const start = state_[use.buffer].data() + (v.offset + index * v.rank_stride) / kUnit;
    for (int64_t m = 0; m < v.count; ++m)
      for (int64_t r = 0; r < v.rows; r += joined)
        f(start + (m * v.stride + r * v.ld) * element, static_cast<size_t>(joined * v.cols * element));
  }

  void read(OpId id, const Op& op, const Use& use, const char* what) {
    uint8_t common = kWritten;
    rows(op, use, [&](uint8_t* row, size_t count) {
      for (size_t i = 0; i < count; ++i) common &= row[i], row[i] |= kRead;
    });
    if (common == 0) fault(id, what, use.buffer);
  }

  void write(OpId id, const Op& op, const Use& use, bool adds) {
    if (adds) read(id, op, use, "adds to what nothing has written in");
    const Holds holds = p_.buffers[use.buffer].holds;
    const bool gradient = holds == Holds::gradients || holds == Holds::unsharded_gradients;
    // Zeros are no contribution; a sum that was added to still has to be read.
    const bool contributes = gradient && op.kind != OpKind::clear;
    constexpr uint8_t kUnread = kWritten | kContributed;
    bool lost = false;
    rows(op, use, [&](uint8_t* row, size_t count) {
      if (contributes && !adds)
        for (size_t i = 0; i < count; ++i) lost |= row[i] == kUnread;
      std::memset(row, contributes ? kUnread : kWritten | kRead, count);
    });
    if (lost) fault(id, "overwrites what nobody has read of", use.buffer);
  }

  void run(OpId id, int round) {
    const Op& op = p_.ops[id];
    size_t output = 0;
    for (const Use& use : p_.operands(op)) {
      if (use.write) {
        if (use.buffer != kNoBuffer) write(id, op, use, adds_to(op, output, round));
        ++output;
      } else if (use.buffer != kNoBuffer) {
        read(id, op, use, "reads what nothing has written in");
      }
    }
    if (op.kind != OpKind::copy_d2h) return;
    // What has gone home from a ring is gone: its slot is somebody else's next.
    for (const Use& use : p_.uses_of(op))
      if (!use.write && p_.buffers[use.buffer].holds == Holds::staging)
        rows(op, use, [](uint8_t* row, size_t count) { std::memset(row, 0, count); });
  }

  const StepProgram& p_;
  const bool first_;
  std::vector<std::vector<uint8_t>> state_, after_step_;  // by buffer, of one slot, by unit
  std::vector<std::string> faults_;
};

// Every parameter of a layer gets a gradient, on one rank of the sequence group at least. (Of those that are
// reduced over ranks: the others have no buffer of their own.)
void expect_contributions(const Lowered& l, const Walk& first, const Walk& last) {
  const ParameterLayout layout = l.parameter_layout();
  const bool wide = l.plan.reduce == plan::Reduce::fp32 || l.work.precision == plan::Precision::fp32;
  for (BufferId b = 0; b < l.program.buffers.size(); ++b) {
    const std::string label = l.program.buffers[b].label;
    const bool dense = label == "dense_gradient_whole", experts = label == "expert_gradient_whole";
    if (!dense && !experts) continue;
    const int64_t elements =
        layout.elements({dense ? FlatPart::dense : FlatPart::experts, l.program.buffers[b].layer}) /
        (dense ? 1 : l.layout.expert.size);
    size_t missing = 0;
    for (size_t unit = 0; unit < static_cast<size_t>(elements * (wide ? 4 : 2) / Walk::kUnit); ++unit)
      missing += !first.contributed(b, unit) && !last.contributed(b, unit);
    EXPECT_EQ(missing, 0u) << l.program.buffer_name(b);
  }
}

TEST(Dataflow, EverythingReadIsWrittenBefore) {
  for (const Case& c : tiny_native_cases()) {
    SCOPED_TRACE(c.text());
    const Lowered l = c.lower();
    Walk first(l, true), last(l, false);
    ASSERT_THAT(first.faults(), ::testing::IsEmpty());
    ASSERT_THAT(last.faults(), ::testing::IsEmpty());
    // The first and the last of two ranks are all of them; more than two share no latents in these cases.
    expect_contributions(l, first, last);
    if (HasFailure()) return;
  }
}

// Shards with padding at their ends.
TEST(Dataflow, OfOddGroups) {
  for (const char* name : kTinyModels)
    for (const std::string& plan : {mop_plan(4, 12, 2, 12, "optimizer=host,clip=off"),
                                    mop_plan(2, 6, 1, 6, "vp-scheme=weights,optimizer=stream,reduce=fp32"),
                                    std::string("fsdp2:runtime=native,ep=4,offload=on")}) {
      SCOPED_TRACE(std::string(name) + " " + plan);
      const Lowered l = lower_model(name, plan, 12, 96);
      ASSERT_THAT(Walk(l, false).faults(), ::testing::IsEmpty());
    }
}

TEST(Dataflow, FaultsAreFound) {
  const Case c = {"tiny-gpt-oss", mop_plan(4, 8, 2, 8, "vp-tile=32"), 8, 256, 2, 1};
  using ::testing::Contains;
  using ::testing::HasSubstr;
  const auto broken = [&](OpKind kind, const auto& applies, const auto& change) {
    Lowered l = c.lower();
    for (Op& op : l.program.ops)
      if (op.kind == kind && applies(l.program, op)) {
        change(l.program, op);
        return Walk(l, true).faults();
      }
    ADD_FAILURE() << "no " << name(kind);
    return std::vector<std::string>{};
  };
  const auto writes = [](const char* label) {
    return [=](const StepProgram& p, const Op& op) {
      const Use& use = p.operands(op).back();
      return use.buffer != kNoBuffer && std::string(p.buffers[use.buffer].label) == label;
    };
  };
  // The first product of a gradient adds to nothing; the second overwrites the first.
  EXPECT_THAT(broken(OpKind::gemm, writes("dense_gradient_whole"),
                     [](StepProgram&, Op& op) { op.does.accumulate = true; }),
              Contains(HasSubstr("adds to what nothing has written in dense_gradient_whole")));
  EXPECT_THAT(broken(
                  OpKind::gemm,
                  [](const StepProgram&, const Op& op) {
                    return op.does.accumulate && op.component == Component::vocabulary;
                  },
                  [](StepProgram&, Op& op) { op.does.accumulate = false; }),
              Contains(HasSubstr("overwrites what nobody has read of dense_gradient")));
  // So do the products of the first round.
  EXPECT_THAT(broken(
                  OpKind::grouped_gemm, [](const StepProgram&, const Op& op) { return op.does.transpose_a; },
                  [](StepProgram&, Op& op) { op.does.accumulate = true; }),
              Contains(HasSubstr("adds to what nothing has written in expert_gradient_whole")));
  // A gap in what is gathered.
  EXPECT_THAT(broken(OpKind::all_gather, writes("gathered_dense"),
                     [](StepProgram& p, Op& op) { p.uses[op.uses + 1].view.cols /= 2; }),
              Contains(HasSubstr("reads what nothing has written in gathered_dense")));
}

}  // namespace
}  // namespace mop::program::testing
