#include "sim/store/csv.h"

#include <ostream>

#include "sim/base/error.h"
#include "sim/store/columns.h"

namespace mop::store {
namespace {

// Numbers and names need no quotes; an empty text has them, so that it differs from an unknown value.
std::string field(const Value& value) {
  std::string text = to_text(value);
  if (!std::holds_alternative<std::string>(value)) return text;
  if (!text.empty() && text.find_first_of(" \t,\"\r\n") == text.npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted.append(c == '"' ? 2 : 1, c);
  return quoted + '"';
}

}  // namespace

void write_csv(std::ostream& out, std::span<const RunRecord> records, std::span<const std::string> names) {
  std::vector<const Column*> chosen;
  for (const std::string& name : names) chosen.push_back(&column(name));
  if (names.empty()) {
    for (const Column& each : columns()) {
      if (each.name != "detail") chosen.push_back(&each);
    }
  }
  std::string line;
  for (const Column* each : chosen) line += (line.empty() ? "" : ",") + each->name;
  out << line << '\n';
  for (const RunRecord& record : records) {
    const char* separator = "";
    for (const Column* each : chosen) {
      out << separator << field(value_of(record, *each));
      separator = ",";
    }
    out << '\n';
  }
  if (!out.flush())
    throw UserError("the CSV could not be written in full; make room on the disk or name another file");
}

}  // namespace mop::store
