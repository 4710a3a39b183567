// Every prediction checks itself before it is shown (design notes, field.md). A failed check is an internal error.
#pragma once
#include "sim/predict/predict.h"

namespace mop::predict {

// Throws InternalError when: a step is shorter than its FLOPs over the peak or its bytes over the bandwidth of any
// resource; a resource is used beyond its capacity; the critical path or the memory rows do not add up; collectives of a
// group do not conserve bytes; buffers of the arena are inconsistent with the live bytes.
void check(const Scenario& scenario, const Details& details, const Prediction& prediction);

}  // namespace mop::predict
