#include "sim/model/balance.h"

#include <numeric>

#include "sim/base/error.h"

namespace mop::model {
namespace {

double scale(const ModelConfig& config, std::span<const double> load, double rows) {
  ensure(load.size() == 2 * static_cast<size_t>(config.experts), "a load is copies, then probabilities");
  ensure(rows > 0, "a balance loss is over some rows");
  return config.aux_loss_coefficient * static_cast<double>(config.experts) / (rows * rows);
}

}  // namespace

double balance_loss(const ModelConfig& config, std::span<const double> load, double rows) {
  const double factor = scale(config, load, rows);
  const auto copies = load.first(load.size() / 2), probabilities = load.subspan(load.size() / 2);
  return factor * std::inner_product(copies.begin(), copies.end(), probabilities.begin(), 0.0);
}

void add_balance_gradient(const ModelConfig& config, std::span<const double> load, double rows, double weight,
                          std::span<const double> probabilities, std::span<double> d_logits) {
  const double factor = weight * scale(config, load, rows);
  const auto copies = load.first(load.size() / 2);
  const double mean = std::inner_product(copies.begin(), copies.end(), probabilities.begin(), 0.0);
  for (size_t e = 0; e < copies.size(); ++e) d_logits[e] += factor * probabilities[e] * (copies[e] - mean);
}

}  // namespace mop::model
