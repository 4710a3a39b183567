#include "sim/program/lower.h"

#include "sim/base/error.h"

namespace mop::program {

int64_t tokens_per_rank(const plan::Layout& layout, const plan::Workload& workload) {
  return workload.sequences * workload.context / layout.sequence.size;
}

StepProgram lower(const LoweringInput& input) {
  ensure(input.plan.resolved(), "only a resolved plan can be lowered");
  ensure(static_cast<int64_t>(input.loads.size()) == input.model.layers, "an expert load for every layer");
  return input.plan.native() ? lower_native(input) : lower_pytorch(input);
}

}  // namespace mop::program
