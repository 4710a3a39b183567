// Helpers of the prediction tests: scenarios in one line.
#pragma once
#include <gtest/gtest.h>

#include <string>

#include "sim/plan/routing.h"
#include "sim/predict/predict.h"
#include "tests/plan_text.h"

namespace mop::predict::testing {

inline Scenario make(const std::string& model, const std::string& cluster, int64_t nodes,
                     const std::string& plan, int64_t context, int64_t sequences = 1, int64_t accumulate = 1,
                     const std::string& routing = "balanced") {
  Scenario s;
  s.model = model::read_config(model);
  s.cluster = cluster::read_cluster(cluster);
  s.nodes = nodes;
  s.plan = plan::parse_plan(plan);
  s.workload.context = context;
  s.workload.sequences = sequences;
  s.workload.accumulate = accumulate;
  s.workload.routing = plan::parse_routing(routing);
  return s;
}

inline double row(const std::vector<Named>& rows, const std::string& name) {
  for (const Named& r : rows)
    if (r.name == name) return r.value;
  return 0;
}

inline double sum(const std::vector<Named>& rows) {
  double total = 0;
  for (const Named& r : rows) total += r.value;
  return total;
}

}  // namespace mop::predict::testing
