#include "exec/train/job.h"

#include <utility>

#include "sim/base/error.h"

namespace mop::train {
namespace {

Job checked(Job job) {
  ensure(job.plan.native() && job.plan.resolved(), "a resolved plan of our own kernels");
  plan::validate(job.plan, job.model, job.ranks, job.workload.context);
  if (job.plan.family == plan::Family::mop && job.model.tied_head)
    throw UserError(
        "the model ties its head to the embedding, which mop plans shard in two ways; train it with --plan "
        "fsdp2");
  return job;
}

program::StepProgram lowered(const Job& job, const plan::Layout& layout) {
  const model::Parameters counts = model::count_parameters(job.model);
  // How rows are routed is known when they are.
  const std::vector<program::ExpertLoad> loads(static_cast<size_t>(job.model.layers));
  program::StepProgram program =
      program::lower({job.model, counts, job.plan, layout, job.workload, 0, loads});
  ensure(program.runnable, "the program can be run");
  return program;
}

}  // namespace

Prepared::Prepared(Job given, int64_t guard)
    : job(checked(std::move(given))),
      layout(plan::layout(job.plan, job.ranks)),
      parameters(job.model, job.plan, layout),
      program(lowered(job, layout)),
      memory(interpreter::plan_memory(program, guard)) {}

plan::LeastLoadedOptions Prepared::least_loaded() const {
  const plan::Plan& p = job.plan;
  const bool spills = p.family == plan::Family::mop && p.least_loaded;
  return {p.capacity_factor, p.spill_min_rows, spills ? p.spill_gate : plan::kNeverSpill};
}

}  // namespace mop::train
