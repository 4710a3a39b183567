// The last words of a run.
#pragma once
#include <string>

namespace mop::launch {

// "mop: " and the line on standard error, in one piece.
void tell(const std::string& line);

inline constexpr const char* kAfterLoss = ": the others stop; start again with --resume";

}  // namespace mop::launch
