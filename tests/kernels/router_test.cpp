#include "kernels/router.h"

#include <optional>
#include <set>

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

Router softmax_router(int experts, int choices, bool normalise) {
  Router r;
  r.experts = experts, r.choices = choices, r.normalise = normalise;
  return r;
}
Router after_router(int experts, int choices) {
  Router r;
  r.experts = experts, r.choices = choices, r.softmax_after = true, r.scale = 1.5F;
  return r;
}
Router sigmoid_router(int experts, int choices, int groups, int top_groups) {
  Router r;
  r.experts = experts, r.choices = choices, r.sigmoid = true, r.normalise = true, r.scale = 2.5F;
  r.groups = groups, r.top_groups = top_groups;
  return r;
}
Router grouped_softmax_router() {
  Router r = softmax_router(160, 6, false);
  r.groups = 8, r.top_groups = 3, r.scale = 16;
  return r;
}
const std::vector<Router> kRouters{
    softmax_router(128, 8, true), softmax_router(64, 8, false), after_router(32, 4),
    sigmoid_router(256, 8, 8, 4), sigmoid_router(384, 8, 1, 1), grouped_softmax_router(),
    softmax_router(5, 5, true),   sigmoid_router(30, 3, 10, 5), softmax_router(512, 32, true)};

Values softmax_of(const Values& x) {
  const double most = *std::max_element(x.begin(), x.end());
  Values out;
  double sum = 0;
  for (const double v : x) out.push_back(std::exp(v - most)), sum += out.back();
  for (double& v : out) v /= sum;
  return out;
}

// Weights of chosen experts, from the definition.
Values weights_of(const Router& r, const Values& logits, const std::vector<int32_t>& ids) {
  Values chosen, scores;
  const Values all = softmax_of(logits);
  for (const int32_t e : ids) {
    chosen.push_back(logits[static_cast<size_t>(e)]);
    scores.push_back(r.sigmoid ? logistic(chosen.back()) : all[static_cast<size_t>(e)]);
  }
  if (r.softmax_after) scores = softmax_of(chosen);
  const double sum = r.normalise ? std::accumulate(scores.begin(), scores.end(), 0.0) : 1;
  for (double& s : scores) s *= r.scale / sum;
  return scores;
}

struct Tokens {
  int64_t rows;
  Values logits;  // (rows, E)
  std::vector<int32_t> ids;
  Values row(const Router& r, int64_t t) const {
    return {logits.begin() + t * r.experts, logits.begin() + (t + 1) * r.experts};
  }
  std::vector<int32_t> chosen(const Router& r, int64_t t) const {
    return {ids.begin() + t * r.choices, ids.begin() + (t + 1) * r.choices};
  }
};

class RouterTest : public OnDevice {
 protected:
  Values logits(int64_t n) { return random_values(n, Type::f32, random, 2); }
};

