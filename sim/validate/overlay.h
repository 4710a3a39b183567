// A measured timeline and the predicted one of the same step in one file for Perfetto.
#pragma once
#include <string>

#include "sim/predict/predict.h"

namespace mop::validate {

// measured: the file that `mop run --trace` wrote; its ranks come first of each pair. Both steps start at 0.
// Errors: UserError when it is not there or no timeline, or `path` cannot be written.
void write_overlay(const std::string& path, const std::string& measured, const predict::Scenario& scenario,
                   const predict::Details& details);

}  // namespace mop::validate
