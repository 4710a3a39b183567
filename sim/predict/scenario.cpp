#include "sim/predict/scenario.h"

#include <fmt/format.h>

#include "sim/base/error.h"

namespace mop::predict {

void validate(const Scenario& s) {
  if (s.nodes < 1 || s.nodes > 65536)
    throw UserError(fmt::format("nodes is {}: it must be 1 to 65536", s.nodes));
  if (s.gpus_per_node < 0 || s.gpus_per_node > s.cluster.gpus_per_node())
    throw UserError(fmt::format("gpus-per-node is {}: a node of {} has {}", s.gpus_per_node, s.cluster.name,
                                s.cluster.gpus_per_node()));
  const auto bounded = [](int64_t value, int64_t most, const char* what) {
    if (value < 1 || value > most)
      throw UserError(fmt::format("{} is {}: it must be 1 to {}", what, value, most));
  };
  bounded(s.workload.context, int64_t{1} << 30, "context");
  bounded(s.workload.sequences, 1 << 20, "sequences");
  bounded(s.workload.accumulate, plan::kMostMicroBatches, "accumulate");
  if (s.workload.sequences > (int64_t{1} << 36) / s.workload.context)
    throw UserError(fmt::format("context {} x sequences {} is more than 2^36 tokens; lower one of them",
                                s.workload.context, s.workload.sequences));
  if (s.workload.precision == plan::Precision::fp32 && !s.plan.native())
    throw UserError(
        "precision is fp32, but PyTorch's FSDP2 is predicted in bf16 only; use bf16, or plan setting "
        "runtime=native");
  plan::validate(s.plan, s.model, s.gpus(), s.workload.context);
}

model::Flops model_flops(const Scenario& s) {
  if (s.plan.windows) return model::flops_per_token(s.model, s.workload.context);
  model::ModelConfig full = s.model;
  full.window.assign(full.window.size(), 0);
  return model::flops_per_token(full, s.workload.context);
}

int64_t tokens_per_step(const Scenario& s) {
  const plan::Layout layout = plan::layout(s.plan, s.gpus());
  return s.workload.sequences * s.workload.context * s.workload.accumulate * layout.sequence_groups;
}

}  // namespace mop::predict