TEST_F(RouterTest, ChoosesTheBestAndWeighsThem) {
  for (const Router& r : kRouters) {
    for (const bool corrected : {false, true}) {
      SCOPED_TRACE(testing::Message() << r.experts << " experts, " << r.choices << " choices, " << r.groups
                                      << " groups, sigmoid " << r.sigmoid << ", correction " << corrected);
      const int64_t rows = 333, gap = 3;
      Tokens tokens{rows, logits(rows * r.experts), {}};
      const Values correction = random_values(r.experts, Type::f32, random, 0.2);
      const DeviceMatrix d_logits(tokens.logits, rows, r.experts, Type::f32, {gap, 0});
      const auto d_correction = device_floats(correction);
      const DeviceVector<int32_t> ids(std::vector<int32_t>(static_cast<size_t>(rows * r.choices), -1));
      const auto weights = device_floats(Values(static_cast<size_t>(rows * r.choices), DeviceArray::kPoison));
      const Values before = random_values(2 * r.experts, Type::f32, random, 100);
      const auto load = device_floats(before);
      const Scratch scratch(topk_scratch(rows, r.experts));
      topk({r, static_cast<const float*>(d_logits.view().data), rows, r.experts + gap,
            corrected ? d_correction.get() : nullptr, ids.get(), weights.get(), load.get(), true,
            scratch.get<float>()},
           nullptr);
      tokens.ids = ids.values();
      const Values actual = as_values(weights.values());
      Values sums = before;
      for (int64_t t = 0; t < rows; ++t) {
        const Values row = tokens.row(r, t), all = softmax_of(row);
        Values choice;
        for (size_t e = 0; e < row.size(); ++e)
          choice.push_back((r.sigmoid ? logistic(row[e]) : all[e]) + (corrected ? correction[e] : 0));
        // Groups by their score; those whose scores are as good as equal may be in or out.
        const auto each = static_cast<size_t>(r.experts / r.groups);
        std::vector<std::pair<double, size_t>> groups;
        for (size_t g = 0; g < static_cast<size_t>(r.groups); ++g) {
          Values of_group(choice.begin() + static_cast<int64_t>(g * each),
                          choice.begin() + static_cast<int64_t>((g + 1) * each));
          std::sort(of_group.rbegin(), of_group.rend());
          groups.emplace_back(of_group[0] + (r.sigmoid && each > 1 ? of_group[1] : 0), g);
        }
        std::sort(groups.rbegin(), groups.rend());
        std::set<size_t> open;
        for (int g = 0; g < r.top_groups; ++g) open.insert(groups[static_cast<size_t>(g)].second);
        Values candidates;
        for (size_t e = 0; e < choice.size(); ++e)
          if (open.contains(e / each)) candidates.push_back(choice[e]);
        std::sort(candidates.rbegin(), candidates.rend());
        const std::vector<int32_t> chosen = tokens.chosen(r, t);
        EXPECT_EQ(std::set<int32_t>(chosen.begin(), chosen.end()).size(), chosen.size());
        for (size_t i = 0; i < chosen.size(); ++i) {
          ASSERT_TRUE(chosen[i] >= 0 && chosen[i] < r.experts);
          ASSERT_TRUE(open.contains(static_cast<size_t>(chosen[i]) / each)) << "token " << t;
          ASSERT_NEAR(choice[static_cast<size_t>(chosen[i])], candidates[i], 1e-6) << "token " << t;
        }
        const Values expected = weights_of(r, row, chosen);
        for (size_t i = 0; i < expected.size(); ++i)
          ASSERT_NEAR(actual[static_cast<size_t>(t * r.choices) + i], expected[i], 3e-6 * r.scale)
              << "token " << t;
        for (const int32_t e : chosen) ++sums[static_cast<size_t>(e)];
        for (size_t e = 0; e < all.size(); ++e) sums[static_cast<size_t>(r.experts) + e] += all[e];
      }
      expect_close(as_values(load.values()), sums, 1e-6, "load");
    }
  }
}

TEST_F(RouterTest, TiesGoToTheLowerIndex) {
  for (const bool sigmoid : {false, true}) {
    Router r = softmax_router(100, 6, true);
    r.sigmoid = sigmoid;
    Values row(100, 0.5);
    row[70] = row[3] = 1;
    const auto d_logits = device_floats(row);
    const DeviceVector<int32_t> ids(std::vector<int32_t>(6, -1));
    const auto weights = device_floats(Values(6));
    topk({r, d_logits.get(), 1, 100, nullptr, ids.get(), weights.get()}, nullptr);
    EXPECT_EQ(ids.values(), (std::vector<int32_t>{3, 70, 0, 1, 2, 4}));
  }
}

