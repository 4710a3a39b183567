#include "sim/store/record.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/store/columns.h"

namespace mop::store {
namespace {

using nlohmann::json;

// 64-bit FNV-1a. A sweep of a million records has two equal keys with a chance of 3e-8.
std::string hash(const json& value) {
  uint64_t state = 0xcbf29ce484222325;
  for (const char c : value.dump()) state = (state ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return fmt::format("{:016x}", state);
}

// One spelling for each number: 1.0 and 1e0 become 1. Members are sorted already, json keeps them in a map.
void normalize(json& value) {
  if (value.is_structured()) {
    for (json& member : value) normalize(member);
  } else if (value.is_number_float()) {
    const double number = value.get<double>();
    if (std::abs(number) < 0x1p53 && number == std::trunc(number)) value = static_cast<int64_t>(number);
  }
}

bool matches(std::string_view text,
             std::string_view pattern) {  // in the pattern 0 is a digit, f a hexadecimal one
  if (text.size() != pattern.size()) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool digit = text[i] >= '0' && text[i] <= '9';
    const bool hex = digit || (text[i] >= 'a' && text[i] <= 'f');
    if (!(pattern[i] == '0' ? digit : pattern[i] == 'f' ? hex : text[i] == pattern[i])) return false;
  }
  return true;
}

bool is_object(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  return first != text.npos && text[first] == '{' && json::accept(text);
}

bool storable(const Value& value) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return *whole >= 0;
  if (const auto* real = std::get_if<double>(&value)) return std::isfinite(*real) && *real >= 0;
  return true;
}

void require(bool holds, std::string_view field, const std::string& value) {
  if (!holds) throw InternalError(fmt::format("record with {} = '{}' must not be stored", field, value));
}

}  // namespace

bool operator==(const RunRecord& a, const RunRecord& b) {
  return std::ranges::all_of(columns(), [&](const Column& column) {
    return column.name == "id" || value_of(a, column) == value_of(b, column);
  });
}

Keys keys_of(std::string_view inputs) {
  json question = json::parse(inputs, nullptr, false);
  if (!question.is_object()) throw InternalError("keys_of: the inputs are no JSON object");
  for (const char* member : {"calibration", "version"}) {
    if (!question.contains(member)) throw InternalError(fmt::format("keys_of: the inputs lack '{}'", member));
  }
  normalize(question);
  Keys keys;
  keys.key = hash(question);
  question.erase("calibration");
  question.erase("version");
  keys.scenario = hash(question);
  return keys;
}

std::string now_utc() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

void check(const RunRecord& record) {
  require(record.kind == kPrediction || record.kind == kMeasurement, "kind", record.kind);
  require(matches(record.created, "0000-00-00T00:00:00Z"), "created", record.created);
  require(matches(record.key, "ffffffffffffffff"), "key", record.key);
  require(matches(record.scenario, "ffffffffffffffff"), "scenario", record.scenario);
  for (const Column& column : columns()) {
    const Value value = value_of(record, column);
    require(storable(value), column.name, to_text(value));
  }
  require(record.fits || !record.step_time_s, "step_time_s", "a time although it does not fit");
  require(is_object(record.detail), "detail", "no JSON object");
}

}  // namespace mop::store
