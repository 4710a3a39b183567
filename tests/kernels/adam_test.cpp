#include "kernels/adam.h"

#include <bit>
#include <limits>

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

class Adam : public OnDevice {};

struct Shape {
  int64_t bucket, first, n, blocks;
  int64_t shift;  // of gradient and weights
};
const std::vector<Shape> kShapes{{4096, 0, 4096, 1, 0}, {1000, 304, 2096, 3, 0}, {1000, 301, 1999, 3, 0},
                                 {1001, 7, 2500, 3, 1}, {64, 8, 5, 1, 0},        {64, 0, 0, 1, 0}};

TEST_F(Adam, SeveralSteps) {
  for (const Type gradient_type : kTypes) {
    for (const Type weights_type : kTypes) {
      for (const Master where : {Master::states, Master::weights}) {
        const bool master = where == Master::states;
        if (!master && weights_type == Type::bf16) continue;
        for (const Shape& s : kShapes) {
          SCOPED_TRACE(testing::Message() << name(gradient_type) << " " << name(weights_type) << " master "
                                          << master << " " << s.n << " of blocks of " << s.bucket);
          const int64_t parts = master ? 3 : 2;
          const auto at = [&](int64_t i, int64_t part) {
            const int64_t element = s.first + i;
            return static_cast<size_t>(element / s.bucket * s.bucket * parts + part * s.bucket +
                                       element % s.bucket);
          };
          Values states(static_cast<size_t>(s.blocks * s.bucket * parts), DeviceArray::kPoison);
          Values w = random_values(s.n, Type::f32, random), m(w.size()), v(w.size());
          for (int64_t i = 0; i < s.n; ++i) {
            if (master) states[at(i, 0)] = w[static_cast<size_t>(i)];
            states[at(i, parts - 2)] = states[at(i, parts - 1)] = 0;
          }
          const auto d_states = device_floats(states), factor = device_floats({0.4});
          const Layout layout{0, s.shift};
          const DeviceMatrix weights = master ? DeviceMatrix::poisoned(1, s.n, weights_type, layout)
                                              : DeviceMatrix(w, 1, s.n, Type::f32, layout);
          AdamArgs args{d_states.get(),      s.bucket,      s.first,      s.n,         where, nullptr,
                        weights.view().data, gradient_type, weights_type, factor.get()};
          args.learning_rate = 0.02, args.weight_decay = 0.1;
          for (args.step = 1; args.step <= 3; ++args.step) {
            const Values gradient = random_values(s.n, gradient_type, random, 0.1);
            const DeviceMatrix d_gradient(gradient, 1, s.n, gradient_type, layout);
            args.gradient = d_gradient.view().data;
            adam(args, nullptr);
            const double t = static_cast<double>(args.step);
            for (size_t i = 0; i < w.size(); ++i) {
              const double g = static_cast<double>(0.4F) * gradient[i];
              m[i] = args.beta1 * m[i] + (1 - args.beta1) * g;
              v[i] = args.beta2 * v[i] + (1 - args.beta2) * g * g;
              const double m_hat = m[i] / (1 - std::pow(args.beta1, t)),
                           v_hat = v[i] / (1 - std::pow(args.beta2, t));
              w[i] = w[i] * (1 - args.learning_rate * args.weight_decay) -
                     args.learning_rate * m_hat / (std::sqrt(v_hat) + args.eps);
            }
            check(cudaDeviceSynchronize(), "adam");
          }
          for (int64_t i = 0; i < s.n; ++i) {
            if (master) states[at(i, 0)] = w[static_cast<size_t>(i)];
            states[at(i, parts - 2)] = m[static_cast<size_t>(i)];
            states[at(i, parts - 1)] = v[static_cast<size_t>(i)];
          }
          const Values actual = as_values(d_states.values());
          for (size_t i = 0; i < states.size(); ++i)
            ASSERT_NEAR(actual[i], states[i], states[i] == DeviceArray::kPoison ? 0 : 3e-6) << "state " << i;
          expect_close(weights.values(), w, tolerance(weights_type), "weights");
        }
      }
    }
  }
}