TEST_F(RouterTest, BackwardIsTheDerivative) {
  for (const Router& r : kRouters) {
    for (const bool balanced : {false, true}) {
      for (const Type type : kTypes) {
        SCOPED_TRACE(testing::Message() << r.experts << " experts, " << r.choices << " choices, sigmoid "
                                        << r.sigmoid << ", balance " << balanced << ", " << name(type));
        const int64_t rows = 21;
        Tokens tokens{rows, logits(rows * r.experts), {}};
        for (int64_t t = 0; t < rows; ++t) {
          std::vector<int32_t> all(static_cast<size_t>(r.experts));
          std::iota(all.begin(), all.end(), 0);
          std::shuffle(all.begin(), all.end(), random);
          tokens.ids.insert(tokens.ids.end(), all.begin(), all.begin() + r.choices);
        }
        const Values d_weights = random_values(rows * r.choices, Type::f32, random),
                     load = random_values(2 * r.experts, Type::f32, random, 50);
        const double balance = 0.02;
        // Loss of a token: weights . d_weights + balance x copies . probabilities, whose gradient the kernel
        // writes.
        const auto loss = [&](const Values& row, int64_t t) {
          const Values w = weights_of(r, row, tokens.chosen(r, t));
          double sum = std::inner_product(w.begin(), w.end(), d_weights.begin() + t * r.choices, 0.0);
          if (balanced) {
            const Values p = softmax_of(row);
            sum += balance * std::inner_product(p.begin(), p.end(), load.begin(), 0.0);
          }
          return sum;
        };
        Values expected;
        for (int64_t t = 0; t < rows; ++t) {
          Values row = tokens.row(r, t);
          for (double& x : row) {
            const double h = 1e-5, was = x;
            x = was + h;
            const double high = loss(row, t);
            x = was - h;
            expected.push_back((high - loss(row, t)) / (2 * h));
            x = was;
          }
        }
        const auto d_logits = device_floats(tokens.logits), d_d = device_floats(d_weights),
                   d_load = device_floats(load);
        const DeviceVector<int32_t> ids(tokens.ids);
        const DeviceMatrix out = DeviceMatrix::poisoned(rows, r.experts, type, {2, 0});
        topk_bwd({r, d_logits.get(), rows, r.experts, ids.get(), d_d.get(), balanced ? d_load.get() : nullptr,
                  static_cast<float>(balance), out},
                 nullptr);
        expect_close(out.values(), expected, tolerance(type), "d_logits");
      }
    }
  }
}

TEST_F(RouterTest, BalanceLoss) {
  const Values load = random_values(2 * 100, Type::f32, random, 30);
  double expected = 0;
  for (size_t e = 0; e < 100; ++e) expected += 0.25 * load[e] * load[100 + e];
  const auto d_load = device_floats(load);
  const DeviceVector<double> sum({3.0});
  balance_loss({d_load.get(), 100, 0.25, sum.get(), true}, nullptr);
  EXPECT_NEAR(sum.values()[0], 3 + expected, 1e-9 * std::abs(expected));
  balance_loss({d_load.get(), 100, 0, sum.get(), false}, nullptr);
  EXPECT_EQ(sum.values()[0], 0);
}

TEST_F(RouterTest, SortIsStable) {
  for (const int64_t copies : {0, 1, 31, 4096, 4097, 100000}) {
    for (const int experts : {1, 2, 128, 511, 512}) {
      for (const bool hot : {false, true}) {
        SCOPED_TRACE(testing::Message() << copies << " copies, " << experts << " experts, hot " << hot);
        std::vector<int32_t> ids(static_cast<size_t>(copies)), counts(static_cast<size_t>(experts));
        for (int32_t& id : ids) {
          id = hot ? experts / 2 : static_cast<int32_t>(number(0, experts - 1));
          ++counts[static_cast<size_t>(id)];
        }
        std::vector<int32_t> order(ids.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
          return ids[static_cast<size_t>(a)] < ids[static_cast<size_t>(b)];
        });
        const DeviceVector<int32_t> d_ids(ids), d_order(std::vector<int32_t>(ids.size(), -1)),
            d_counts(std::vector<int32_t>(counts.size(), -1));
        const Scratch scratch(sort_scratch(copies, experts));
        sort({d_ids.get(), copies, experts, d_order.get(), d_counts.get(), scratch.get<int32_t>()}, nullptr);
        EXPECT_EQ(d_order.values(), order);
        EXPECT_EQ(d_counts.values(), counts);
      }
    }
  }
}

TEST_F(RouterTest, RefusesWhatItDoesNotHold) {
  EXPECT_THROW(topk({softmax_router(513, 8, true)}, nullptr), std::invalid_argument);
  EXPECT_THROW(topk({softmax_router(128, 33, true)}, nullptr), std::invalid_argument);
  EXPECT_THROW(topk({sigmoid_router(128, 8, 8, 0)}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace mop::kernels
