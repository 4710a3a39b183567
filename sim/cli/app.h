// The command line as a whole: commands, errors and exit statuses.
#pragma once
#include <span>

#include "sim/cli/commands.h"

namespace mop::cli {

extern const char* const kVersion;

using AddCommand = void (*)(CLI::App& program, const Invocation& invocation);

// more: commands beside those of commands.h. 0: answered, 1: internal error, 2: the user gave something that
// cannot be used, 3: bounds of mop validate do not hold, 130: interrupted.
int run(int argc, char** argv, std::span<const AddCommand> more = {});

}  // namespace mop::cli
