// Routers: which experts a token goes to, with what weight, and the gradient of both.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "exec/cpu/routing.h"
#include "sim/model/balance.h"

namespace mop::cpu {
namespace {

using model::ModelConfig;
using model::Scoring;

constexpr int64_t kScratch = 9;  // vectors that a kernel takes from the workspace, at most

constexpr double kSigmoidSum = 1e-20;  // added to the sum of sigmoid scores that normalises them

void read(const Run& run, std::span<double> to) {
  convert(run, {reinterpret_cast<std::byte*>(to.data()), run.n, Type::f64});
}

void write(std::span<double> from, const Run& run) {
  convert({reinterpret_cast<std::byte*>(from.data()), run.n, Type::f64}, run);
}

// values -> their softmax.
void softmax(std::span<double> values) {
  const double most = *std::ranges::max_element(values);
  double sum = 0;
  for (double& v : values) sum += v = std::exp(v - most);
  for (double& v : values) v /= sum;
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// The first `count` of `order` become the indices of the largest values, ties by the lower index.
void largest(std::span<const double> values, int64_t count, std::span<int32_t> order) {
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
    return values[a] != values[b] ? values[a] > values[b] : a < b;
  });
}

// Experts outside the best groups are out of the question: -infinity. A group is as good as its best expert,
// with sigmoid scores as its two best together.
void keep_best_groups(const ModelConfig& config, std::span<double> choice, std::span<double> scores,
                      std::span<int32_t> order) {
  const int64_t groups = config.router_groups, each = config.experts / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double best = -std::numeric_limits<double>::infinity(), second = best;
    for (const double c : choice.subspan(g * each, each)) {
      second = std::max(second, std::min(best, c));
      best = std::max(best, c);
    }
    scores[g] = config.scoring == Scoring::sigmoid && each > 1 ? best + second : best;
  }
  largest(scores.first(groups), config.router_top_groups, order.first(groups));
  for (const int32_t g : order.subspan(config.router_top_groups, groups - config.router_top_groups))
    std::ranges::fill(choice.subspan(g * each, each), -std::numeric_limits<double>::infinity());
}

// logits (E) of the chosen -> their weights (k). `scores`: (E) the softmax of all logits, for softmax
// routers.
void weigh(const ModelConfig& config, std::span<const double> logits, std::span<const double> scores,
           std::span<const int32_t> chosen, std::span<double> weights) {
  for (size_t i = 0; i < chosen.size(); ++i)
    weights[i] = config.softmax_after_topk            ? logits[chosen[i]]
                 : config.scoring == Scoring::sigmoid ? sigmoid(logits[chosen[i]])
                                                      : scores[chosen[i]];
  if (config.softmax_after_topk) softmax(weights);
  double factor = config.routed_scale;
  if (config.normalise_topk)
    factor /=
        std::accumulate(weights.begin(), weights.end(), config.scoring == Scoring::sigmoid ? kSigmoidSum : 0);
  for (double& w : weights) w *= factor;
}

}  // namespace

int64_t router_bytes(const program::StepProgram& program, const program::Op& op) {
  int64_t widest = 0;  // experts, or the two values of each of a load
  for (uint32_t u = op.uses; u < op.uses + op.use_count; ++u)
    widest = std::max(widest, program.uses[u].view.cols);
  return kScratch * Workspace::size<double>(widest);
}

void topk(const Call& call, const Constants& constants, Workspace& workspace) {
  const ModelConfig& config = constants.model;
  const Operand &logits = required(call.in, 0), &weights = required(call.out, 1);
  const Operand correction = optional(call.in, 1), load = optional(call.out, 2);
  const auto ids = integers(required(call.out, 0));
  const int64_t experts = logits.view.cols, k = weights.view.cols;
  ensure(experts == config.experts && k == config.top_k, "a router has the model's experts");

  const Workspace::Scope scope(workspace);
  const auto logit = workspace.take<double>(experts), probability = workspace.take<double>(experts),
             choice = workspace.take<double>(experts), bias = workspace.take<double>(experts),
             group_scores = workspace.take<double>(config.router_groups), weight = workspace.take<double>(k),
             sums = workspace.take<double>(2 * experts);
  const auto order = workspace.take<int32_t>(experts);
  std::ranges::fill(bias, 0);
  std::ranges::fill(sums, 0);
  if (correction) read(row(correction, 0), bias);
  for (int64_t t = 0; t < rows(logits); ++t) {
    read(row(logits, t), logit);
    std::ranges::copy(logit, probability.begin());
    softmax(probability);
    for (int64_t e = 0; e < experts; ++e) {
      if (config.scoring == Scoring::sigmoid)
        choice[e] = sigmoid(logit[e]) + bias[e];
      else  // the order of the logits is that of their softmax, and no two of them underflow to the same
        choice[e] = correction ? probability[e] + bias[e] : logit[e];
    }
    if (config.router_top_groups < config.router_groups)
      keep_best_groups(config, choice, group_scores, order);
    largest(choice, k, order);
    const auto chosen = ids.subspan(t * k, k);
    std::ranges::copy(order.first(k), chosen.begin());
    weigh(config, logit, probability, chosen, weight);
    write(weight, row(weights, t));
    for (const int32_t e : chosen) ++sums[e];
    for (int64_t e = 0; e < experts; ++e) sums[experts + e] += probability[e];
  }
  if (!load) return;
  ensure(load.view.elements() == 2 * experts, "a load is copies, then probabilities");
  if (call.op->does.accumulate) {
    const auto before = workspace.take<double>(2 * experts);
    read(row(load, 0), before);
    for (int64_t i = 0; i < 2 * experts; ++i) sums[i] += before[i];
  }
  write(sums, row(load, 0));
}

