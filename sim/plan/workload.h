// Workload: what is trained on in one optimizer step, the same for every plan compared.
#pragma once
#include <cstdint>

#include "sim/plan/routing.h"

namespace mop::plan {

struct Workload {
  int64_t context = 4096;  // tokens of one sequence (S)
  int64_t sequences = 1;   // per micro-batch of one sequence group: the ranks that share a sequence
  int64_t accumulate = 1;  // micro-batches a step
  Routing routing;
};

}  // namespace mop::plan
