// One question: a model, a cluster and how many nodes of it, a workload, a plan.
#pragma once
#include <string>

#include "sim/cluster/cluster.h"
#include "sim/cost/cost.h"
#include "sim/model/config.h"
#include "sim/model/counts.h"
#include "sim/plan/plan.h"
#include "sim/plan/workload.h"

namespace mop::predict {

struct Scenario {
  model::ModelConfig model;
  cluster::ClusterModel cluster;
  int64_t nodes = 1;
  int64_t gpus_per_node = 0;  // used of each node; 0: all
  plan::Workload workload;
  plan::Plan plan;  // resolved
  cost::Calibration calibration = cost::Calibration::measured;

  int64_t used_per_node() const { return gpus_per_node > 0 ? gpus_per_node : cluster.gpus_per_node(); }
  int64_t gpus() const { return nodes * used_per_node(); }
};

// Errors: UserError when counts are out of range or the plan does not fit the model and the GPUs.
void validate(const Scenario& scenario);

// Model FLOPs a token of this scenario: a plan without windows attends to everything.
model::Flops model_flops(const Scenario& scenario);

// Tokens of one optimizer step over the whole cluster.
int64_t tokens_per_step(const Scenario& scenario);

}  // namespace mop::predict
