// Rows that each rank of an expert group exchanges and computes, from the workload's routing: the draw, the
// least-loaded plan and the streaming rounds, as the executor will derive them from real counts.
#pragma once
#include <vector>

#include "sim/predict/scenario.h"
#include "sim/program/lower.h"

namespace mop::predict {

// What the ranks of expert group `group` do: (Ep) x (L) loads. imbalance, when given, receives the largest
// max/mean rank load of any layer before the least-loaded plan.
std::vector<std::vector<program::ExpertLoad>> expert_loads(const Scenario& scenario,
                                                           const plan::Layout& layout, int group,
                                                           double* imbalance = nullptr);

}  // namespace mop::predict
