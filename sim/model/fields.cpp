#include "sim/model/fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "sim/base/error.h"

namespace mop::model {
namespace {

using nlohmann::json;

constexpr size_t kMaxBytes = size_t{1} << 20;  // published configs stay under 100 KiB
constexpr int kMaxDepth = 64;

// A short printable form of a value for messages; `dump` with `replace` survives text that is not UTF-8.
std::string shown(const json& value) {
  constexpr size_t kMaxShown = 40;
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array";
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

// Fields that hold text hold a name out of a list. Refusing the rest keeps messages to one printable line.
bool is_word(const json& value) {
  if (!value.is_string()) return false;
  const auto& text = value.get_ref<const std::string&>();
  return !text.empty() && text.size() <= 64 && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_' ||
           c == '-' || c == '.';
  });
}

// Line and column (from 1) of the byte that the parser stopped at.
std::string position(std::string_view text, size_t byte) {
  const std::string_view before = text.substr(0, std::min(byte > 0 ? byte - 1 : 0, text.size()));
  const auto line = std::count(before.begin(), before.end(), '\n') + 1;
  const size_t newline = before.rfind('\n');
  const size_t column = newline == std::string_view::npos ? before.size() + 1 : before.size() - newline;
  return fmt::format("line {}, column {}", line, column);
}

}  // namespace

struct Fields::Json {
  json object;

  // The value of the first spelling that is present, with that spelling; null when none is.
  std::pair<const json*, const char*> find(Names names, const Fields& fields) const {
    const json* found = nullptr;
    const char* found_name = *names.begin();
    for (const char* name : names) {
      const auto it = object.find(name);
      if (it == object.end() || it->is_null()) continue;
      if (found == nullptr) {
        found = &*it;
        found_name = name;
      } else if (*found != *it) {
        fields.fail(name, fmt::format("is {} but its other spelling '{}' is {}: keep one", shown(*it),
                                      found_name, shown(*found)));
      }
    }
    return {found, found_name};
  }

  // As find, but an absent field is an error.
  std::pair<const json*, const char*> require(Names names, const Fields& fields) const {
    const auto found = find(names, fields);
    if (found.first != nullptr) return found;
    std::string others;
    for (const char* name : names) {
      if (name != *names.begin()) others += fmt::format("{}'{}'", others.empty() ? "" : ", ", name);
    }
    fields.fail(*names.begin(),
                others.empty() ? "is missing" : fmt::format("is missing (nor is there {})", others));
  }
};

Fields::Fields(const std::string& json_text, std::string source) : source_(std::move(source)) {
  const auto refuse = [&](const std::string& problem) {
    throw UserError(fmt::format("{}: {}", source_, problem));
  };
  if (json_text.size() > kMaxBytes) refuse("longer than 1 MiB: not a model's config.json");
  const json::parser_callback_t check_depth = [&](int depth, json::parse_event_t, json&) {
    if (depth > kMaxDepth)
      refuse(fmt::format("nested deeper than {} levels: not a model's config.json", kMaxDepth));
    return true;
  };
  auto parsed = std::make_shared<Json>();
  try {
    parsed->object = json::parse(json_text, check_depth);
  } catch (const json::parse_error& error) {
    refuse(fmt::format("not JSON ({})", position(json_text, error.byte)));
  } catch (const json::exception&) {
    refuse("not JSON that can be read: a number is out of range");
  }
  if (!parsed->object.is_object())
    refuse("not a JSON object: a config.json looks like {\"model_type\": ...}");
  json_ = std::move(parsed);
}

Fields::Fields(std::shared_ptr<const Json> json, std::string source, std::string prefix)
    : json_(std::move(json)), source_(std::move(source)), prefix_(std::move(prefix)) {}

bool Fields::has(Names names) const {
  return json_->find(names, *this).first != nullptr;
}

bool Fields::is_null(const char* name) const {
  const auto it = json_->object.find(name);
  return it != json_->object.end() && it->is_null();
}

