// A second simulator of the same rules, slow and plain: it recomputes everything at every event, in doubles,
// and shares no code with the engine.
#pragma once
#include <vector>

#include "sim/engine/tasks.h"

namespace mop::engine {

struct ReferenceResult {
  std::vector<double> step_end;
  std::vector<std::vector<double>> start, end, busy;  // of the last step, by rank and task
};

ReferenceResult simulate_slowly(const Machine& machine, int steps);

}  // namespace mop::engine
