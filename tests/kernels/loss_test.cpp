#include "kernels/loss.h"

#include <deque>
#include <limits>

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

struct Shape {
  int64_t rows, cols, blocks,
      vocabulary;  // blocks of `cols` columns; what is beyond the vocabulary is padding
  int64_t target_cols, target_gap;
  Layout layout;
};
const std::vector<Shape> kShapes{{12, 1000, 1, 1000, 12, 0, {}},     {12, 997, 3, 2900, 4, 5, {}},
                                 {7, 40, 4, 100, 7, 0, {3, 1}},      {3, 20000, 1, 19990, 3, 0, {}},
                                 {6, 5, 2, 6, 2, 1, {1, 3}},         {0, 64, 1, 64, 4, 0, {}},
                                 {40, 4096, 2, 4097, 10, 0, {8, 0}}, {3, 30001, 2, 60000, 3, 0, {1, 3}},
                                 {2, 70001, 1, 69990, 2, 0, {1, 1}}};

class Loss : public OnDevice {
 protected:
  struct Problem {
    Shape s;
    std::vector<Values> logits;  // of each block
    std::vector<int32_t> targets, stored;
    Values log_sum, target_logit;
    double valid = 0;
    double logit(int64_t row, int64_t col) const {
      return logits[static_cast<size_t>(col / s.cols)][static_cast<size_t>(row * s.cols + col % s.cols)];
    }
  };
  Problem problem(const Shape& s, Type type) {
    Problem p{s, {}, {}, {}, {}, {}};
    for (int64_t b = 0; b < s.blocks; ++b)
      p.logits.push_back(random_values(s.rows * s.cols, type, random, 6));
    const int64_t ld = s.target_cols + s.target_gap;
    p.stored.assign(static_cast<size_t>((s.rows / s.target_cols + 1) * ld), 12345);
    for (int64_t r = 0; r < s.rows; ++r) {
      const auto target = static_cast<int32_t>(number(0, 4) == 0 ? kNoTarget : number(0, s.vocabulary - 1));
      p.targets.push_back(target);
      p.stored[static_cast<size_t>(r / s.target_cols * ld + r % s.target_cols)] = target;
      p.valid += target != kNoTarget;
      double most = -1e300, sum = 0;
      for (int64_t c = 0; c < s.vocabulary; ++c) most = std::max(most, p.logit(r, c));
      for (int64_t c = 0; c < s.vocabulary; ++c) sum += std::exp(p.logit(r, c) - most);
      p.log_sum.push_back(most + std::log(sum));
      p.target_logit.push_back(target == kNoTarget ? 0 : p.logit(r, target));
    }
    p.valid = std::max(p.valid, 1.0);
    return p;
  }
};

