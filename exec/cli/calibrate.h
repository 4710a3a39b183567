// mop calibrate: measures what the simulator's cluster files hold, by micro-benchmarks only.
#pragma once
#include <CLI/App.hpp>

#include "sim/cli/commands.h"

namespace mop::cli {

void add_calibrate(CLI::App& program, const Invocation& invocation);

}  // namespace mop::cli
