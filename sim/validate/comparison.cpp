#include "sim/validate/comparison.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/base/median.h"
#include "sim/base/quantity.h"
#include "sim/predict/timelines.h"
#include "sim/validate/host_memory.h"
#include "sim/validate/question.h"

namespace mop::validate {
namespace {

using Json = nlohmann::ordered_json;

// As they would have been measured.
OpSums sums_of(const predict::Scenario& scenario, const predict::Details& details, double step,
               bool by_events) {
  std::vector<int64_t> members;
  for (const predict::RankClass& ranks : details.fold.classes) members.push_back(ranks.members);
  std::vector<program::RankTimeline> timelines = predict::timelines(scenario, details);
  if (by_events)
    for (program::RankTimeline& rank : timelines)
      for (program::OpSpan& span : rank.spans) span.busy = span.end - span.start;
  OpSums sums = sum_operations(timelines, members);
  sums.step = step;
  return sums;
}

std::vector<OpDifference> differences(const OpSums& measured, const OpSums& predicted) {
  std::map<std::pair<std::string, std::string>, OpDifference> all;
  const auto at = [&](const OpSum& sum) -> OpDifference& {
    OpDifference& difference = all[{sum.name, sum.stream}];
    difference.name = sum.name;
    difference.stream = sum.stream;
    return difference;
  };
  const std::string compute = program::name(program::Stream::compute);
  OpDifference idle{kIdle, "", measured.step, predicted.step};
  for (const OpSum& sum : measured.operations) {
    OpDifference& difference = at(sum);
    difference.measured += sum.seconds;
    difference.measured_count += sum.count;
    if (sum.stream == compute) idle.measured -= sum.seconds;
  }
  for (const OpSum& sum : predicted.operations) {
    OpDifference& difference = at(sum);
    difference.predicted += sum.seconds;
    difference.predicted_count += sum.count;
    if (sum.stream == compute) idle.predicted -= sum.seconds;
  }
  std::vector<OpDifference> result{idle};
  for (auto& [key, difference] : all) result.push_back(std::move(difference));
  std::ranges::stable_sort(result, std::ranges::greater(),
                           [](const OpDifference& d) { return std::abs(d.difference()); });
  return result;
}

// Median of the steps that the step time is of. what: a JSON pointer into a step.
std::optional<double> of_steps(const Json& detail, const std::string& what) {
  const Json::json_pointer at(what);
  std::vector<double> seen;
  const Json steps = detail.value("steps", Json::array());
  for (size_t i = steps.size() / 2; i < steps.size(); ++i)
    if (steps[i].contains(at)) seen.push_back(steps[i][at]);
  if (seen.empty()) return std::nullopt;
  return median(std::move(seen));
}

// "the clock of the slowest GPU, rank 3, was 1.42 GHz, of the fastest, rank 1, 1.50": medians as above. Runs
// of before 29 November 2026 have that of process 0 alone. Empty: none was told.
std::string clocks_of_steps(const Json& detail) {
  std::vector<double> clocks;  // by rank
  while (const auto clock = of_steps(detail, fmt::format("/clocks_hz/{}", clocks.size())))
    clocks.push_back(*clock);
  if (clocks.empty()) {
    const std::optional<double> first = of_steps(detail, "/clock_hz");
    return first && *first > 0 ? fmt::format("the clock of process 0's GPU was {:.2f} GHz", *first * 1e-9)
                               : "";
  }
  const auto [slow, fast] = std::ranges::minmax_element(clocks);
  if (*slow <= 0) return "";
  return clocks.size() == 1
             ? fmt::format("the GPU's clock was {:.2f} GHz", *slow * 1e-9)
             : fmt::format(
                   "the clock of the slowest GPU, rank {}, was {:.2f} GHz, of the fastest, rank {}, {:.2f}",
                   slow - clocks.begin(), *slow * 1e-9, fast - clocks.begin(), *fast * 1e-9);
}

}  // namespace

double relative_error(double predicted, double measured) {
  if (measured == 0) return predicted == 0 ? 0 : std::numeric_limits<double>::infinity();
  return predicted / measured - 1;
}

double Comparison::hbm_error() const {
  return relative_error(static_cast<double>(hbm_bytes),
                        static_cast<double>(measured.hbm_peak_bytes.value_or(0)));
}

double Comparison::host_error() const {
  return relative_error(static_cast<double>(host_bytes),
                        static_cast<double>(measured.host_peak_bytes.value_or(0)));
}

Comparison compare(const store::RunRecord& measurement, const store::RunRecord* prediction,
                   const cluster::ClusterModel* cluster, predict::Details* details) {
  Comparison c;
  c.measured = measurement;
  const Json detail = Json::parse(measurement.detail);
  c.on_gpus = detail.value("backend", "cuda") == "cuda";
  predict::Details own;
  predict::Details& d = details != nullptr ? *details : own;
  predict::Prediction p;
  try {
    c.scenario = scenario_of(measurement, prediction, cluster);
    c.stated_routing = plan::describe(c.scenario.workload.routing);
    if (const Json rows = detail.value(kExpertRows, Json::array()); !rows.empty()) {
      const predict::Prediction stated = predict::predict(c.scenario);
      if (stated.step_time)
        c.notes.push_back(
            fmt::format("{} are predicted for {} routing; above, for the rows that its experts had",
                        format_seconds(*stated.step_time), c.stated_routing));
      c.scenario.workload.routing = {};
      c.scenario.workload.routing.kind = plan::Routing::Kind::histogram;
      c.scenario.workload.routing.file = "recorded";
      c.scenario.workload.routing.counts = rows.get<std::vector<std::vector<int64_t>>>();
    }
    if (detail.contains(kHostMemory))
      if (const std::optional<HostMemory> found = host_memory_of(detail[kHostMemory].dump())) {
        const predict::Prediction before = predict::predict(c.scenario);
        if (before.step_time)
          c.notes.push_back(
              fmt::format("{} are predicted for the host's memory as calibrated; above, for what "
                          "the run found: {}",
                          format_seconds(*before.step_time), describe(*found, c.scenario.cluster)));
        apply(*found, c.scenario.cluster);
      }
    p = predict::predict(c.scenario, {}, &d);
  } catch (const UserError& error) {
    c.why_not = error.what();
    return c;
  }
  c.hbm_bytes = c.on_gpus ? p.hbm_peak : p.hbm_arena;
  c.host_bytes = p.host_peak;
  c.step_s = p.step_time;
  if (!p.fits) c.why_not = "predicted not to fit: " + p.why_not;
  if (detail.contains(kOpSums) && p.step_time) {
    const OpSums measured = op_sums_of(detail[kOpSums].dump());
    const bool by_events = measured.intervals == "events";
    const OpSums predicted = sums_of(c.scenario, d, *p.step_time, by_events);
    c.measured_step_s = measured.step;
    c.operations = differences(measured, predicted);
    if (by_events)
      c.notes.push_back(
          "operations were timed by events: their waits for room count, measured and predicted");
    if (measured.wait > 0.01 * measured.step)
      c.notes.push_back(fmt::format("collectives waited {} for the last rank (predicted: {})",
                                    format_seconds(measured.wait), format_seconds(predicted.wait)));
  }
  if (p.clock)
    if (const std::string clocks = clocks_of_steps(detail); !clocks.empty())
      c.notes.push_back(fmt::format("{} (predicted of the slowest: {:.2f})", clocks, *p.clock * 1e-9));
  // A ratio of experts here, of ranks there: told apart in words, and never compared.
  if (const std::optional<double> imbalance = of_steps(detail, "/expert_imbalance");
      imbalance && *imbalance > 1.05)
    c.notes.push_back(fmt::format(
        "the fullest expert had {:.2f} times the mean rows; predicted for {} routing, the fullest rank with "
        "{:.2f} times the mean",
        *imbalance, plan::describe(c.scenario.workload.routing), p.imbalance));
  return c;
}

}  // namespace mop::validate
