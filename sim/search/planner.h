// The planner: picks what a plan leaves open ("auto") by predicting candidates.
#pragma once
#include <functional>

#include "sim/predict/predict.h"

namespace mop::search {

// Candidates for every degree and policy that scenario.plan leaves open; each is valid for the model and the GPUs.
// Errors: UserError when there is none, saying which setting stands in the way.
std::vector<plan::Plan> candidates(const predict::Scenario& scenario);

// The best resolved plan: the shortest time a token among those that fit; if none fits, the one that lacks the least
// memory. A plan without open settings comes back as it is. progress(done, total) is called now and then.
plan::Plan choose(const predict::Scenario& scenario, const std::function<void(size_t, size_t)>& progress = {});

}  // namespace mop::search
