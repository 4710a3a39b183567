#include "kernels/elementwise.h"

#include <deque>

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

struct Shape {
  int64_t rows, cols;
  Layout layout;
};
const std::vector<Shape> kShapes{{1, 100003, {}}, {37, 64, {}}, {37, 64, {8, 0}},  {37, 33, {1, 1}},
                                 {0, 16, {}},     {1, 5, {}},   {3, 2056, {0, 1}}, {70000, 8, {8, 8}}};

class Elementwise : public OnDevice {};

TEST_F(Elementwise, Add) {
  for (const Type a_type : kTypes) {
    for (const Type b_type : kTypes) {
      for (const Type c_type : kTypes) {
        for (const Shape& s : kShapes) {
          for (int options = 0; options < 4; ++options) {
            const bool with_b = options % 2 == 1, accumulate = options / 2 == 1;
            SCOPED_TRACE(testing::Message() << name(a_type) << " + " << name(b_type) << " -> " << name(c_type)
                                            << " " << s.rows << " x " << s.cols << ", options " << options);
            const int64_t n = s.rows * s.cols;
            const Values a = random_values(n, a_type, random), b = random_values(n, b_type, random),
                         before = random_values(n, c_type, random);
            Values c = a;
            for (size_t i = 0; i < c.size(); ++i) c[i] += (with_b ? b[i] : 0) + (accumulate ? before[i] : 0);
            const DeviceMatrix d_a(a, s.rows, s.cols, a_type, s.layout),
                d_b(b, s.rows, s.cols, b_type, s.layout), d_c(before, s.rows, s.cols, c_type, s.layout);
            AddArgs args{d_a, {}, d_c, accumulate};
            if (with_b) args.b = d_b;
            add(args, nullptr);
            expect_close(d_c.values(), c, tolerance(c_type), "c");
          }
        }
      }
    }
  }
}

TEST_F(Elementwise, CopyConvertsExactly) {
  for (const Type from_type : kTypes) {
    for (const Type to_type : kTypes) {
      for (const Shape& s : kShapes) {
        const Values from = random_values(s.rows * s.cols, from_type, random);
        Values to;
        for (const double v : from) to.push_back(round_to(to_type, v));
        const DeviceMatrix d_from(from, s.rows, s.cols, from_type, s.layout);
        const DeviceMatrix d_to = DeviceMatrix::poisoned(s.rows, s.cols, to_type, s.layout);
        copy({d_from, d_to}, nullptr);
        EXPECT_EQ(d_to.values(), to);
      }
    }
  }
}

TEST_F(Elementwise, Clear) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      const DeviceMatrix x = DeviceMatrix::poisoned(s.rows, s.cols, type, s.layout);
      clear({x}, nullptr);
      EXPECT_EQ(x.values(), Values(static_cast<size_t>(s.rows * s.cols)));
    }
  }
}

TEST_F(Elementwise, ScaleInPlace) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      Values x = random_values(s.rows * s.cols, type, random);
      const DeviceMatrix d_x(x, s.rows, s.cols, type, s.layout);
      const auto factor = device_floats({0.37});
      scale({d_x, d_x, factor.get()}, nullptr);
      for (double& v : x) v *= 0.37F;
      expect_close(d_x.values(), x, tolerance(type), "x");
    }
  }
}

TEST_F(Elementwise, SumReplicas) {
  for (const Type type : kTypes) {
    for (const auto& [heads, replicas, width, layout] :
         std::vector<std::tuple<int64_t, int64_t, int64_t, Layout>>{
             {4, 2, 128, {}}, {3, 5, 7, {1, 1}}, {2, 1, 16, {}}, {1, 8, 24, {8, 8}}}) {
      const int64_t rows = 19;
      const Values x = random_values(rows * heads * replicas * width, type, random);
      Values y(static_cast<size_t>(rows * heads * width));
      for (int64_t i = 0; i < std::ssize(x); ++i) {
        const int64_t row_and_head = i / (replicas * width);
        y[static_cast<size_t>(row_and_head * width + i % width)] += x[static_cast<size_t>(i)];
      }
      const DeviceMatrix d_x(x, rows, heads * replicas * width, type, layout);
      const DeviceMatrix d_y = DeviceMatrix::poisoned(rows, heads * width, type, layout);
      sum_replicas({d_x, d_y, replicas, width}, nullptr);
      expect_close(d_y.values(), y, tolerance(type), "y");
    }
  }
}

TEST_F(Elementwise, SumPieces) {
  for (const Type type : kTypes) {
    for (const Type y_type : kTypes) {
      for (const auto& [count, n, shift] : std::vector<std::tuple<int, int64_t, int64_t>>{
               {1, 64, 0}, {2, 100003, 0}, {4, 4096, 0}, {3, 77, 1}, {8, 2056, 0}, {4, 5, 0}, {2, 0, 0}}) {
        for (const bool accumulate : {false, true}) {
          SCOPED_TRACE(testing::Message()
                       << count << " of " << n << " " << name(type) << " -> " << name(y_type));
          const Values before = random_values(n, y_type, random);
          Values y = accumulate ? before : Values(static_cast<size_t>(n));
          std::deque<DeviceMatrix> pieces;
          SumPiecesArgs args;
          args.count = count;
          args.type = type;
          args.accumulate = accumulate;
          for (int i = 0; i < count; ++i) {
            const Values x = random_values(n, type, random);
            for (size_t e = 0; e < y.size(); ++e) y[e] += x[e];
            args.pieces[static_cast<size_t>(i)] =
                pieces.emplace_back(x, 1, n, type, Layout{0, shift}).view().data;
          }
          const DeviceMatrix d_y(before, 1, n, y_type);
          args.y = d_y;
          sum_pieces(args, nullptr);
          expect_close(d_y.values(), y, tolerance(y_type), "y");
        }
      }
    }
  }
}

TEST_F(Elementwise, SquareSum) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      const Values x = random_values(s.rows * s.cols, type, random);
      double expected = 0;
      for (const double v : x) expected += v * v;
      const DeviceMatrix d_x(x, s.rows, s.cols, type, s.layout);
      const DeviceVector<double> sum({10.0});
      const Scratch scratch(kSquareSumScratch);
      square_sum({d_x, 4, sum.get(), true, scratch.get<double>()}, nullptr);
      EXPECT_NEAR(sum.values()[0], 10 + expected / 4, 1e-7 * (10 + expected));
      square_sum({d_x, 1, sum.get(), false, scratch.get<double>()}, nullptr);
      EXPECT_NEAR(sum.values()[0], expected, 1e-7 * expected);
    }
  }
}

TEST_F(Elementwise, ClipFactor) {
  const auto factor = device_floats({-1});
  const DeviceVector<int32_t> flag({0});
  const auto run = [&](double sum, double most) {
    const DeviceVector<double> d_sum({sum});
    clip_factor({d_sum.get(), most, factor.get(), flag.get()}, nullptr);
    return factor.values()[0];
  };
  EXPECT_FLOAT_EQ(run(100, 1), static_cast<float>(1 / (10 + 1e-6)));
  EXPECT_EQ(run(0.01, 1), 1);
  EXPECT_EQ(run(0, 1), 1);
  EXPECT_EQ(run(1e30, std::numeric_limits<double>::infinity()), 1);
  EXPECT_EQ(flag.values()[0], 0);
  EXPECT_TRUE(std::isnan(run(std::numeric_limits<double>::infinity(), 1)));
  EXPECT_EQ(flag.values()[0], 1);
}

}  // namespace
}  // namespace mop::kernels
