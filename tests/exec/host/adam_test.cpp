#include "exec/host/adam.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "sim/base/error.h"
#include "tests/exec/support/allocations.h"

namespace mop::host {
namespace {

using program::Type;

constexpr float kPoison = -7936;  // exact in bf16
#ifdef __SSE__
constexpr bool kFlushes = true;  // denormal numbers
#else
constexpr bool kFlushes = false;
#endif

float as_float(uint16_t bf16) {
  return std::bit_cast<float>(static_cast<uint32_t>(bf16) << 16);
}
// By comparing both neighbours, not by the bits that are added.
uint16_t as_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const auto below = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);  // towards zero
  const auto above = static_cast<uint16_t>(below + 1);
  const double down = std::abs(static_cast<double>(x) - as_float(below)),
               up = (above & 0x7fff) == 0x7f80
                        ? std::abs(std::ldexp(1.0, 128) - std::abs(static_cast<double>(x)))
                        : std::abs(static_cast<double>(x) - as_float(above));
  return std::isinf(x) || down < up || (down == up && below % 2 == 0) ? below : above;
}

// Elements of a type that begin `shift` elements past a line of 64 bytes, between two poisoned ones.
class Array {
 public:
  Array(int64_t n, Type type, int64_t shift)
      : n_(n),
        type_(type),
        shift_(shift + 1),
        memory_(static_cast<size_t>((n + shift + 2) * program::size_of(type)) + 64) {
    for (int64_t i = -1; i <= n; ++i) set(i, kPoison);
  }
  std::byte* data() const {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    return const_cast<std::byte*>(memory_.data()) + (64 - at % 64) % 64 + shift_ * program::size_of(type_);
  }
  float at(int64_t i) const {
    return type_ == Type::bf16 ? as_float(reinterpret_cast<const uint16_t*>(data())[i])
                               : reinterpret_cast<const float*>(data())[i];
  }
  void set(int64_t i, float value) {
    if (type_ == Type::bf16)
      reinterpret_cast<uint16_t*>(data())[i] = as_bf16(value);
    else
      reinterpret_cast<float*>(data())[i] = value;
  }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  bool operator==(const Array& other) const {
    return std::memcmp(data() - program::size_of(type_), other.data() - program::size_of(type_),
                       static_cast<size_t>((n_ + 2) * program::size_of(type_))) == 0;
  }
  Array(const Array& other) : Array(other.n_, other.type_, other.shift_ - 1) {
    std::memcpy(data(), other.data(), static_cast<size_t>(n_ * program::size_of(type_)));
  }

 private:
  int64_t n_;
  Type type_;
  int64_t shift_;
  std::vector<std::byte> memory_;
};

// One job: pairs that follow one another in the states.
struct Problem {
  bool master = true;
  int64_t bucket = 0, first = 0;
  std::vector<int64_t> sizes;
  Type gradient_type = Type::bf16, weights_type = Type::bf16;
  interpreter::AdamW settings{1, 3e-3, 0.9, 0.95, 1e-8, 0.1};
  float factor = 1;
  std::vector<Array> states;  // one array
  std::vector<Array> gradients, weights;

  int64_t parts() const { return master ? 3 : 2; }
  int64_t state(int64_t element, int64_t part) const {
    return (element / bucket * parts() + part) * bucket + element % bucket;
  }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    const auto shift = [&] { return static_cast<int64_t>(random() % 70); };
    int64_t end = first;
    for (const int64_t n : sizes) end += n;
    const int64_t blocks = (end + bucket - 1) / bucket;
    states.emplace_back(blocks * bucket * parts(), Type::f32, shift());
    int64_t element = first;
    for (const int64_t n : sizes) {
      gradients.emplace_back(n, gradient_type, shift());
      weights.emplace_back(n, weights_type, shift());
      for (int64_t i = 0; i < n; ++i, ++element) {
        const float w = normal(random);
        if (master)
          states[0].set(state(element, 0), w);
        else
          weights.back().set(i, w);
        const bool begins = settings.step == 1;
        states[0].set(state(element, parts() - 2), begins ? 0 : 0.1F * normal(random));
        states[0].set(state(element, parts() - 1), begins ? 0 : std::abs(normal(random)) * 0.01F);
        gradients.back().set(i, random() % 16 == 0 ? 0 : 0.1F * normal(random));
      }
    }
  }
  void run(Workers& workers, AdamPath path) {
    std::vector<AdamPair> pairs;
    int64_t at = first;
    for (size_t i = 0; i < sizes.size(); ++i) {
      pairs.push_back({gradients[i].data(), gradient_type, weights[i].data(), weights_type, at, sizes[i]});
      at += sizes[i];
    }
    adam({states[0].floats(), bucket, master, pairs, factor, settings}, workers, path);
  }
  bool operator==(const Problem& other) const { return states == other.states && weights == other.weights; }
};

