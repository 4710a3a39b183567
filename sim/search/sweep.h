// A sweep: every combination of the values of a few settings, predicted in parallel.
#pragma once
#include <atomic>
#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sim/predict/predict.h"

namespace mop::search {

// "32K..1M" doubles from 32K to 1M; "4,8,12" lists; both mix: "1,4..16". Anything else is a value as it
// stands. Errors: UserError naming `what` for an empty item, a range that falls, or one whose end is not
// reached by doubling.
std::vector<std::string> expand_range(std::string_view text, std::string_view what);

// The same for routings, whose options have commas of their own: "balanced,zipf:1.2,seed=7" are two.
std::vector<std::string> split_routings(std::string_view text);

struct Axis {
  std::string name;  // of a setting or a knob; see settings.h
  std::vector<std::string> values;
};

struct Sweep {
  predict::Scenario base;
  std::vector<Axis>
      axes;  // the last one varies fastest; a knob that the plan of a point lacks is left alone there
};

// Errors: UserError when a value cannot be read, or there are more than a million combinations.
size_t count_points(const Sweep& sweep);
predict::Scenario point(const Sweep& sweep, size_t index);

// What became of one question. A combination that is not possible has no prediction, but the reason.
struct Outcome {
  size_t index = 0;            // as given to run
  predict::Scenario scenario;  // its plan is resolved
  std::optional<predict::Prediction> prediction;
  std::string why_not;
};

// Resolves the plans of the scenarios that `question` gives for 0 .. count - 1 and predicts them, on `jobs`
// threads. `take` receives what has finished, in no particular order, on the calling thread, at least once a
// second while something has; `done` counts up to `count`. Raising `stop` lets the questions at hand finish
// and drops the others. Errors: what `take` or a prediction throws ends the run, UserError of a question
// excepted.
void run(size_t count, unsigned jobs, const std::atomic<bool>& stop,
         const std::function<predict::Scenario(size_t)>& question,
         const std::function<void(std::vector<Outcome>&& finished, size_t done)>& take);

}  // namespace mop::search
