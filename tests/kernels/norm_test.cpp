#include "kernels/norm.h"

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

constexpr double kEps = 1e-6;

struct Shape {
  int64_t rows, cols, d;
  Layout layout;
};
const std::vector<Shape> kShapes{{5, 2048, 2048, {}},     {300, 512, 128, {}},      {7, 96, 96, {8, 8}},
                                 {3, 7168, 7168, {}},     {2, 16384, 16384, {}},    {33, 30, 10, {3, 1}},
                                 {4, 2048, 2048, {1, 0}}, {9, 1536, 1536, {64, 0}}, {1100, 64, 64, {}},
                                 {2, 1000, 1000, {0, 1}}, {0, 256, 256, {}},        {2500, 24, 24, {}}};

class Norm : public OnDevice {};

TEST_F(Norm, Forward) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      for (const bool residual : {false, true}) {
        SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " x " << s.cols << " by " << s.d);
        const Values x = random_values(s.rows * s.cols, type, random), w = random_values(s.d, type, random),
                     more = random_values(s.rows * s.cols, type, random);
        Values sum(x.size()), y(x.size());
        for (size_t i = 0; i < x.size(); ++i) sum[i] = residual ? round_to(type, x[i] + more[i]) : x[i];
        for (size_t first = 0; first < x.size(); first += static_cast<size_t>(s.d)) {
          double squares = 0;
          for (size_t i = 0; i < w.size(); ++i) squares += sum[first + i] * sum[first + i];
          const double rms = std::sqrt(squares / static_cast<double>(s.d) + kEps);
          for (size_t i = 0; i < w.size(); ++i) y[first + i] = w[i] * sum[first + i] / rms;
        }
        const DeviceMatrix dx(x, s.rows, s.cols, type, s.layout), dw(w, 1, s.d, type),
            d_more(more, s.rows, s.cols, type, s.layout);
        const DeviceMatrix dy = DeviceMatrix::poisoned(s.rows, s.cols, type, s.layout),
                           d_sum = DeviceMatrix::poisoned(s.rows, s.cols, type, s.layout);
        RmsNormArgs args{dx, dw, {}, dy, {}, static_cast<float>(kEps)};
        if (residual) args.residual = d_more, args.sum = d_sum;
        rms_norm(args, nullptr);
        expect_close(dy.values(), y, tolerance(type), "y");
        if (residual) expect_close(d_sum.values(), sum, type == Type::bf16 ? 1e-2 : 1e-6, "sum");
      }
    }
  }
}

TEST_F(Norm, Backward) {
  const std::vector<std::array<Type, 3>> types{{Type::bf16, Type::bf16, Type::bf16},
                                               {Type::bf16, Type::f32, Type::f32},
                                               {Type::f32, Type::f32, Type::f32}};  // x, dy, dw
  for (const auto& [type, dy_type, dw_type] : types) {
    for (const Shape& s : kShapes) {
      for (const bool more : {false, true}) {  // d_sum, accumulation
        SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " x " << s.cols << " by " << s.d);
        const int64_t n = s.rows * s.cols;
        const Values x = random_values(n, type, random), w = random_values(s.d, type, random),
                     dy = random_values(n, dy_type, random), d_sum = random_values(n, type, random),
                     before = random_values(s.d, dw_type, random);
        Values dx = dy, dw = more ? before : Values(w.size());
        through_rms_norm(dx, dw, x, w, kEps);
        for (size_t i = 0; more && i < x.size(); ++i) dx[i] += d_sum[i];
        const DeviceMatrix d_dy(dy, s.rows, s.cols, dy_type, s.layout),
            d_x(x, s.rows, s.cols, type, s.layout), d_w(w, 1, s.d, type),
            d_more(d_sum, s.rows, s.cols, type, s.layout), d_dw(before, 1, s.d, dw_type);
        const DeviceMatrix d_dx = DeviceMatrix::poisoned(s.rows, s.cols, type, s.layout);
        const Scratch scratch(rms_norm_bwd_scratch(s.rows, s.cols, s.d));
        RmsNormBwdArgs args{
            d_dy, d_x, d_w, {}, d_dx, d_dw, static_cast<float>(kEps), more, scratch.get<float>()};
        if (more) args.d_sum = d_more;
        rms_norm_bwd(args, nullptr);
        expect_close(d_dx.values(), dx, tolerance(type), "dx");
        expect_close(d_dw.values(), dw, tolerance(dw_type), "dw");
      }
    }
  }
}

TEST_F(Norm, BackwardInPlaceTwiceGivesTheSameBits) {
  const int64_t rows = 3000, cols = 512, d = 512;
  const Values x = random_values(rows * cols, Type::bf16, random), w = random_values(d, Type::bf16, random),
               dy = random_values(rows * cols, Type::bf16, random);
  std::vector<Values> results;
  for (int i = 0; i < 2; ++i) {
    const DeviceMatrix d_dy(dy, rows, cols, Type::bf16), d_x(x, rows, cols, Type::bf16),
        d_w(w, 1, d, Type::bf16);
    const DeviceMatrix d_dw = DeviceMatrix::poisoned(1, d, Type::f32);
    const Scratch scratch(rms_norm_bwd_scratch(rows, cols, d));
    rms_norm_bwd({d_dy, d_x, d_w, {}, d_dy, d_dw, static_cast<float>(kEps), false, scratch.get<float>()},
                 nullptr);
    results.push_back(d_dw.values());
    results.push_back(d_dy.values());
  }
  EXPECT_EQ(results[0], results[2]);
  EXPECT_EQ(results[1], results[3]);
}

TEST_F(Norm, RefusesGroupsThatDoNotFit) {
  const DeviceMatrix x = DeviceMatrix::poisoned(2, 30, Type::f32),
                     w = DeviceMatrix::poisoned(1, 16, Type::f32);
  EXPECT_THROW(rms_norm({x, w, {}, x, {}, 0}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace mop::kernels