// The paper's formulas in fp64. Everything that is not an element of a pair stays as it was.
void expect_updated(const Problem& before, const Problem& after) {
  const interpreter::AdamW& a = before.settings;
  const auto t = static_cast<double>(a.step);
  Problem expected = before;
  int64_t element = before.first;
  for (size_t pair = 0; pair < before.sizes.size(); ++pair) {
    for (int64_t i = 0; i < before.sizes[pair]; ++i, ++element) {
      const int64_t at_m = before.state(element, before.parts() - 2), at_v = at_m + before.bucket,
                    at_w = before.state(element, 0);
      const double g = static_cast<double>(before.gradients[pair].at(i)) * before.factor;
      double w = before.master ? before.states[0].at(at_w) : before.weights[pair].at(i);
      const double old = w, m = a.beta1 * before.states[0].at(at_m) + (1 - a.beta1) * g,
                   v = a.beta2 * before.states[0].at(at_v) + (1 - a.beta2) * g * g,
                   slope = a.learning_rate / (1 - std::pow(a.beta1, t)) /
                           (std::sqrt(v / (1 - std::pow(a.beta2, t))) + a.eps);
      w -= a.learning_rate * a.weight_decay * w;
      w -= slope * m;
      const float new_w = before.master ? after.states[0].at(at_w) : after.weights[pair].at(i),
                  new_m = after.states[0].at(at_m), new_v = after.states[0].at(at_v);
      const double m_error =
          3e-7 * (std::abs(g) + std::abs(before.states[0].at(at_m)));  // its parts may cancel
      ASSERT_NEAR(new_m, m, m_error) << "m of " << element;
      ASSERT_NEAR(new_v, v, 3e-7 * (g * g + before.states[0].at(at_v))) << "v of " << element;
      // The change to 2e-6 of its size, and the sum's rounding; of bf16 weights, what keeps the master off
      // halfway.
      const bool narrow = before.master && before.weights_type == Type::bf16;
      ASSERT_NEAR(new_w, w,
                  2e-6 * std::abs(w - old) + slope * m_error + (narrow ? 1.8e-7 : 6e-8) * std::abs(w))
          << "weight of " << element;
      if (before.master) {
        const float stored = before.weights_type == Type::bf16 ? as_float(as_bf16(new_w)) : new_w;
        ASSERT_EQ(after.weights[pair].at(i), stored) << "copy of " << element;
      }
      // What was checked is taken as it is; the rest is compared as a whole.
      if (before.master) expected.states[0].set(at_w, new_w);
      expected.states[0].set(at_m, new_m);
      expected.states[0].set(at_v, new_v);
      expected.weights[pair].set(i, after.weights[pair].at(i));
    }
  }
  ASSERT_TRUE(expected == after) << "something else was written";
}

class OnPath : public testing::TestWithParam<AdamPath> {
 protected:
  void SetUp() override {
    if (!runs_here(GetParam())) GTEST_SKIP() << "this CPU has no " << text(GetParam());
  }
  static Workers& workers() {
    static Workers three({-1, -1, -1});
    return three;
  }
  std::mt19937 random{11};
  int64_t number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  }

  Problem problem() {
    Problem p;
    p.master = random() % 3 != 0;
    p.gradient_type = random() % 2 == 0 ? Type::bf16 : Type::f32;
    p.weights_type = p.master && random() % 2 == 0 ? Type::bf16 : Type::f32;
    p.bucket = random() % 2 == 0 ? number(1, 100) : number(100, 3000);
    p.first = number(0, 200);
    for (int64_t pairs = number(1, 3); pairs > 0; --pairs)
      p.sizes.push_back(number(0, 1) == 0 ? number(0, 40) : number(40, 2500));
    if (random() % 2 == 0) p.settings.step = 1000;
    if (random() % 2 == 0) p.settings.weight_decay = 0;
    if (random() % 2 == 0) p.factor = 0.37F;
    p.fill(random);
    return p;
  }
};
INSTANTIATE_TEST_SUITE_P(Adam, OnPath, testing::Values(AdamPath::portable, AdamPath::avx512),
                         [](const auto& path) {
                           return path.param == AdamPath::portable ? "Portable" : "Avx512";
                         });

