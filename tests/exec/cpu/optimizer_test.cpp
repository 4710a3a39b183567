#include <bit>
#include <limits>

#include "tests/error_of.h"
#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

interpreter::AdamW settings(int64_t step) {
  return {step, 3e-3, 0.9, 0.95, 1e-8, 0.1};
}

// One element, by the paper's formulas.
void reference(double& w, double& m, double& v, double g, const interpreter::AdamW& a) {
  const auto t = static_cast<double>(a.step);
  w -= a.learning_rate * a.weight_decay * w;
  m = a.beta1 * m + (1 - a.beta1) * g;
  v = a.beta2 * v + (1 - a.beta2) * g * g;
  w -= a.learning_rate * (m / (1 - std::pow(a.beta1, t))) /
       (std::sqrt(v / (1 - std::pow(a.beta2, t))) + a.eps);
}

// Two pairs, whose border lies inside a block, over several steps.
TEST(Adam, UpdatesEveryPairFromItsBlocks) {
  for (const bool master : {true, false}) {
    for (const Type gradient_type : kReals) {
      for (const OpKind kind : {OpKind::adam, OpKind::adam_host}) {
        const int64_t bucket = 70, blocks = 3, parts = master ? 3 : 2, n1 = 90, n2 = 45;
        const int64_t n = n1 + n2;
        const Type weight_type = master ? Type::bf16 : Type::f32;
        Values initial = normal(blocks * bucket * parts);
        for (double& value : initial) value = std::abs(value);  // v >= 0
        Tensor states = Tensor::contiguous(1, blocks * bucket * parts, initial),
               w1 = Tensor::random(9, 10, weight_type), w2 = Tensor::random(1, n2, weight_type);
        const auto state = [&](int64_t element, int64_t part) {
          return ((element / bucket) * parts + part) * bucket + element % bucket;
        };
        Values w, m, v;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t element = i;
          w.push_back(master ? states.at(state(element, 0)) : i < n1 ? w1.at(i) : w2.at(i - n1));
          m.push_back(states.at(state(element, parts - 2)));
          v.push_back(states.at(state(element, parts - 1)));
        }
        Setting setting;
        Does does;
        does.a = static_cast<int32_t>(bucket);
        does.b = master ? 0 : 1;
        for (int64_t step = 1; step <= 3; ++step) {
          does.deferred = step == 2;
          setting.step.adam = settings(step == 2 ? 99 : step);
          setting.step.deferred = settings(step == 2 ? step : 77);
          Tensor g1 = Tensor::random(9, 10, gradient_type), g2 = Tensor::random(1, n2, gradient_type),
                 factor = Tensor::of(1, 1, {0.25});
          const bool clipped = step != 3;
          for (int64_t i = 0; i < n; ++i) {
            const auto at = static_cast<size_t>(i);
            const double g = (i < n1 ? g1.at(i) : g2.at(i - n1)) * (clipped ? 0.25 : 1);
            reference(w[at], m[at], v[at], g, settings(step));
          }
          run_op(kind, does, {clipped ? &factor : nullptr, &states, &g1, &g2}, {&states, &w1, &w2}, setting);
          for (int64_t i = 0; i < n; ++i) {
            const auto at = static_cast<size_t>(i);
            const int64_t element = i;
            const double stored = i < n1 ? w1.at(i) : w2.at(i - n1);
            if (master) {
              EXPECT_NEAR(states.at(state(element, 0)), w[at], 1e-6 * (1 + std::abs(w[at])));
              EXPECT_EQ(stored, round_to(states.at(state(element, 0)), Type::bf16));
            } else {
              EXPECT_NEAR(stored, w[at], 1e-6 * (1 + std::abs(w[at])));
            }
            EXPECT_NEAR(states.at(state(element, parts - 2)), m[at], 1e-6);
            EXPECT_NEAR(states.at(state(element, parts - 1)), v[at], 1e-6);
          }
          for (int64_t element = n; element < blocks * bucket; ++element)  // nobody's
            for (int64_t part = 0; part < parts; ++part)
              EXPECT_EQ(states.at(state(element, part)),
                        round_to(initial[static_cast<size_t>(state(element, part))], Type::f32));
        }
      }
    }
  }
}

