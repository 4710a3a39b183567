// The rows of a sweep as comma-separated values and as a table.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "sim/store/record.h"

namespace mop::cli {

// A line of names, then a line a row: the question with its routing and the settings that were swept, then
// the answer. Nothing in it depends on when a row was computed. Quoted as RFC 4180 says; what is not known is
// empty.
std::string sweep_csv(std::span<const store::RunRecord> rows, std::span<const std::string> swept_knobs);

// The fastest of the rows that fit.
std::string fastest_table(std::span<const store::RunRecord> rows, size_t most);

}  // namespace mop::cli
