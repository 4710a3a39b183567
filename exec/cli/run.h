// mop run: trains a model under a plan, and keeps the measurement beside the prediction.
#pragma once
#include <CLI/App.hpp>

#include "sim/cli/commands.h"

namespace mop::cli {

void add_run(CLI::App& program, const Invocation& invocation);

}  // namespace mop::cli
