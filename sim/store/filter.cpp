#include "sim/store/filter.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "sim/base/error.h"
#include "sim/base/quantity.h"

namespace mop::store {
namespace {

struct Operator {
  std::string_view text, sql;
};

// Longer ones first. IS is = that also compares NULL.
constexpr Operator kOperators[] = {{"!=", "IS NOT"}, {"<=", "<="}, {">=", ">="}, {"==", "IS"},
                                   {"=", "IS"},      {"<", "<"},   {">", ">"}};

std::string_view trim(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t");
  if (first == text.npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

template <class Number>
bool parse(std::string_view text, Number& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size();
}

Value parse_bool(std::string_view text, const std::string& name) {
  if (text == "1" || text == "true") return int64_t{1};
  if (text == "0" || text == "false") return int64_t{0};
  throw UserError(fmt::format("{} is true or false, not '{}'; write {}=1 or {}=0", name, text, name, name));
}

Value parse_whole(std::string_view text, const std::string& name) {
  int64_t number = 0;
  if (parse(text, number)) return number;
  return name.ends_with("_bytes") ? parse_bytes(text, name) : parse_count(text, name);
}

Value parse_real(std::string_view text, const std::string& name) {
  double number = 0;
  if (parse(text, number) && std::isfinite(number)) return number;
  throw UserError(fmt::format("{} is a number, not '{}'; write for example {}>=0.5", name, text, name));
}

Value parse_value(std::string_view text, const Column& column) {
  if (std::holds_alternative<std::string RunRecord::*>(column.field)) return std::string(text);
  if (text.empty()) return {};
  if (std::holds_alternative<bool RunRecord::*>(column.field)) return parse_bool(text, column.name);
  if (std::holds_alternative<std::optional<double> RunRecord::*>(column.field))
    return parse_real(text, column.name);
  return parse_whole(text, column.name);
}

}  // namespace

Filter parse_filter(std::string_view text) {
  const size_t at = std::min(text.find_first_of("!<>="), text.size());
  for (const Operator& op : kOperators) {
    if (!text.substr(at).starts_with(op.text)) continue;
    const Column& on = column(trim(text.substr(0, at)));
    Filter filter{&on, op.sql, parse_value(trim(text.substr(at + op.text.size())), on)};
    if (filter.value.index() == 0 && !op.sql.starts_with("IS")) {
      throw UserError(
          fmt::format("filter '{}' has nothing to compare with; write a value after {}", text, op.text));
    }
    return filter;
  }
  throw UserError(
      fmt::format("filter '{}' has no operator; write for example context>=128K or fits=1", text));
}

}  // namespace mop::store
