#include "sim/validate/overlay.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/predict/timelines.h"

namespace mop::validate {
namespace {

using Json = nlohmann::ordered_json;

Json events_of(const std::string& path) {
  std::ifstream file(path);
  if (!file)
    throw UserError(fmt::format("measured timeline '{}' cannot be read: {}", path, std::strerror(errno)));
  try {
    return Json::parse(file).at("traceEvents");
  } catch (const Json::exception&) {
    throw UserError(fmt::format("measured timeline '{}' is no timeline of mop run --trace", path));
  }
}

}  // namespace

void write_overlay(const std::string& path, const std::string& measured, const predict::Scenario& scenario,
                   const predict::Details& details) {
  std::error_code ignored;
  if (std::filesystem::equivalent(path, measured, ignored))
    throw UserError(fmt::format("'{}' is the measured timeline itself; give --trace another file", path));
  Json events = events_of(measured);
  int64_t processes = 0;
  for (Json& event : events) {
    const int64_t rank = event.at("pid");
    processes = std::max(processes, rank + 1);
    if (event.at("name") == "process_sort_index") event["args"]["sort_index"] = 2 * rank;
  }
  // In the same file for a moment: one writer knows the format.
  std::vector<program::RankTimeline> ranks = predict::timelines(scenario, details);
  for (program::RankTimeline& rank : ranks) rank.title += ", predicted";
  program::write_timeline(path, ranks);
  for (Json& event : events_of(path)) {
    const size_t of = event.at("pid");
    event["pid"] = processes + static_cast<int64_t>(of);
    if (event.at("name") == "process_sort_index")
      event["args"]["sort_index"] = 2 * details.fold.classes.at(of).rank + 1;
    events.push_back(std::move(event));
  }
  std::ofstream file(path);
  file << "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [";
  const char* separator = "\n";
  for (const Json& event : events) {
    file << separator << event.dump();
    separator = ",\n";
  }
  file << "\n]}\n";
  file.close();
  if (!file) throw UserError(fmt::format("timeline '{}' cannot be written: {}", path, std::strerror(errno)));
}

}  // namespace mop::validate
