// Records as comma-separated values.
#pragma once
#include <iosfwd>
#include <span>
#include <string>

#include "sim/store/record.h"

namespace mop::store {

// Writes a line of names and a line for each record, quoted as RFC 4180 says, ended by "\n". Numbers have as
// many digits as it takes to read back the same bits. An unknown value is an empty field, an empty text is
// "". `columns` empty: all but detail. Errors: UserError for an unknown column (with the nearest name) and
// when `out` cannot be written.
void write_csv(std::ostream& out, std::span<const RunRecord> records,
               std::span<const std::string> columns = {});

}  // namespace mop::store
