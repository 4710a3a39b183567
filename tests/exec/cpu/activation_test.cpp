#include "exec/cpu/routing.h"
#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

// The limit is no bf16 value: differences across it would be halves.
constexpr double kLimit = 1.5 + 1.0 / 1024, kAlpha = 1.702;

double reference(bool clamped, double gate, double up) {
  if (!clamped) return gate / (1 + std::exp(-gate)) * up;
  gate = std::min(gate, kLimit);
  up = std::max(std::min(up, kLimit), -kLimit);
  return (up + 1) * gate / (1 + std::exp(-kAlpha * gate));
}

Values reference(bool clamped, const Values& gate_up, int64_t width) {
  Values act;
  for (int64_t r = 0; r < std::ssize(gate_up) / (2 * width); ++r)
    for (int64_t i = 0; i < width; ++i)
      act.push_back(reference(clamped, gate_up[static_cast<size_t>(2 * r * width + i)],
                              gate_up[static_cast<size_t>((2 * r + 1) * width + i)]));
  return act;
}

Setting limits() {
  Setting setting;
  setting.model.swiglu_limit = kLimit;
  setting.model.swiglu_alpha = kAlpha;
  return setting;
}

OpKind forward(bool clamped) {
  return clamped ? OpKind::clamped_swiglu : OpKind::swiglu;
}
OpKind backward(bool clamped) {
  return clamped ? OpKind::clamped_swiglu_bwd : OpKind::swiglu_bwd;
}

TEST(SwiGlu, ForwardAndBackward) {
  for (const bool clamped : {false, true}) {
    for (const Type type : kReals) {
      for (const int64_t width : {1, 7, 600}) {
        const int64_t rows = 3;
        Tensor gate_up = Tensor::random(rows, 2 * width, type), act(rows, width, type),
               d_act = Tensor::random(rows, width, type), d_gate_up(rows, 2 * width, type);
        run_op(forward(clamped), {}, {&gate_up, nullptr}, {&act}, limits());
        expect_close(act, reference(clamped, gate_up.values(), width));

        // Element by element: everything else is independent of it.
        Values want;
        for (int64_t i = 0; i < gate_up.size(); ++i) {
          const int64_t r = i / (2 * width), col = i % (2 * width) % width;
          const bool of_gate = i % (2 * width) < width;
          const double gate = gate_up.at(2 * r * width + col), up = gate_up.at((2 * r + 1) * width + col);
          const double slope = numeric_gradient(
              [&](const Values& x) { return reference(clamped, of_gate ? x[0] : gate, of_gate ? up : x[0]); },
              {of_gate ? gate : up})[0];
          want.push_back(slope * d_act.at(r * width + col));
        }
        run_op(backward(clamped), {}, {&gate_up, &d_act}, {&d_gate_up}, limits());
        expect_close(d_gate_up, want);
        run_op(backward(clamped), {}, {&gate_up, &d_act}, {&gate_up}, limits());  // in place
        EXPECT_EQ(gate_up.values(), d_gate_up.values());
      }
    }
  }
}

// At and beyond the limits there is no gradient but from the side that counts.
TEST(SwiGlu, ClampsExactly) {
  Tensor gate_up = Tensor::of(1, 8, {kLimit + 1, -5, 0.5, kLimit, 0.3, kLimit + 1, -kLimit - 1, kLimit}),
         d_act = Tensor::of(1, 4, {1, 1, 1, 1}), d(1, 8);
  run_op(OpKind::clamped_swiglu_bwd, {}, {&gate_up, &d_act}, {&d}, limits());
  EXPECT_EQ(d.at(0), 0);  // gate above
  EXPECT_NE(d.at(1), 0);  // no lower limit
  EXPECT_NE(d.at(3), 0);  // at the limit
  EXPECT_NE(d.at(4), 0);
  EXPECT_EQ(d.at(5), 0);  // up above
  EXPECT_EQ(d.at(6), 0);  // up below
  EXPECT_NE(d.at(7), 0);
}

