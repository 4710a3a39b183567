// A timeline in the trace event format of Chrome, which Perfetto reads: a process a class of ranks, a thread
// a stream, live memory as counters. The last simulated step.
#pragma once
#include <string>

#include "sim/predict/predict.h"

namespace mop::cli {

// Errors: UserError when the file cannot be written.
void write_trace(const std::string& path, const predict::Scenario& scenario, const predict::Details& details);

}  // namespace mop::cli
