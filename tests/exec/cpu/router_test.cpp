#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>

#include "exec/cpu/routing.h"
#include "sim/base/error.h"
#include "sim/model/balance.h"
#include "tests/exec/cpu/routing_support.h"

namespace mop::cpu::test {
namespace {

using model::ModelConfig;
using model::Scoring;

using Vector = std::vector<double>;

struct Family {
  const char* name;
  ModelConfig config;
};

// The routers of the families, by what sim/model/parse_config.cpp makes of them.
std::vector<Family> families() {
  ModelConfig base;
  base.experts = 24;
  base.top_k = 4;
  base.aux_loss_coefficient = 0.7;
  std::vector<Family> all;
  all.push_back({"olmoe", base});
  all.push_back({"qwen3, mixtral", base});
  all.back().config.normalise_topk = true;
  all.push_back({"gpt_oss", base});
  all.back().config.softmax_after_topk = true;
  all.push_back({"deepseek_v2", base});
  all.back().config.router_groups = 6, all.back().config.router_top_groups = 2;
  all.back().config.routed_scale = 16;
  all.push_back({"deepseek_v3", base});
  all.back().config.scoring = Scoring::sigmoid;
  all.back().config.correction_bias = all.back().config.normalise_topk = true;
  all.back().config.router_groups = 4, all.back().config.router_top_groups = 2;
  all.back().config.routed_scale = 2.5;
  all.push_back({"kimi_k2", all.back().config});
  all.back().config.router_groups = all.back().config.router_top_groups = 1;
  all.push_back({"sigmoid without normalisation", all.back().config});
  all.back().config.normalise_topk = false;
  return all;
}

Vector softmax_of(const Vector& x) {
  double sum = 0;
  for (const double v : x) sum += std::exp(v);
  Vector p;
  for (const double v : x) p.push_back(std::exp(v) / sum);
  return p;
}

Vector scores_of(const ModelConfig& c, const Vector& logits) {
  if (c.scoring == Scoring::softmax) return softmax_of(logits);
  Vector s;
  for (const double v : logits) s.push_back(1 / (1 + std::exp(-v)));
  return s;
}

// The chosen experts, as a set: those that fewer than k allowed experts come before.
std::set<int> choose(const ModelConfig& c, const Vector& logits, const Vector& correction) {
  const int experts = static_cast<int>(c.experts), groups = static_cast<int>(c.router_groups),
            each = experts / groups;
  Vector choice = scores_of(c, logits);
  for (int e = 0; e < experts; ++e) choice[e] += correction[e];
  const auto better_than = [](const Vector& values, int i) {
    int count = 0;
    for (int j = 0; j < static_cast<int>(values.size()); ++j)
      count += values[j] > values[i] || (values[j] == values[i] && j < i);
    return count;
  };
  Vector group_scores;
  for (int g = 0; g < groups; ++g) {
    Vector members(choice.begin() + g * each, choice.begin() + (g + 1) * each);
    std::ranges::sort(members, std::greater());
    group_scores.push_back(c.scoring == Scoring::sigmoid ? members[0] + members[1] : members[0]);
  }
  for (int e = 0; e < experts; ++e)
    if (better_than(group_scores, e / each) >= c.router_top_groups) choice[e] = -1e300;
  std::set<int> chosen;
  for (int e = 0; e < experts; ++e)
    if (better_than(choice, e) < c.top_k) chosen.insert(e);
  return chosen;
}

// Weights of given experts, as the families' definitions say.
Vector weights_of(const ModelConfig& c, const Vector& logits, const std::vector<int>& ids) {
  Vector weights;
  if (c.softmax_after_topk) {
    for (const int e : ids) weights.push_back(logits[e]);
    weights = softmax_of(weights);
  } else {
    const Vector scores = scores_of(c, logits);
    for (const int e : ids) weights.push_back(scores[e]);
  }
  if (c.normalise_topk) {
    const double sum = std::accumulate(weights.begin(), weights.end(), 1e-20);
    for (double& w : weights) w /= sum;
  }
  for (double& w : weights) w *= c.routed_scale;
  return weights;
}

Vector row_of(const Tensor& t, int64_t row, int64_t cols) {
  Vector v;
  for (int64_t c = 0; c < cols; ++c) v.push_back(t.at(row, c));
  return v;
}

std::vector<int> ids_of(const Tensor& t, int64_t row, int64_t cols) {
  std::vector<int> v;
  for (int64_t c = 0; c < cols; ++c) v.push_back(static_cast<int>(t.at(row, c)));
  return v;
}

// Runs the call in a workspace of routed_bytes.
void run(const TestCall& call, const Constants& constants) {
  program::StepProgram program;
  program.ops.push_back(*call.get().op);
  for (const auto& operands : {call.get().in, call.get().out})
    for (const Operand& o : operands)
      if (o) program.uses.push_back({0, false, o.view});
  program.ops[0].use_count = static_cast<uint32_t>(program.uses.size());
  Workspace workspace(routed_bytes(program, program.ops[0]));
  run_routed(call.get(), constants, workspace);
}

struct Routed {
  explicit Routed(const ModelConfig& c, int64_t tokens, Type type = Type::f32)
      : config(c),
        n(tokens),
        logits(type, n, c.experts),
        correction(Type::f32, 1, c.experts),
        ids(Type::i32, n, c.top_k),
        weights(Type::f32, n, c.top_k),
        load(Type::f32, 1, 2 * c.experts) {}

