// Every prediction checks itself before it is shown (design notes, field.md). A failed check is an internal
// error.
#pragma once
#include "sim/predict/predict.h"

namespace mop::predict {

// Throws InternalError when: a step is shorter than its FLOPs over the peak or its HBM bytes over the data
// sheet's bandwidth; any link, memory or core is used beyond its capacity (bytes over bandwidth of each);
// rows sent to experts and rows computed differ; the critical path does not add up to the step or the memory
// rows to the peak; the arena is smaller than its live bytes; MFU is above 1.
void check(const Scenario& scenario, const Details& details, const Prediction& prediction);

}  // namespace mop::predict
