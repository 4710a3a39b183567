#include "sim/cli/comparisons.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "sim/cli/text.h"
#include "sim/search/parallel.h"
#include "sim/validate/question.h"

namespace mop::cli {

std::vector<store::RunRecord> measurements(const store::Store& store, std::vector<std::string> where,
                                           bool newest) {
  where.push_back(fmt::format("kind={}", store::kMeasurement));
  std::vector<store::RunRecord> all = store.query({.where = std::move(where), .order = {"-id"}});
  if (newest) {
    // The newest comes first. Not by Keys::scenario, in which the cluster's figures of that day count.
    std::set<std::string> seen;
    std::erase_if(all, [&](const store::RunRecord& r) {
      const nlohmann::json detail = nlohmann::json::parse(r.detail);
      const nlohmann::json same{r.model,
                                r.cluster,
                                r.nodes,
                                r.gpus,
                                r.context,
                                r.sequences,
                                r.accumulate,
                                r.plan,
                                r.label,
                                detail.value("data", ""),
                                detail.value(validate::kQuestion, nlohmann::json())};
      return !seen.insert(same.dump()).second;
    });
  }
  std::ranges::reverse(all);
  return all;
}

std::optional<store::RunRecord> prediction_beside(const store::Store& store,
                                                  const store::RunRecord& measurement) {
  const std::vector<store::RunRecord> found =
      store.query({.where = {"key=" + measurement.key, fmt::format("kind={}", store::kPrediction)},
                   .order = {"-id"},
                   .limit = 1});
  return found.empty() ? std::nullopt : std::optional(found.front());
}

std::vector<validate::Comparison> compare_all(const store::Store& store,
                                              const std::vector<store::RunRecord>& measurements,
                                              const cluster::ClusterModel* cluster) {
  std::vector<std::optional<store::RunRecord>> beside;
  for (const store::RunRecord& record : measurements) beside.push_back(prediction_beside(store, record));
  std::vector<validate::Comparison> comparisons(measurements.size());
  Progress progress("predicting again");
  const std::atomic<bool> never = false;
  std::atomic<size_t> done = 0;
  search::parallel(
      measurements.size(), search::all_cores(), never,
      [&](size_t i) {
        comparisons[i] = validate::compare(measurements[i], beside[i] ? &*beside[i] : nullptr, cluster);
        ++done;
      },
      [&] { progress.show(done, measurements.size()); });
  return comparisons;
}

std::string signed_percent(double fraction) {
  return std::isfinite(fraction) ? fmt::format("{:+.1f} %", 100 * fraction) : "-";
}

}  // namespace mop::cli
