#include "sim/cli/trace.h"

#include "sim/predict/timelines.h"

namespace mop::cli {

void write_trace(const std::string& path, const predict::Scenario& scenario,
                 const predict::Details& details) {
  program::write_timeline(path, predict::timelines(scenario, details));
}

}  // namespace mop::cli
