// Conditions on columns, as people type them.
#pragma once
#include <string>
#include <string_view>

#include "sim/store/columns.h"

namespace mop::store {

struct Filter {
  const Column* column;
  std::string_view sql;  // the comparison as SQLite spells it
  Value value;           // to be bound, never pasted
};

// "column op value" with op one of = != < <= > >=. Sizes may be written "128K" or "16GiB", a bool 0, 1, false
// or true. An empty value is "not known": "step_time_s=" finds what has no step time, "step_time_s!=" what
// has one. Text compares byte by byte. = and != are opposites, also where a value is not known.
// Errors: UserError for an unknown column (with the nearest name), no operator, a value of the wrong type.
Filter parse_filter(std::string_view text);

}  // namespace mop::store