TEST_F(Loss, StatisticsAndGradient) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      for (const bool merged : {false, true}) {  // by accumulation, or by the gradient kernel
        SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " x " << s.cols << ", " << s.blocks
                                        << " blocks, merged " << merged);
        const Problem p = problem(s, type);
        const DeviceVector<int32_t> stored(p.stored), invalid({std::numeric_limits<int32_t>::max()});
        const Targets targets{stored.get(), s.target_cols, s.target_cols + s.target_gap};
        const int64_t kept = merged ? 1 : s.blocks;
        const auto statistics =
            device_floats(Values(static_cast<size_t>(kept * s.rows * 3), DeviceArray::kPoison));
        std::deque<DeviceMatrix> logits;
        for (const Values& block : p.logits) logits.emplace_back(block, s.rows, s.cols, type, s.layout);
        for (int64_t b = 0; b < s.blocks; ++b)
          cross_entropy({logits[static_cast<size_t>(b)],
                         {b * s.cols, s.vocabulary},
                         targets,
                         statistics.get() + (merged ? 0 : b * s.rows * 3),
                         merged && b > 0,
                         invalid.get()},
                        nullptr);
        EXPECT_EQ(invalid.values()[0], std::numeric_limits<int32_t>::max());
        if (merged) {
          const Values all = as_values(statistics.values());
          for (size_t r = 0; r < p.targets.size(); ++r) {
            EXPECT_NEAR(all[3 * r] + std::log(all[3 * r + 1]), p.log_sum[r], 2e-6 * std::abs(p.log_sum[r]));
            EXPECT_EQ(all[3 * r + 2], p.target_logit[r]);
          }
        }
        const DeviceVector<double> valid({p.valid}), loss({2.5});
        const int64_t first = s.rows / 3, last = s.rows - s.rows / 4;
        for (int64_t b = 0; b < s.blocks; ++b)
          cross_entropy_bwd({logits[static_cast<size_t>(b)],
                             {b * s.cols, s.vocabulary},
                             targets,
                             statistics.get(),
                             kept,
                             valid.get(),
                             b == 0 ? loss.get() : nullptr,
                             first,
                             last,
                             true},
                            nullptr);
        double expected_loss = 2.5;
        for (int64_t r = first; r < last; ++r) {
          const auto row = static_cast<size_t>(r);
          if (p.targets[row] != kNoTarget) expected_loss += (p.log_sum[row] - p.target_logit[row]) / p.valid;
        }
        EXPECT_NEAR(loss.values()[0], expected_loss, 2e-6 * expected_loss);
        for (int64_t b = 0; b < s.blocks; ++b) {
          Values gradient;
          for (int64_t r = 0; r < s.rows; ++r) {
            const auto row = static_cast<size_t>(r);
            for (int64_t col = b * s.cols; col < (b + 1) * s.cols; ++col)
              gradient.push_back(
                  p.targets[row] == kNoTarget || col >= s.vocabulary
                      ? 0
                      : (std::exp(p.logit(r, col) - p.log_sum[row]) - (col == p.targets[row])) / p.valid);
          }
          const Values actual = logits[static_cast<size_t>(b)].values();
          expect_close(actual, gradient, tolerance(type), "gradient");
          for (size_t i = 0; i < gradient.size(); ++i)  // also the small ones, by their own size
            ASSERT_NEAR(actual[i], gradient[i],
                        1e-5 * std::abs(gradient[i]) + tolerance(type) * std::abs(gradient[i]) + 1e-12);
        }
      }
    }
  }
}

TEST_F(Loss, LargeLogitsStayFinite) {
  const Values logits{-9000, 9000, 8999, -9000, -9000, -9000, -9000, -9000, -9000, -9000};
  const DeviceMatrix d(logits, 1, 10, Type::f32);
  const DeviceVector<int32_t> target({2});
  const DeviceVector<double> valid({1.0}), loss({0.0});
  const auto statistics = device_floats(Values(3));
  cross_entropy({d, {0, 10}, {target.get(), 1, 1}, statistics.get(), false, nullptr}, nullptr);
  cross_entropy_bwd(
      {d, {0, 10}, {target.get(), 1, 1}, statistics.get(), 1, valid.get(), loss.get(), 0, 1, false}, nullptr);
  EXPECT_NEAR(loss.values()[0], 1 + std::log1p(std::exp(-1)),
              2e-3);  // fp32 has 1e-3 between neighbours of 9000
  EXPECT_NEAR(d.values()[1], 1 / (1 + std::exp(-1)), 1e-3);
}

TEST_F(Loss, WithoutTargetsThereIsNone) {
  const DeviceMatrix d(random_values(64, Type::bf16, random), 4, 16, Type::bf16);
  const DeviceVector<int32_t> targets(std::vector<int32_t>(4, kNoTarget));
  const DeviceVector<double> valid({0.0}), loss({7.0});
  const auto statistics = device_floats(Values(12));
  cross_entropy({d, {0, 16}, {targets.get(), 4, 4}, statistics.get(), false, nullptr}, nullptr);
  cross_entropy_bwd(
      {d, {0, 16}, {targets.get(), 4, 4}, statistics.get(), 1, valid.get(), loss.get(), 0, 4, false},
      nullptr);
  EXPECT_EQ(loss.values()[0], 0);
  EXPECT_EQ(d.values(), Values(64));
}

TEST_F(Loss, ReportsTargetsBeyondTheVocabulary) {
  const DeviceMatrix d(random_values(64, Type::bf16, random), 4, 16, Type::bf16);
  const DeviceVector<int32_t> targets({3, 15, 14, -7}), invalid({std::numeric_limits<int32_t>::max()});
  const auto statistics = device_floats(Values(12));
  cross_entropy({d, {0, 15}, {targets.get(), 4, 4}, statistics.get(), false, invalid.get()}, nullptr);
  EXPECT_EQ(invalid.values()[0], 1);
}

}  // namespace
}  // namespace mop::kernels