// One rank's rows of a round, with borrowed experts: gradient of weight x (act W + bias) . d_out, where
// d_act = W d_out.
TEST(SwiGlu, RoutedBackwardAppliesTheGateWeights) {
  constexpr int kRanks = 2, kExperts = 4, kSlots = 2;
  Setting setting = limits();
  setting.index = 0;
  setting.size = kRanks;
  setting.round_rows = 40;
  setting.spill_slots = kSlots;
  setting.least_loaded = {1.0, 1, 0};
  Tensor counts = Tensor::contiguous(kRanks, kExperts, {1, 2, 20, 3, 0, 3, 22, 9}, Type::i32);
  const int64_t words = plan::round_plan_bytes(kRanks, kExperts, kSlots) / 4 + 1024;
  Tensor rounds = Tensor::contiguous(1, words, Values(static_cast<size_t>(words)), Type::i32);
  run_op(OpKind::plan_routing, {}, {&counts}, {&rounds}, setting);

  program::Op op{};
  const Call call{0, &op, {}, {}, setting.index, setting.size, setting.round};
  std::vector<std::pair<bool, int>> expert_of;  // of each row: own, index
  for_each_expert(call, rounds.operand(), [&](int64_t first, int64_t last, int own, int slot) {
    ASSERT_EQ(first, std::ssize(expert_of));
    expert_of.resize(static_cast<size_t>(last), {own >= 0, own >= 0 ? own : slot});
  });
  const int64_t n = std::ssize(expert_of), capacity = n + 3, width = 5, h = 6;
  ASSERT_GT(n, 10);
  ASSERT_TRUE(std::any_of(expert_of.begin(), expert_of.end(), [](const auto& e) { return !e.first; }));

  for (const bool clamped : {false, true}) {
    for (const bool biased : {false, true}) {
      Tensor gate_up = Tensor::random(capacity, 2 * width), act(capacity, width),
             d_act = Tensor::random(capacity, width), weights = Tensor::random(1, capacity),
             dy = Tensor::random(capacity, h), bias = Tensor::random(1, h, Type::bf16, kExperts / kRanks),
             spilled_bias = Tensor::random(1, h, Type::bf16, kSlots), d_weights = Tensor::random(1, capacity);
      const Values act_before = Values(static_cast<size_t>(act.size()), 7),
                   weights_before = d_weights.values();
      act.set(act_before);
      run_op(forward(clamped), {}, {&gate_up, &rounds}, {&act}, setting);
      Values want_act = reference(clamped, gate_up.values(), width);
      std::fill(want_act.begin() + n * width, want_act.end(), 7.0);  // rows beyond the round: untouched
      expect_close(act, want_act);

      Values want_weights = weights_before, want_gate_up = gate_up.values();
      for (int64_t r = 0; r < n; ++r) {
        const auto rs = static_cast<size_t>(r);
        double d = 0;
        for (int64_t i = 0; i < width; ++i) d += act.at(r * width + i) * d_act.at(r * width + i);
        Tensor& from = expert_of[rs].first ? bias : spilled_bias;
        for (int64_t i = 0; biased && i < h; ++i)
          d += from.at(expert_of[rs].second * h + i) * dy.at(r * h + i);
        want_weights[rs] = d;
        for (int64_t i = 0; i < width; ++i) {
          want_act[static_cast<size_t>(r * width + i)] *= weights.at(r);
          const double gate = gate_up.at(2 * r * width + i), up = gate_up.at((2 * r + 1) * width + i);
          const Values slope =
              numeric_gradient([&](const Values& x) { return reference(clamped, x[0], x[1]); }, {gate, up});
          want_gate_up[static_cast<size_t>(2 * r * width + i)] =
              slope[0] * weights.at(r) * d_act.at(r * width + i);
          want_gate_up[static_cast<size_t>((2 * r + 1) * width + i)] =
              slope[1] * weights.at(r) * d_act.at(r * width + i);
        }
      }
      run_op(backward(clamped), {},
             {&gate_up, &d_act, &rounds, &weights, &act, biased ? &dy : nullptr, biased ? &bias : nullptr,
              biased ? &spilled_bias : nullptr},
             {&gate_up, &act, &d_weights}, setting);
      expect_close(gate_up, want_gate_up);
      expect_close(act, want_act);
      expect_close(d_weights, want_weights);
    }
  }
}

}  // namespace
}  // namespace mop::cpu