  Constants constants() const { return {config, {}, {}}; }
  void topk(bool accumulate = false) {
    std::vector<Operand> in{logits.operand(), config.correction_bias ? correction.operand() : Operand{}};
    const TestCall call(OpKind::topk, {.accumulate = accumulate}, in,
                        {ids.operand(), weights.operand(), load.operand()});
    run(call, constants());
  }
  Tensor bwd(const Tensor& d_weights, const Operand& all_load, program::Does does = {}) {
    Tensor d_logits(Type::f32, n, config.experts);
    const TestCall call(OpKind::topk_bwd, does,
                        {d_weights.operand(), ids.operand(), weights.operand(), logits.operand(), all_load},
                        {d_logits.operand()});
    run(call, constants());
    return d_logits;
  }

  ModelConfig config;
  int64_t n;
  Tensor logits, correction, ids, weights, load;
};

TEST(Router, ChoosesAndWeighsAsTheFamiliesDo) {
  std::mt19937_64 random(1);
  for (const Family& family : families()) {
    SCOPED_TRACE(family.name);
    const ModelConfig& c = family.config;
    for (const Type type : {Type::f32, Type::bf16}) {
      Routed r(c, 200, type);
      std::normal_distribution<double> values(0, 2);
      for (int64_t i = 0; i < r.logits.elements(); ++i) r.logits.set(i, values(random));
      r.correction.randomise(random);
      r.topk();
      Vector load(static_cast<size_t>(2 * c.experts));
      for (int64_t t = 0; t < r.n; ++t) {
        const Vector logits = row_of(r.logits, t, c.experts);
        const Vector correction = c.correction_bias ? row_of(r.correction, 0, c.experts) : Vector(c.experts);
        const std::vector<int> ids = ids_of(r.ids, t, c.top_k);
        ASSERT_EQ(std::set<int>(ids.begin(), ids.end()), choose(c, logits, correction)) << t;
        const Vector expected = weights_of(c, logits, ids);
        for (int64_t i = 0; i < c.top_k; ++i)
          ASSERT_NEAR(r.weights.at(t, i), expected[i], 1e-6 * c.routed_scale);
        const Vector p = softmax_of(logits);
        for (const int e : ids) load[e] += 1;
        for (int64_t e = 0; e < c.experts; ++e) load[c.experts + e] += p[e];
      }
      for (int64_t i = 0; i < 2 * c.experts; ++i) ASSERT_NEAR(r.load.at(i), load[i], 1e-6 * load[i]);
      r.topk(true);
      for (int64_t i = 0; i < 2 * c.experts; ++i) ASSERT_NEAR(r.load.at(i), 2 * load[i], 2e-6 * load[i]);
    }
  }
}

TEST(Router, TiesGoToTheLowerExpert) {
  for (const Family& family : families()) {
    SCOPED_TRACE(family.name);
    Routed r(family.config, 2);
    for (int64_t e = 0; e < family.config.experts; ++e) r.logits.set(1, e, e == 7 ? 1 : 0);
    r.topk();
    EXPECT_EQ(ids_of(r.ids, 0, 4), (std::vector<int>{0, 1, 2, 3}));
    EXPECT_EQ(ids_of(r.ids, 1, 4), (std::vector<int>{7, 0, 1, 2}));
  }
}

TEST(Router, FarApartLogitsKeepTheirOrder) {
  Routed r(families()[0].config, 1);
  for (int64_t e = 0; e < r.config.experts; ++e) r.logits.set(e, e == 0 ? 5000.0 : static_cast<double>(e));
  r.topk();
  EXPECT_EQ(ids_of(r.ids, 0, 4), (std::vector<int>{0, 23, 22, 21}));
  EXPECT_EQ(r.weights.at(0), 1);
  EXPECT_EQ(r.weights.at(1), 0);
}

TEST(Router, GradientIsThatOfTheWeights) {
  std::mt19937_64 random(2);
  for (const Family& family : families()) {
    SCOPED_TRACE(family.name);
    const ModelConfig& c = family.config;
    Routed r(c, 20);
    r.logits.randomise(random);
    r.correction.randomise(random);
    r.topk();
    Tensor d_weights(Type::f32, r.n, c.top_k);
    d_weights.randomise(random);
    const Tensor d_logits = r.bwd(d_weights, {});
    for (int64_t t = 0; t < r.n; ++t) {
      const std::vector<int> ids = ids_of(r.ids, t, c.top_k);
      const auto loss = [&](const Vector& logits) {
        const Vector w = weights_of(c, logits, ids);
        double sum = 0;
        for (int64_t i = 0; i < c.top_k; ++i) sum += w[i] * d_weights.at(t, i);
        return sum;
      };
      for (int64_t e = 0; e < c.experts; ++e) {
        Vector up = row_of(r.logits, t, c.experts), down = up;
        constexpr double kStep = 1e-5;
        up[e] += kStep, down[e] -= kStep;
        const double slope = (loss(up) - loss(down)) / (2 * kStep);
        ASSERT_NEAR(d_logits.at(t, e), slope, 1e-7 * c.routed_scale) << t << " " << e;
      }
    }
  }
}

TEST(Router, WeakSigmoidsAreNormalised) {  // scores that all but vanish: the gradient stays finite
  Routed r(families()[5].config, 1);
  for (int64_t e = 0; e < r.config.experts; ++e) r.logits.set(e, -100.0 - static_cast<double>(e));
  r.topk();
  EXPECT_LT(r.weights.at(0), 1e-15);  // 1e-20 in the sum is more than the scores
  Tensor d_weights(Type::f32, 1, 4);
  d_weights.fill(1);
  const Tensor d_logits = r.bwd(d_weights, {});
  for (int64_t e = 0; e < r.config.experts; ++e) EXPECT_TRUE(std::isfinite(d_logits.at(e)));
}

// load_balancing_loss_func of transformers over the logits of all layers and ranks, as its text reads.
double reference_loss(const ModelConfig& c, const std::vector<Vector>& all_logits,
                      const std::vector<std::vector<int>>& all_ids) {
  const double rows = static_cast<double>(all_logits.size());
  Vector tokens_per_expert(static_cast<size_t>(c.experts)),
      router_prob_per_expert(static_cast<size_t>(c.experts));
  for (size_t t = 0; t < all_logits.size(); ++t) {
    const Vector p = softmax_of(all_logits[t]);
    for (const int e : all_ids[t]) tokens_per_expert[e] += 1 / rows;
    for (size_t e = 0; e < p.size(); ++e) router_prob_per_expert[e] += p[e] / rows;
  }
  double sum = 0;
  for (size_t e = 0; e < tokens_per_expert.size(); ++e)
    sum += tokens_per_expert[e] * router_prob_per_expert[e];
  return c.aux_loss_coefficient * static_cast<double>(c.experts) * sum;
}

TEST(Router, BalanceLossAndItsGradient) {
  std::mt19937_64 random(3);
  for (const Family& family : families()) {
    SCOPED_TRACE(family.name);
    const ModelConfig& c = family.config;
    const int64_t layers = 3, n = 7, micro_batches = 2;
    std::vector<Routed> all;
    Tensor load(Type::f64, 1, 2 * c.experts);
    std::vector<Vector> logits;
    std::vector<std::vector<int>> ids;
    for (int64_t layer = 0; layer < layers; ++layer) {
      Routed& r = all.emplace_back(c, n);
      r.logits.randomise(random);
      r.topk();
      for (int64_t i = 0; i < 2 * c.experts; ++i) load.set(i, load.at(i) + r.load.at(i));
      for (int64_t t = 0; t < n; ++t) {
        logits.push_back(row_of(r.logits, t, c.experts));
        ids.push_back(ids_of(r.ids, t, c.top_k));
      }
    }
    const program::Does does{.accumulate = true, .a = layers, .b = n, .c = micro_batches};
    const double expected = reference_loss(c, logits, ids) / micro_batches;
    for (const int index : {0, 1}) {
      Tensor sums(Type::f64, 1, 1);
      sums.fill(5);
      const TestCall call(OpKind::balance_loss, does, {load.operand()}, {sums.operand()}, index, 2);
      run(call, all[0].constants());
      EXPECT_NEAR(sums.at(0), index == 0 ? 5 + expected : 5, 1e-6);
    }
    Tensor d_weights(Type::f32, n, c.top_k);  // zero: only the balance loss pulls
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor d_logits = all[layer].bwd(d_weights, load.operand(), does);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t e = 0; e < c.experts; ++e) {
          constexpr double kStep = 1e-5;
          double& logit = logits[layer * n + t][e];
          const double value = logit;
          logit = value + kStep;
          const double up = reference_loss(c, logits, ids);
          logit = value - kStep;
          const double down = reference_loss(c, logits, ids);
          logit = value;
          ASSERT_NEAR(d_logits.at(t, e), (up - down) / (2 * kStep) / micro_batches, 1e-8);
        }
      }
    }
  }
}

TEST(Router, BothGradientsAddUp) {
  std::mt19937_64 random(4);
  const ModelConfig c = families()[4].config;
  Routed r(c, 9);
  r.logits.randomise(random);
  r.topk();
  Tensor d_weights(Type::f32, r.n, c.top_k), zero(Type::f32, r.n, c.top_k);
  d_weights.randomise(random);
  const program::Does does{.a = 2, .b = 9, .c = 1};
  const Tensor both = r.bwd(d_weights, r.load.operand(), does), one = r.bwd(d_weights, {}),
               other = r.bwd(zero, r.load.operand(), does);
  for (int64_t i = 0; i < both.elements(); ++i) ASSERT_NEAR(both.at(i), one.at(i) + other.at(i), 1e-6);
}

TEST(Router, Errors) {
  Routed r(families()[0].config, 2);
  r.config.experts = 25;
  EXPECT_THROW(r.topk(), InternalError);
  Routed wrong(families()[0].config, 2);
  wrong.topk();
  Tensor d_weights(Type::f32, 2, 4);
  EXPECT_THROW(wrong.bwd(d_weights, wrong.load.operand()), InternalError);  // over no layers and tokens
}

}  // namespace
}  // namespace mop::cpu::test
