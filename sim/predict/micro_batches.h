// Predictions for a search over plans of steps with many micro-batches.
#pragma once
#include <cstdint>

#include "sim/predict/predict.h"

namespace mop::predict {

// What a search compares.
struct Outline {
  bool fits = false;
  double step_time = 0;  // where it fits
  int64_t tokens_per_step = 0;
  int64_t hbm_peak = 0, hbm_capacity = 0, host_peak = 0, host_capacity = 0;
};

// As of predict(); micro-batches beyond the third, or beyond as many as it takes for them to be most of the
// step, take what the last one takes, time and memory. So 64 of them mostly cost no more than five. A
// plan whose live bytes alone are too many takes those. Errors: as of predict().
Outline outline(const Scenario& scenario, bool only_memory = false);

}  // namespace mop::predict
