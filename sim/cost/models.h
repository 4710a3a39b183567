// The two cost models behind make_cost_model.
#pragma once
#include "sim/cost/cost.h"

namespace mop::cost {

std::unique_ptr<CostModel> make_measured(const cluster::ClusterModel& cluster, const plan::Plan& plan,
                                         int64_t gpus, int64_t gpus_per_node, const StepClocks& clocks);
std::unique_ptr<CostModel> make_paper(const plan::Plan& plan);

}  // namespace mop::cost