TEST_P(OnPath, AgreesWithFp64) {
  for (int i = 0; i < 400; ++i) {
    SCOPED_TRACE(i);
    const Problem before = problem();
    Problem after = before;
    after.run(workers(), GetParam());
    ASSERT_NO_FATAL_FAILURE(expect_updated(before, after));
  }
}

// One call after the other: errors do not add up.
TEST_P(OnPath, AgreesOverManySteps) {
  Problem p;
  p.bucket = 777;
  p.sizes = {1000};
  p.fill(random);
  const auto f = [](double x) { return static_cast<double>(static_cast<float>(x)); };
  std::vector<double> w, m(1000), v(1000);
  for (int64_t i = 0; i < 1000; ++i) w.push_back(p.states[0].at(p.state(i, 0)));
  for (p.settings.step = 1; p.settings.step <= 300; ++p.settings.step) {
    const interpreter::AdamW& a = p.settings;
    const auto t = static_cast<double>(a.step);
    for (int64_t i = 0; i < 1000; ++i) {
      const auto at = static_cast<size_t>(i);
      p.gradients[0].set(i, static_cast<float>(std::sin(static_cast<double>(i) + 0.1 * t)));
      const double g = p.gradients[0].at(i);
      m[at] = f(a.beta1 * m[at] + (1 - a.beta1) * g);
      v[at] = f(a.beta2 * v[at] + (1 - a.beta2) * g * g);
      w[at] -= a.learning_rate * a.weight_decay * w[at];
      w[at] -= a.learning_rate * (m[at] / (1 - std::pow(a.beta1, t))) /
               (std::sqrt(v[at] / (1 - std::pow(a.beta2, t))) + a.eps);
    }
    p.run(workers(), GetParam());
  }
  for (int64_t i = 0; i < 1000; ++i)
    ASSERT_NEAR(p.states[0].at(p.state(i, 0)), w[static_cast<size_t>(i)], 2e-5) << i;
}

// A decay of 1e-6 a step is not far above fp32's spacing of 1 - decay: it must not be lost or doubled.
TEST_P(OnPath, KeepsATinyDecay) {
  Problem p;
  p.bucket = 40;
  p.sizes = {40};
  p.weights_type = Type::f32;
  p.settings = {1, 1e-5, 0.9, 0.95, 1e-8, 0.1};
  p.fill(random);
  for (int64_t i = 0; i < 40; ++i) {
    p.states[0].set(i, 100);
    p.gradients[0].set(i, 0);
  }
  for (; p.settings.step <= 1000; ++p.settings.step) p.run(workers(), GetParam());
  for (int64_t i = 0; i < 40; ++i) ASSERT_NEAR(p.weights[0].at(i), 100 * std::pow(1 - 1e-6, 1000), 0.015);
}

TEST_P(OnPath, DoesNotDependOnTheNumberOfThreads) {
  Workers one({-1});
  for (int i = 0; i < 60; ++i) {
    const Problem before = problem();
    Problem alone = before;
    alone.run(one, GetParam());
    for (const int threads : {2, 5, 16}) {
      Workers several(std::vector<int>(static_cast<size_t>(threads), -1));
      Problem p = before;
      p.run(several, GetParam());
      ASSERT_TRUE(p == alone) << "problem " << i << ", " << threads << " threads";
    }
  }
}

TEST_P(OnPath, LeavesEverythingIfTheFactorIsNotFinite) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float factor : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) {
    Problem p = problem();
    p.factor = factor;
    const Problem before = p;
    p.run(workers(), GetParam());
    EXPECT_TRUE(p == before);
  }
}

