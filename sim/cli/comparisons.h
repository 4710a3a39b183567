// Stored measurements, predicted again.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "sim/store/store.h"
#include "sim/validate/comparison.h"

namespace mop::cli {

// Measurements that meet all conditions, with details, as they were stored. newest: of those with the same
// question, plan, backend, data and label, the last only. Errors: UserError as Store.
std::vector<store::RunRecord> measurements(const store::Store& store, std::vector<std::string> where,
                                           bool newest);

// The prediction of the same key, newest; nothing when there is none.
std::optional<store::RunRecord> prediction_beside(const store::Store& store,
                                                  const store::RunRecord& measurement);

// On all cores, with a bar of progress. cluster: instead of the runs' own; nullptr: those.
std::vector<validate::Comparison> compare_all(const store::Store& store,
                                              const std::vector<store::RunRecord>& measurements,
                                              const cluster::ClusterModel* cluster = nullptr);

std::string signed_percent(double fraction);  // "-1.3 %"

}  // namespace mop::cli
