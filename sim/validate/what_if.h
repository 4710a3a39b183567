// A measured run with one thing changed: what the step would take, and how far off that may be.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sim/validate/comparison.h"

namespace mop::validate {

// How far predictions of similar runs were off.
struct ErrorBar {
  size_t runs = 0;
  std::string chosen;  // how: "plan family mop on cluster h200x4"
  std::optional<double>
      bar;          // standard deviation of measured / predicted over its mean; none of fewer than kFewest
  double bias = 1;  // its mean
};
inline constexpr size_t kFewest = 3;

// Of `others` those of the changed plan's family on the base's cluster; where these are too few, of the
// cluster; then all on the same backend. The base itself does not count.
ErrorBar error_bar(const Comparison& base, plan::Family family, std::span<const Comparison> others);

// Scales the network between nodes: "x2", "x0.5", or the rate of each GPU in "100GB/s". Errors: UserError.
void set_link_speed(cluster::ClusterModel& cluster, const std::string& text);

struct WhatIf {
  double base_measured_s = 0, base_predicted_s = 0;
  predict::Prediction changed;
  // measured x changed / predicted: the base's own error is taken along. Empty when it does not fit.
  std::optional<double> anchored_s;
  ErrorBar error;
};
WhatIf what_if(const Comparison& base, const predict::Scenario& changed, std::span<const Comparison> others);

}  // namespace mop::validate