int64_t Fields::count(Names names, int64_t low, int64_t high, std::optional<int64_t> fallback) const {
  if (fallback && !has(names)) {
    // `high` may come from the fields around it, which the default knows nothing of.
    if (*fallback < low || *fallback > high)
      fail(*names.begin(),
           fmt::format("is missing: its default {} is not from {} to {}", *fallback, low, high));
    return *fallback;
  }
  const auto [value, name] = json_->require(names, *this);
  if (!value->is_number_integer()) fail(name, fmt::format("is {}: it must be a whole number", shown(*value)));
  // An unsigned value past int64 would wrap to a negative one below.
  const bool huge = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  const int64_t number = huge ? INT64_MAX : value->get<int64_t>();
  if (huge || number < low || number > high)
    fail(name, fmt::format("is {}: it must be from {} to {}", shown(*value), low, high));
  return number;
}

double Fields::number(Names names, double low, double high, std::optional<double> fallback) const {
  if (fallback && !has(names)) return *fallback;
  const auto [value, name] = json_->require(names, *this);
  if (!value->is_number()) fail(name, fmt::format("is {}: it must be a number", shown(*value)));
  const double number = value->get<double>();
  if (!(number >= low && number <= high))  // also refuses NaN
    fail(name, fmt::format("is {}: it must be from {} to {}", shown(*value), low, high));
  return number;
}

bool Fields::flag(Names names, std::optional<bool> fallback) const {
  if (fallback && !has(names)) return *fallback;
  const auto [value, name] = json_->require(names, *this);
  if (!value->is_boolean()) fail(name, fmt::format("is {}: it must be true or false", shown(*value)));
  return value->get<bool>();
}

std::string Fields::word(Names names, std::optional<std::string> fallback) const {
  if (fallback && !has(names)) return *fallback;
  const auto [value, name] = json_->require(names, *this);
  if (!is_word(*value)) fail(name, fmt::format("is {}: it must be a name in quotes", shown(*value)));
  return value->get<std::string>();
}

std::vector<int64_t> Fields::counts(const char* name, int64_t low, int64_t high) const {
  const json* value = json_->find({name}, *this).first;
  std::vector<int64_t> result;
  if (value == nullptr) return result;
  if (!value->is_array())
    fail(name, fmt::format("is {}: it must be an array of whole numbers", shown(*value)));
  for (const json& item : *value) {
    const bool fits =
        item.is_number_integer() &&
        (!item.is_number_unsigned() || item.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)) &&
        item.get<int64_t>() >= low && item.get<int64_t>() <= high;
    if (!fits)
      fail(name, fmt::format("holds {}: each must be a whole number from {} to {}", shown(item), low, high));
    result.push_back(item.get<int64_t>());
  }
  return result;
}

std::vector<std::string> Fields::words(const char* name) const {
  const json* value = json_->find({name}, *this).first;
  std::vector<std::string> result;
  if (value == nullptr) return result;
  if (!value->is_array()) fail(name, fmt::format("is {}: it must be an array of names", shown(*value)));
  for (const json& item : *value) {
    if (!is_word(item)) fail(name, fmt::format("holds {}: each must be a name in quotes", shown(item)));
    result.push_back(item.get<std::string>());
  }
  return result;
}

Fields Fields::object(const char* name) const {
  const json* value = json_->find({name}, *this).first;
  if (value != nullptr && !value->is_object())
    fail(name, fmt::format("is {}: it must be an object or null", shown(*value)));
  auto nested = std::make_shared<Json>(Json{value != nullptr ? *value : json::object()});
  return Fields(std::move(nested), source_, prefix_ + name + ".");
}

void Fields::fail(const std::string& name, const std::string& problem) const {
  throw UserError(fmt::format("{}: field '{}{}' {}", source_, prefix_, name, problem));
}

}  // namespace mop::model
