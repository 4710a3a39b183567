#include "exec/checkpoint/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>

#include "exec/checkpoint/xxh64.h"
#include "sim/base/error.h"
#include "sim/base/integer.h"
#include "sim/model/tensors.h"

namespace mop::checkpoint {
namespace {

using nlohmann::json;
using program::FlatGroup;
using program::FlatPart;

constexpr const char* kFormat = "mop checkpoint";
constexpr int64_t kVersion = 1;

constexpr std::array kParts{"embedding", "dense", "experts", "head", "root", "router_bias"};
constexpr std::array kWhats{"weights", "master", "m", "v"};

// Index of a name; json::other_error, as for other misfits, when it is none of them.
template <size_t N>
size_t index_of(std::string_view name, const std::array<const char*, N>& names) {
  const auto found = std::ranges::find(names, name, [](const char* n) { return std::string_view(n); });
  if (found == names.end())
    throw json::other_error::create(501, fmt::format("unknown name '{}'", name), nullptr);
  return static_cast<size_t>(found - names.begin());
}

FlatGroup parse_group(const std::string& text) {
  const size_t dot = text.find('.');
  const auto part = static_cast<FlatPart>(index_of(std::string_view(text).substr(0, dot), kParts));
  return {part, dot == std::string::npos ? -1 : std::stoi(text.substr(dot + 1))};
}

uint64_t checksum(const std::string& text) {
  return xxh64(std::as_bytes(std::span(text)));
}

std::string dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

json to_json(const State& state) {
  return {{"step", state.step},
          {"optimizer_step", state.optimizer_step},
          {"data", {{"epoch", state.data.epoch}, {"sequence", state.data.sequence}}},
          {"seed", state.seed},
          {"plan", state.plan},
          {"ranks", state.ranks},
          {"model", state.model},
          {"fingerprint", state.fingerprint}};
}

State to_state(const json& from) {
  return {.step = from.at("step"),
          .optimizer_step = from.at("optimizer_step"),
          .data = {from.at("data").at("epoch"), from.at("data").at("sequence")},
          .seed = from.at("seed"),
          .plan = from.at("plan"),
          .ranks = from.at("ranks"),
          .model = from.at("model"),
          .fingerprint = from.at("fingerprint")};
}

json to_json(const Entry& entry) {
  return {{"group", name(entry.flat)}, {"what", name(entry.what)}, {"type", program::name(entry.type)},
          {"first", entry.first},      {"count", entry.count},     {"offset", entry.offset},
          {"xxh64", entry.checksums}};
}

Entry to_entry(const json& from, int64_t file_bytes) {
  constexpr std::array kTypes{"bf16", "f32"};
  Entry entry;
  entry.flat = parse_group(from.at("group"));
  entry.what = static_cast<What>(index_of(from.at("what").get<std::string>(), kWhats));
  entry.type =
      index_of(from.at("type").get<std::string>(), kTypes) == 0 ? program::Type::bf16 : program::Type::f32;
  entry.first = from.at("first");
  entry.count = from.at("count");
  entry.offset = from.at("offset");
  entry.checksums = from.at("xxh64").get<std::vector<uint64_t>>();
  const bool inside = entry.first >= 0 && entry.count > 0 && entry.offset >= 0 && entry.count <= file_bytes &&
                      entry.offset <= file_bytes - entry.bytes();
  if (!inside || static_cast<int64_t>(entry.checksums.size()) != ceil_div(entry.bytes(), kChecked))
    throw json::other_error::create(501, "a range outside of its file", nullptr);
  return entry;
}

}  // namespace

const char* name(What what) {
  return kWhats[static_cast<size_t>(what)];
}

std::string name(FlatGroup flat) {
  const char* part = kParts[static_cast<size_t>(flat.part)];
  return flat.layer < 0 ? part : fmt::format("{}.{}", part, flat.layer);
}

uint64_t fingerprint(const model::ModelConfig& model) {
  std::string text;
  for (const model::ParameterId& id : model::parameters(model)) {
    const model::MatrixShape shape = model::shape(model, id);
    fmt::format_to(std::back_inserter(text), "{} {} {} {} {}\n", model::name(id.role), id.layer, id.expert,
                   shape.rows, shape.cols);
  }
  return checksum(text);
}

std::string to_text(const Manifest& manifest) {
  json root{{"format", kFormat}, {"version", kVersion}, {"state", to_json(manifest.state)}};
  root["files"] = json::array();
  for (const RankFile& file : manifest.files) {
    json entries = json::array();
    for (const Entry& entry : file.entries) entries.push_back(to_json(entry));
    root["files"].push_back({{"bytes", file.bytes}, {"entries", std::move(entries)}});
  }
  root["xxh64"] = checksum(dump(root));
  return dump(root);
}

Manifest parse_manifest(const std::string& text, const std::string& where) {
  try {
    json root = json::parse(text);
    if (root.at("format") != kFormat) throw json::other_error::create(501, "another format", nullptr);
    if (const int64_t version = root.at("version"); version > kVersion)
      throw UserError(
          fmt::format("{}: written by a newer mop (format version {}, this one knows {}); update mop", where,
                      version, kVersion));
    const uint64_t expected = root.at("xxh64");
    root.erase("xxh64");
    if (checksum(dump(root)) != expected) throw json::other_error::create(501, "checksum mismatch", nullptr);

    Manifest manifest{to_state(root.at("state")), {}};
    for (const json& file : root.at("files")) {
      RankFile& added = manifest.files.emplace_back();
      added.bytes = file.at("bytes");
      for (const json& entry : file.at("entries")) added.entries.push_back(to_entry(entry, added.bytes));
    }
    return manifest;
  } catch (const json::exception&) {
  } catch (const std::logic_error&) {  // std::stoi
  }
  throw UserError(
      fmt::format("{} is damaged, or no manifest of a checkpoint; choose another checkpoint", where));
}

}  // namespace mop::checkpoint