// The same bits, however the master is kept.
TEST(Adam, LowBitsBesideTheWeightsAreAsGoodAsAWholeMaster) {
  const int64_t bucket = 70, blocks = 2, n = 133;
  const auto whole_state = [&](int64_t i, int64_t part) {
    return (i / bucket * 3 + part) * bucket + i % bucket;
  };
  const auto low_state = [&](int64_t i, int64_t part) {
    return i / bucket * bucket * 5 / 2 + part * bucket + i % bucket;
  };
  Tensor whole = Tensor::contiguous(1, blocks * bucket * 3, Values(blocks * bucket * 3)),
         parted = Tensor::contiguous(1, blocks * bucket * 5 / 2, Values(blocks * bucket * 5 / 2));
  Values masters(static_cast<size_t>(blocks * bucket * 3)), rounded;
  auto* const low = reinterpret_cast<uint16_t*>(parted.operand().data);
  const auto low_at = [&](int64_t i) -> uint16_t& {
    return low[i / bucket * bucket * 5 + 4 * bucket + i % bucket];
  };
  for (int64_t i = 0; i < n; ++i) {
    const double start = normal(1)[0];
    const uint32_t master = program::settled(std::bit_cast<uint32_t>(static_cast<float>(start)));
    masters[static_cast<size_t>(whole_state(i, 0))] = std::bit_cast<float>(master);
    rounded.push_back(std::bit_cast<float>(uint32_t{program::high_part(master)} << 16));
    low_at(i) = program::low_part(master);
  }
  whole.set(masters);
  Tensor w = Tensor::of(1, n, rounded, Type::bf16), copy = w;
  Does does;
  does.a = static_cast<int32_t>(bucket);
  Setting setting;
  for (int64_t step = 1; step <= 20; ++step) {
    setting.step.adam = settings(step);
    Tensor g = Tensor::random(1, n, Type::bf16);
    does.b = static_cast<int64_t>(program::Master::states);
    run_op(OpKind::adam, does, {nullptr, &whole, &g}, {&whole, &copy}, setting);
    does.b = static_cast<int64_t>(program::Master::low);
    run_op(OpKind::adam, does, {nullptr, &parted, &g}, {&parted, &w}, setting);
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(w.at(i), copy.at(i));
      for (int64_t part = 0; part < 2; ++part)
        ASSERT_EQ(parted.at(low_state(i, part)), whole.at(whole_state(i, part + 1)));
      const auto high = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(w.at(i))) >> 16);
      ASSERT_EQ(std::bit_cast<float>(program::whole(high, low_at(i))), whole.at(whole_state(i, 0))) << i;
    }
  }
}

TEST(Adam, RefusesElementsWithoutStates) {
  Tensor states = Tensor::contiguous(1, 30, Values(30)), w(1, 11, Type::bf16), g(1, 11);
  Does does;
  does.a = 10;
  EXPECT_THROW(run_op(OpKind::adam, does, {nullptr, &states, &g}, {&states, &w}), InternalError);
}

TEST(ClipFactor, ScalesDownToTheLargestNorm) {
  Setting setting;
  setting.step.max_norm = 2;
  Tensor sum = Tensor::of(1, 1, {25}, Type::f64), factor(1, 1);
  run_op(OpKind::clip_factor, {}, {&sum}, {&factor}, setting);
  EXPECT_NEAR(factor.at(0), 2 / (5 + 1e-6), 1e-7);
  setting.step.max_norm = 6;
  run_op(OpKind::clip_factor, {}, {&sum}, {&factor}, setting);
  EXPECT_EQ(factor.at(0), 1);
  setting.step.max_norm = std::numeric_limits<double>::infinity();
  run_op(OpKind::clip_factor, {}, {&sum}, {&factor}, setting);
  EXPECT_EQ(factor.at(0), 1);
}

TEST(ClipFactor, SaysThatANormIsNotFinite) {
  Setting setting;
  setting.step.number = 41;
  for (const double bad :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    Tensor sum = Tensor::of(1, 1, {bad}, Type::f64), factor(1, 1);
    const std::string message =
        error_of([&] { run_op(OpKind::clip_factor, {}, {&sum}, {&factor}, setting); });
    EXPECT_NE(message.find("step 42"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace mop::cpu