// With a learning rate of 0 a master stays; its copy shows every way to round.
TEST_P(OnPath, RoundsToNearest) {
  std::vector<uint32_t> bits;
  for (const uint32_t high : {0x0000U, 0x0001U, 0x0080U, 0x3f80U, 0x3f81U, 0x7f7fU, 0x7f80U, 0x8000U, 0x8001U,
                              0xbf81U, 0xff7fU, 0xff80U})
    for (const uint32_t low : {0x0000U, 0x0001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU})
      bits.push_back(high << 16 | low);
  bits.push_back(0x7fffffff);
  bits.push_back(0xffffffff);
  bits.push_back(0xffc00000);
  const auto n = static_cast<int64_t>(bits.size());
  Problem p;
  p.bucket = n;
  p.sizes = {n};
  p.settings.learning_rate = 0;
  p.fill(random);
  for (int64_t i = 0; i < n; ++i) {
    p.states[0].set(i, std::bit_cast<float>(bits[static_cast<size_t>(i)]));
    p.gradients[0].set(i, 0);
  }
  p.run(workers(), GetParam());
  for (int64_t i = 0; i < n; ++i) {
    const float x = std::bit_cast<float>(bits[static_cast<size_t>(i)]);
    const uint16_t stored = reinterpret_cast<const uint16_t*>(p.weights[0].data())[i];
    if (std::isinf(x) || std::isnan(x)) {
      // Infinity less a decay of infinity is not a number.
      EXPECT_TRUE(stored == 0x7fff || stored == as_bf16(x))
          << std::hex << bits[static_cast<size_t>(i)] << " " << stored;
      continue;
    }
    const bool zero = kFlushes && std::abs(x) < std::numeric_limits<float>::min();
    const float off_halfway = std::bit_cast<float>(program::settled(bits[static_cast<size_t>(i)]));
    EXPECT_EQ(stored, as_bf16(zero ? std::copysign(0.0F, x) : off_halfway))
        << std::hex << bits[static_cast<size_t>(i)];
  }
}

// What decays never ends as a denormal number.
TEST_P(OnPath, LeavesNoDenormalMoments) {
  if (!kFlushes) GTEST_SKIP() << "this CPU computes with denormal numbers";
  Problem p;
  p.bucket = 50;
  p.sizes = {50};
  p.fill(random);
  for (int64_t i = 0; i < 50; ++i) {
    p.gradients[0].set(i, 0);
    p.states[0].set(p.state(i, 1), i % 2 == 0 ? 1e-38F : 1.2e-38F);  // denormal; not yet
    p.states[0].set(p.state(i, 2), 1e-39F);
  }
  p.run(workers(), GetParam());
  for (int64_t i = 0; i < 50; ++i) {
    EXPECT_NE(std::fpclassify(p.states[0].at(p.state(i, 1))), FP_SUBNORMAL);
    EXPECT_EQ(p.states[0].at(p.state(i, 2)), 0);
  }
}

TEST_P(OnPath, AllocatesNothing) {
  if (!test::Allocations::counted()) GTEST_SKIP() << "a sanitizer's malloc is not counted";
  Problem p = problem();
  const AdamPair pair{p.gradients[0].data(), p.gradient_type, p.weights[0].data(),
                      p.weights_type,        p.first,         p.sizes[0]};
  const AdamArgs args{p.states[0].floats(), p.bucket, p.master, {&pair, 1}, 1, p.settings};
  adam(args, workers(), GetParam());
  const test::Allocations allocations;
  adam(args, workers(), GetParam());
  EXPECT_EQ(allocations.count(), 0);
}

TEST(Adam, PathsAgreeUpToRounding) {
  if (!runs_here(AdamPath::avx512)) GTEST_SKIP() << "this CPU has no AVX-512";
  Workers workers({-1, -1});
  std::mt19937 random(3);
  Problem p;
  p.bucket = 5000;
  p.first = 3;
  p.sizes = {9001, 500};
  p.weights_type = Type::f32;
  p.settings.step = 1000;
  p.fill(random);
  Problem q = p;
  p.run(workers, AdamPath::portable);
  q.run(workers, AdamPath::avx512);
  for (int64_t i = 0; i < 9001; ++i)
    ASSERT_NEAR(p.weights[0].at(i), q.weights[0].at(i), 2e-7 * std::abs(p.weights[0].at(i)) + 1e-8);
}

TEST(Adam, TakesTheFastestPathThatRunsHere) {
  EXPECT_TRUE(runs_here(adam_path()));
  EXPECT_EQ(adam_path() == AdamPath::avx512, runs_here(AdamPath::avx512));
}

TEST(Adam, RefusesWhatItCannotUpdate) {
  Workers workers({-1});
  float states[30] = {};
  std::byte memory[64];
  AdamPair pair{memory, Type::bf16, memory, Type::bf16, 0, 8};
  AdamArgs args{states, 10, false, {&pair, 1}, 1, {}};
  EXPECT_THROW(adam(args, workers), InternalError);  // bf16 weights are no master
  pair.weights_type = Type::f32;
  args.bucket = 0;
  EXPECT_THROW(adam(args, workers), InternalError);
  args.bucket = 10;
  pair.gradient_type = Type::f64;
  EXPECT_THROW(adam(args, workers), InternalError);
}

}  // namespace
}  // namespace mop::host
