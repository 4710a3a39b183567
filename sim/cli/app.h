// The command line as a whole: commands, errors and exit statuses.
#pragma once

namespace mop::cli {

extern const char* const kVersion;

// 0: answered, 1: internal error, 2: the user gave something that cannot be used, 130: interrupted.
int run(int argc, char** argv);

}  // namespace mop::cli
