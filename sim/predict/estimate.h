// An independent closed-form estimate of the step time, printed beside the event result: when the two are far
// apart, either overlap and memory-bound work matter much, or something is wrong.
#pragma once
#include "sim/predict/scenario.h"

namespace mop::predict {

// Seconds. From the scenario alone, by the formulas of mop.md: FLOPs over measured matmul and attention
// rates, weight and token bytes over the links, the optimizer over its memory; the longest of them, and what
// cannot overlap on top. clock: that the GPU keeps over the one that its rates are of. It leaves out
// launches, waits and the slowing of kernels by what runs beside them (native plans: the memory-bound kernels
// too), and assumes perfect overlap and even routing.
double estimate_step_time(const Scenario& scenario, double clock);

}  // namespace mop::predict
