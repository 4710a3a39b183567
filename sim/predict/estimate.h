// An independent closed-form estimate of the step time, printed beside the event result: if the two are far apart, either
// overlap matters much or something is wrong.
#pragma once
#include "sim/predict/predict.h"

namespace mop::predict {

// The longest of: computation on the SMs from model FLOPs and a few measured rates, traffic of each link, host update,
// launches. No events, no program order: work over rate of each resource as if all else were hidden. Seconds.
double estimate_step_time(const Scenario& scenario, const Details& details);

}  // namespace mop::predict
