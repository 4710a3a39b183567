#include "kernels/column_sum.h"

#include <deque>

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

class ColumnSum : public OnDevice {};

struct Shape {
  int64_t rows, cols;
  Layout layout;
};
const std::vector<Shape> kShapes{
    {1000, 520, {}}, {129, 33, {1, 1}}, {1, 8, {}}, {0, 64, {}}, {300, 64, {64, 0}}};

TEST_F(ColumnSum, OfOneMatrix) {
  for (const Type type : kTypes) {
    for (const Type sum_type : kTypes) {
      for (const Shape& s : kShapes) {
        for (const bool accumulate : {false, true}) {
          SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " x " << s.cols);
          const Values x = random_values(s.rows * s.cols, type, random),
                       before = random_values(s.cols, sum_type, random);
          Values sum = accumulate ? before : Values(before.size());
          for (size_t i = 0; i < x.size(); ++i) sum[i % sum.size()] += x[i];
          const DeviceMatrix d_x(x, s.rows, s.cols, type, s.layout), d_sum(before, 1, s.cols, sum_type);
          const Scratch scratch(column_sum_scratch(s.rows, s.cols, 1));
          column_sum({d_x, d_sum, accumulate, scratch.get<float>()}, nullptr);
          expect_close(d_sum.values(), sum, tolerance(sum_type), "sum");
        }
      }
    }
  }
}

TEST_F(ColumnSum, OfExperts) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      for (const bool weighted : {false, true}) {
        for (const bool hot : {false, true}) {
          const bool accumulate = number(0, 1) == 1;  // else NaN is written over
          SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " x " << s.cols << ", hot " << hot
                                          << ", added " << accumulate);
          constexpr int kExperts = 9;
          const Values dy = random_values(s.rows * s.cols, type, random),
                       weights = random_values(s.rows, Type::f32, random);
          std::vector<ExpertRows> experts;
          std::vector<Values> sums;
          std::deque<DeviceMatrix> d_sums;
          std::vector<void*> pointers;
          int64_t first = 0;
          for (int e = 0; e < kExperts; ++e) {
            const int64_t left = s.rows - first, rows = hot                 ? (e == 4 ? left : 0)
                                                        : e == kExperts - 1 ? left
                                                                            : number(0, left / 2);
            experts.push_back({static_cast<int32_t>(first), static_cast<int32_t>(rows)});
            const Values before = accumulate ? random_values(s.cols, type, random)
                                             : Values(static_cast<size_t>(s.cols), std::nan(""));
            d_sums.emplace_back(before, 1, s.cols, type);
            sums.push_back(accumulate ? before : Values(before.size()));
            pointers.push_back(d_sums.back().view().data);
            for (int64_t r = first; r < first + rows; ++r)
              for (int64_t c = 0; c < s.cols; ++c)
                sums.back()[static_cast<size_t>(c)] += dy[static_cast<size_t>(r * s.cols + c)] *
                                                       (weighted ? weights[static_cast<size_t>(r)] : 1);
            first += rows;
          }
          const DeviceMatrix d_dy(dy, s.rows, s.cols, type, s.layout);
          const auto d_weights = device_floats(weights);
          const Scratch scratch(column_sum_scratch(s.rows, s.cols, kExperts));
          expert_bias_bwd({d_dy, weighted ? d_weights.get() : nullptr, experts.data(), pointers.data(),
                           kExperts, type, accumulate, scratch.get<float>()},
                          nullptr);
          for (size_t e = 0; e < kExperts; ++e)
            expect_close(d_sums[e].values(), sums[e], tolerance(type), "d_bias");
        }
      }
    }
  }
}

}  // namespace
}  // namespace mop::kernels
