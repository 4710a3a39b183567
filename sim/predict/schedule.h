// From a StepProgram to the engine's tasks: repeat regions are unrolled into as many rounds as the rank's
// loads say, every operation is priced.
#pragma once
#include <vector>

#include "sim/cost/cost.h"
#include "sim/engine/tasks.h"
#include "sim/program/lower.h"

namespace mop::predict {

struct Schedule {
  engine::TaskGraph graph;
  std::vector<program::OpId> op_of_task;
  std::vector<program::OpId> outside;  // operations beyond the calibrated range, each once
  // Sums over one step, for checks against the hardware's limits.
  double flops = 0, hbm_bytes = 0;
  cost::StepWork work;  // as priced
};

Schedule make_schedule(const program::StepProgram& program, const std::vector<program::ExpertLoad>& loads,
                       const cost::CostModel& cost);

// Rows of round `round` out of `rounds` when `rows` are moved in all: they differ by at most one and add up.
inline int64_t rows_of_round(int64_t rows, int64_t round, int64_t rounds) {
  return rows * (round + 1) / rounds - rows * round / rounds;
}

// The shape of a routed operation in one round; others keep theirs.
program::Shape routed_shape(const program::StepProgram& program, const program::Op& op,
                            const program::ExpertLoad& load, int64_t round);

}  // namespace mop::predict
