#include "sim/validate/what_if.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <functional>

#include "sim/base/error.h"
#include "sim/base/quantity.h"

namespace mop::validate {

ErrorBar error_bar(const Comparison& base, plan::Family family, std::span<const Comparison> others) {
  struct Choice {
    std::string how;
    std::function<bool(const Comparison&)> similar;
  };
  const std::string& cluster = base.scenario.cluster.name;
  const Choice choices[] = {
      {fmt::format("plan family {} on cluster {}", plan::family_name(family), cluster),
       [&](const Comparison& c) {
         return c.scenario.cluster.name == cluster && c.scenario.plan.family == family;
       }},
      {fmt::format("any plan on cluster {}", cluster),
       [&](const Comparison& c) { return c.scenario.cluster.name == cluster; }},
      {"any plan on any cluster", [](const Comparison&) { return true; }},
  };
  ErrorBar result;
  for (const Choice& choice : choices) {
    std::vector<double> ratios;
    for (const Comparison& c : others)
      if (c.step_s && c.measured.step_time_s && c.on_gpus == base.on_gpus &&
          c.measured.id != base.measured.id && choice.similar(c))
        ratios.push_back(*c.measured.step_time_s / *c.step_s);
    result = {ratios.size(), choice.how, std::nullopt, 1};
    if (ratios.size() < kFewest) continue;
    const auto n = static_cast<double>(ratios.size());
    double sum = 0, squares = 0;
    for (const double ratio : ratios) sum += ratio;
    for (const double ratio : ratios) squares += (ratio - sum / n) * (ratio - sum / n);
    result.bias = sum / n;
    result.bar = std::sqrt(squares / (n - 1)) / result.bias;
    break;
  }
  return result;
}

void set_link_speed(cluster::ClusterModel& cluster, const std::string& text) {
  double factor = 0;
  cluster::Figure& speed = cluster.figures.at("nic_bw");
  if (text.starts_with('x')) {
    const auto [end, status] = std::from_chars(text.data() + 1, text.data() + text.size(), factor);
    if (status != std::errc() || end != text.data() + text.size()) factor = 0;
  } else if (text.ends_with("b/s")) {
    throw UserError(fmt::format("link-speed is '{}', in bits; write bytes, like 50GB/s for 400 Gb/s", text));
  } else if (text.ends_with("/s")) {
    factor = static_cast<double>(parse_bytes(text.substr(0, text.size() - 2), "link-speed")) / speed.value;
  }
  if (!(factor > 0) || !std::isfinite(factor))
    throw UserError(fmt::format(
        "link-speed is '{}'; write a factor like x2, or the rate of each GPU like 100GB/s", text));
  const auto assumed = [&](auto& known) {
    known.source = cluster::Source::assumed;
    known.where = fmt::format("what-if: link speed {}", text);
  };
  for (const char* name : {"nic_bw", "nic_peak_bw"}) {
    cluster::Figure& figure = cluster.figures.at(name);
    figure.value *= factor;
    assumed(figure);
  }
  for (auto& [name, info] : cluster.tables)
    if (name.starts_with("network_")) info.table.scale(factor), assumed(info);
}

WhatIf what_if(const Comparison& base, const predict::Scenario& changed, std::span<const Comparison> others) {
  if (!base.step_s || !base.measured.step_time_s)
    throw UserError(fmt::format("run {} cannot be started from: {}", base.measured.id.value_or(0),
                                base.why_not.empty() ? "it has no step time" : base.why_not));
  WhatIf result;
  result.base_measured_s = *base.measured.step_time_s;
  result.base_predicted_s = *base.step_s;
  result.changed = predict::predict(changed);
  if (result.changed.step_time)
    result.anchored_s = result.base_measured_s * *result.changed.step_time / result.base_predicted_s;
  result.error = error_bar(base, changed.plan.family, others);
  return result;
}

}  // namespace mop::validate
