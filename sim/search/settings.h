// Settings: the parts of a scenario under the names that flags, scenario files and sweeps give them.
#pragma once
#include <string>
#include <vector>

#include "sim/predict/scenario.h"

namespace mop::search {

struct Setting {
  const char* name;      // "gpus-per-node"
  const char* standard;  // what holds when it is not given; "": it must be given
  const char* values;    // "TOKENS", for help
  const char* help;
  void (*set)(predict::Scenario&, const std::string& text);  // throws UserError
};

// All but the plan's own knobs (plan::knobs()), in the order in which they can be set.
const std::vector<Setting>& settings();

// Sets what `name` says: a setting or a knob of the plan. Errors: UserError for a bad value, an unknown name
// (the nearest is suggested) or a knob of the other family.
void set(predict::Scenario& scenario, const std::string& name, const std::string& text);

// plan::parse_plan, and "fsdp2-best": FSDP2 with all that can be auto and is not set left to the planner.
plan::Plan parse_plan(const std::string& text);
bool sets(const std::string& plan, const std::string& knob);  // as text: "mop:ep=8" sets ep

bool has_knob(const plan::Plan& plan, const plan::Knob& knob);

}  // namespace mop::search
