// The last simulated step as timelines, a class of alike ranks each.
#pragma once
#include <vector>

#include "sim/predict/predict.h"
#include "sim/program/timeline.h"

namespace mop::predict {

// They point into `details`.
std::vector<program::RankTimeline> timelines(const Scenario& scenario, const Details& details);

}  // namespace mop::predict
