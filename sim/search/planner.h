// The planner: picks what a plan leaves open ("auto") by predicting candidates.
#pragma once
#include <functional>

#include "sim/predict/predict.h"

namespace mop::search {

// The best resolved plan that a search one setting at a time finds: the shortest time a token among those
// that fit; if none fits, the one that lacks the least memory. A plan without open settings comes back as it
// is. progress(done, total) is called now and then. Errors: UserError when no combination is valid, saying
// which setting stands in the way.
plan::Plan choose(const predict::Scenario& scenario,
                  const std::function<void(size_t, size_t)>& progress = {});

}  // namespace mop::search
