#include "kernels/activation.h"

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

const Activation kClamped{true, 7, 1.702F};

double value(const Activation& a, double gate, double up) {
  if (!a.clamped) return gate * logistic(gate) * up;
  const double g = std::min(gate, double{a.limit}), u = std::clamp(up, -double{a.limit}, double{a.limit});
  return (u + 1) * g * logistic(a.alpha * g);
}

// By the difference quotient of the value: independent of the formula of the derivative. Near the limits,
// where the function has a corner, the side that the gradient is defined for.
std::pair<double, double> gradients(const Activation& a, double gate, double up) {
  const double h = 1e-6;
  const bool at_gate = a.clamped && gate + h > a.limit, at_up = a.clamped && up + h > a.limit;
  const double gate_high = at_gate && gate <= a.limit ? gate : gate + h,
               up_high = at_up && up <= a.limit ? up : up + h;
  const double up_low = a.clamped && up >= -a.limit && up - h < -a.limit ? up : up - h;
  return {(value(a, gate_high, up) - value(a, gate - h, up)) / (gate_high - (gate - h)),
          (value(a, gate, up_high) - value(a, gate, up_low)) / (up_high - up_low)};
}

struct Shape {
  int64_t rows, width;
  Layout layout;
};
const std::vector<Shape> kShapes{{9, 768, {}}, {5, 33, {1, 1}}, {3, 8, {8, 0}}, {0, 64, {}}, {130, 264, {}}};

class ActivationTest : public OnDevice {};

TEST_F(ActivationTest, Forward) {
  for (const Type type : kTypes) {
    for (const Activation& a : {Activation{}, kClamped}) {
      for (const Shape& s : kShapes) {
        SCOPED_TRACE(testing::Message()
                     << name(type) << " " << s.rows << " x " << s.width << " " << a.clamped);
        const Values x = random_values(s.rows * 2 * s.width, type, random, 5);
        Values act;
        for (int64_t r = 0; r < s.rows; ++r)
          for (int64_t i = 0; i < s.width; ++i)
            act.push_back(value(a, x[static_cast<size_t>(r * 2 * s.width + i)],
                                x[static_cast<size_t>(r * 2 * s.width + s.width + i)]));
        const DeviceMatrix d_x(x, s.rows, 2 * s.width, type, s.layout);
        const DeviceMatrix d_act = DeviceMatrix::poisoned(s.rows, s.width, type, s.layout);
        swiglu({d_x, d_act, a}, nullptr);
        expect_close(d_act.values(), act, tolerance(type), "act");
      }
    }
  }
}

TEST_F(ActivationTest, Backward) {
  for (const Type type : kTypes) {
    for (const Activation& a : {Activation{}, kClamped}) {
      for (const Shape& s : kShapes) {
        SCOPED_TRACE(testing::Message()
                     << name(type) << " " << s.rows << " x " << s.width << " " << a.clamped);
        const Values x = random_values(s.rows * 2 * s.width, type, random, 5),
                     d_act = random_values(s.rows * s.width, type, random);
        Values dx(x.size());
        for (int64_t r = 0; r < s.rows; ++r) {
          for (int64_t i = 0; i < s.width; ++i) {
            const auto gate = static_cast<size_t>(r * 2 * s.width + i),
                       up = gate + static_cast<size_t>(s.width);
            const auto [by_gate, by_up] = gradients(a, x[gate], x[up]);
            dx[gate] = by_gate * d_act[static_cast<size_t>(r * s.width + i)];
            dx[up] = by_up * d_act[static_cast<size_t>(r * s.width + i)];
          }
        }
        const DeviceMatrix d_x(x, s.rows, 2 * s.width, type, s.layout),
            d_d(d_act, s.rows, s.width, type, s.layout);
        swiglu_bwd({d_x, d_d, d_x, a}, nullptr);  // in place
        expect_close(d_x.values(), dx, tolerance(type), "d_gate_up");
      }
    }
  }
}

TEST_F(ActivationTest, RoutedBackward) {
  for (const Type type : kTypes) {
    for (const Activation& a : {Activation{}, kClamped}) {
      for (const Shape& s : kShapes) {
        for (const bool with_bias : {false, true}) {
          SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " x " << s.width << " "
                                          << a.clamped << (with_bias ? " with biases" : ""));
          const int64_t h = s.width + 16;
          const Values x = random_values(s.rows * 2 * s.width, type, random, 3),
                       d_act = random_values(s.rows * s.width, type, random),
                       act = random_values(s.rows * s.width, type, random),
                       dy = random_values(s.rows * h, type, random),
                       weights = random_values(s.rows, Type::f32, random);
          // Experts: one without rows, one with most of them.
          const auto few = static_cast<int32_t>(s.rows / 5), all = static_cast<int32_t>(s.rows);
          const std::vector<ExpertRows> experts{{0, few}, {few, 0}, {few, all - few}};
          const std::array biases{random_values(h, type, random), random_values(h, type, random),
                                  random_values(h, type, random)};
          Values dx(x.size()), weighted(act.size()), d_weights(weights.size());
          for (int64_t r = 0; r < s.rows; ++r) {
            const auto row = static_cast<size_t>(r);
            for (int64_t i = 0; i < s.width; ++i) {
              const auto gate = static_cast<size_t>(r * 2 * s.width + i),
                         up = gate + static_cast<size_t>(s.width), at = static_cast<size_t>(r * s.width + i);
              const auto [by_gate, by_up] = gradients(a, x[gate], x[up]);
              dx[gate] = by_gate * weights[row] * d_act[at];
              dx[up] = by_up * weights[row] * d_act[at];
              weighted[at] = weights[row] * act[at];
              d_weights[row] += act[at] * d_act[at];
            }
            if (with_bias)
              for (int64_t i = 0; i < h; ++i)
                d_weights[row] +=
                    biases[r < few ? 0 : 2][static_cast<size_t>(i)] * dy[static_cast<size_t>(r * h + i)];
          }
          const DeviceMatrix d_x(x, s.rows, 2 * s.width, type, s.layout),
              d_d(d_act, s.rows, s.width, type, s.layout), d_a(act, s.rows, s.width, type, s.layout),
              d_y(dy, s.rows, h, type, s.layout);
          const auto d_w = device_floats(weights),
                     d_dw = device_floats(Values(weights.size(), DeviceArray::kPoison));
          const std::array d_biases{DeviceArray(biases[0], type), DeviceArray(biases[1], type),
                                    DeviceArray(biases[2], type)};
          const std::array<const void*, 3> pointers{d_biases[0].get(), d_biases[1].get(), d_biases[2].get()};
          RoutedSwigluBwdArgs args{d_x, d_d, d_a, {}, d_w.get(), d_x, d_a, d_dw.get(), a};  // in place
          if (with_bias) {
            args.dy = d_y;
            args.experts = experts.data();
            args.biases = pointers.data();
            args.bias_count = 3;
          }
          routed_swiglu_bwd(args, nullptr);
          expect_close(d_x.values(), dx, tolerance(type), "d_gate_up");
          expect_close(d_a.values(), weighted, tolerance(type), "act");
          expect_close(as_values(d_dw.values()), d_weights, tolerance(Type::f32), "d_weights");
        }
      }
    }
  }
}

}  // namespace
}  // namespace mop::kernels
