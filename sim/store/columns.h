// The columns of a record by name: the one list behind the schema's use, filters, orders and CSV.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "sim/store/record.h"

namespace mop::store {

struct Column {
  std::string name;
  std::variant<std::string RunRecord::*, bool RunRecord::*, int64_t RunRecord::*,
               std::optional<int64_t> RunRecord::*, std::optional<double> RunRecord::*>
      field;
};

// In the order of RunRecord; a column has the name of its field.
std::span<const Column> columns();

// Errors: UserError naming the nearest column.
const Column& column(std::string_view name);

// What a column holds: nothing (NULL), a whole number (a bool is 0 or 1), a real number or text.
using Value = std::variant<std::monostate, int64_t, double, std::string>;
Value value_of(const RunRecord& record, const Column& column);
void set_value(RunRecord& record, const Column& column, const Value& value);

// As text that reads back to the same bits; nothing is "".
std::string to_text(const Value& value);

}  // namespace mop::store