// The same bits, however the master is kept.
TEST_F(Adam, LowBitsBesideTheWeightsAreAsGoodAsAWholeMaster) {
  for (const Type gradient_type : kTypes) {
    for (const Shape& s : kShapes) {
      if (s.bucket % 2 != 0) continue;
      SCOPED_TRACE(testing::Message() << name(gradient_type) << " " << s.n << " of blocks of " << s.bucket);
      const auto states_of = [&](int64_t i, int64_t part) {
        const int64_t element = s.first + i;
        return static_cast<size_t>((element / s.bucket * 3 + part) * s.bucket + element % s.bucket);
      };
      const auto halves_of = [&](int64_t i, int64_t part) {  // in 16 bits
        const int64_t element = s.first + i, inner = element % s.bucket;
        return static_cast<size_t>(element / s.bucket * s.bucket * 5 +
                                   (part < 2 ? 2 * (part * s.bucket + inner) : 4 * s.bucket + inner));
      };
      std::vector<float> states(static_cast<size_t>(s.blocks * s.bucket * 3));
      std::vector<uint16_t> halves(static_cast<size_t>(s.blocks * s.bucket * 5));
      const Values start = random_values(s.n, Type::f32, random);
      Values rounded;
      for (int64_t i = 0; i < s.n; ++i) {
        auto master = std::bit_cast<uint32_t>(static_cast<float>(start[static_cast<size_t>(i)]));
        if ((master & 0xffff) == 0x8000) --master;
        states[states_of(i, 0)] = std::bit_cast<float>(master);
        rounded.push_back(round_to(Type::bf16, std::bit_cast<float>(master)));
        halves[halves_of(i, 2)] = static_cast<uint16_t>(master);
      }
      const DeviceVector<float> d_states(states);
      const DeviceVector<uint16_t> d_halves(halves);
      const Layout layout{0, s.shift};
      const DeviceMatrix of_states = DeviceMatrix::poisoned(1, s.n, Type::bf16, layout),
                         of_low(rounded, 1, s.n, Type::bf16, layout);
      AdamArgs args{d_states.get(), s.bucket, s.first,       s.n,        Master::states,
                    nullptr,        nullptr,  gradient_type, Type::bf16, nullptr};
      args.learning_rate = 0.02, args.weight_decay = 0.1;
      for (args.step = 1; args.step <= 5; ++args.step) {
        const DeviceMatrix gradient(random_values(s.n, gradient_type, random, 0.1), 1, s.n, gradient_type,
                                    layout);
        args.gradient = gradient.view().data;
        args.states = d_states.get(), args.master = Master::states, args.weights = of_states.view().data;
        adam(args, nullptr);
        args.states = reinterpret_cast<float*>(d_halves.get()), args.master = Master::low,
        args.weights = of_low.view().data;
        adam(args, nullptr);
        check(cudaDeviceSynchronize(), "adam");
      }
      const Values weights = of_low.values();
      EXPECT_EQ(weights, of_states.values());
      states = d_states.values();
      halves = d_halves.values();
      const auto number = [&](size_t at) {
        return std::bit_cast<float>(halves[at] | uint32_t{halves[at + 1]} << 16);
      };
      for (int64_t i = 0; i < s.n; ++i) {
        ASSERT_EQ(number(halves_of(i, 0)), states[states_of(i, 1)]);
        ASSERT_EQ(number(halves_of(i, 1)), states[states_of(i, 2)]);
        const auto high = std::bit_cast<uint32_t>(static_cast<float>(weights[static_cast<size_t>(i)]));
        ASSERT_EQ(
            std::bit_cast<float>(high + static_cast<uint32_t>(static_cast<int16_t>(halves[halves_of(i, 2)]))),
            states[states_of(i, 0)]);
      }
    }
  }
}

// A decay of 1e-7 a step is below fp32's spacing of 1 - decay: it must not be lost or doubled.
TEST_F(Adam, TinyDecayIsExact) {
  const int64_t n = 8, steps = 1000;
  Values states(3 * n, 0);
  std::fill_n(states.begin(), n, 100.0);
  const auto d_states = device_floats(states);
  const DeviceMatrix weights = DeviceMatrix::poisoned(1, n, Type::f32), gradient(Values(n), 1, n, Type::f32);
  AdamArgs args{d_states.get(),      n,         0,         n,      Master::states, gradient.view().data,
                weights.view().data, Type::f32, Type::f32, nullptr};
  args.learning_rate = 1e-5, args.weight_decay = 0.1;
  for (args.step = 1; args.step <= steps; ++args.step) adam(args, nullptr);
  EXPECT_NEAR(weights.values()[0], 100 * std::pow(1 - 1e-6, steps), 0.1 * 0.15);
}

TEST_F(Adam, LeavesEverythingIfTheNormIsNotFinite) {
  const int64_t n = 64;
  const Values states = random_values(3 * n, Type::f32, random);
  const auto d_states = device_floats(states),
             factor = device_floats({std::numeric_limits<double>::quiet_NaN()});
  const DeviceMatrix weights = DeviceMatrix::poisoned(1, n, Type::bf16),
                     gradient(Values(n, 1), 1, n, Type::bf16);
  AdamArgs args{
      d_states.get(),      n,          0,          n,           Master::states, gradient.view().data,
      weights.view().data, Type::bf16, Type::bf16, factor.get()};
  args.learning_rate = 1;
  adam(args, nullptr);
  EXPECT_EQ(as_values(d_states.values()), states);
  EXPECT_EQ(weights.values(), Values(n, DeviceArray::kPoison));
}

}  // namespace
}  // namespace mop::kernels