void topk_bwd(const Call& call, const Constants& constants, Workspace& workspace) {
  const ModelConfig& config = constants.model;
  const Operand &d_weights = required(call.in, 0), &logits = required(call.in, 3),
                &d_logits = required(call.out, 0);
  const auto ids = integers(required(call.in, 1));
  const Operand load = optional(call.in, 4);
  const int64_t experts = logits.view.cols, k = d_weights.view.cols;
  ensure(experts == config.experts && k == config.top_k, "a router has the model's experts");

  const Workspace::Scope scope(workspace);
  const auto logit = workspace.take<double>(experts), probability = workspace.take<double>(experts),
             gradient = workspace.take<double>(experts), weight = workspace.take<double>(k),
             d_weight = workspace.take<double>(k), all_load = workspace.take<double>(2 * experts);
  const program::Does& does = call.op->does;
  if (load) {
    read(row(load, 0), all_load);
    ensure(does.a > 0 && does.b > 0 && does.c > 0, "a balance loss is over layers, tokens and micro-batches");
  }
  for (int64_t t = 0; t < rows(logits); ++t) {
    read(row(logits, t), logit);
    read(row(d_weights, t), d_weight);
    std::ranges::copy(logit, probability.begin());
    softmax(probability);
    std::ranges::fill(gradient, 0);
    const auto chosen = ids.subspan(t * k, k);
    weigh(config, logit, probability, chosen, weight);

    // Of weights = scale x s, or scale x s / (sum of s): from d_weight to d s, the scores' gradient.
    const double along = std::inner_product(weight.begin(), weight.end(), d_weight.begin(), 0.0);
    if (config.softmax_after_topk) {
      const double mean = along / config.routed_scale;
      for (int64_t i = 0; i < k; ++i) gradient[chosen[i]] = weight[i] * (d_weight[i] - mean);
    } else {
      const bool sigmoids = config.scoring == Scoring::sigmoid;
      const auto score = [&](int64_t i) {
        return sigmoids ? sigmoid(logit[chosen[i]]) : probability[chosen[i]];
      };
      double sum = sigmoids ? kSigmoidSum : 0, projection = 0;
      for (int64_t i = 0; i < k; ++i) sum += score(i);
      for (int64_t i = 0; i < k; ++i) {
        double d = config.routed_scale * d_weight[i];
        if (config.normalise_topk) d = (d - along) / sum;
        gradient[chosen[i]] = sigmoids ? d * score(i) * sigmoid(-logit[chosen[i]]) : d * score(i);
        projection += d * score(i);
      }
      if (!sigmoids)
        for (int64_t e = 0; e < experts; ++e) gradient[e] -= probability[e] * projection;
    }
    if (load)
      model::add_balance_gradient(config, all_load, static_cast<double>(does.a) * static_cast<double>(does.b),
                                  1.0 / static_cast<double>(does.c), probability, gradient);
    write(gradient, row(d_logits, t));
  }
}

void balance_loss(const Call& call, const Constants& constants, Workspace& workspace) {
  const Operand &load = required(call.in, 0), &sums = required(call.out, 0);
  const program::Does& does = call.op->does;
  ensure(does.a > 0 && does.b > 0 && does.c > 0, "a balance loss is over layers, tokens and micro-batches");
  double loss = 0;
  if (call.index == 0) {
    const Workspace::Scope scope(workspace);
    const auto all_load = workspace.take<double>(load.view.elements());
    read(row(load, 0), all_load);
    loss = model::balance_loss(constants.model, all_load,
                               static_cast<double>(does.a) * static_cast<double>(does.b)) /
           static_cast<double>(does.c);
  }
  set_scalar(sums, loss, does.accumulate);
}

}  // namespace mop::cpu
