#include "exec/calibrate/cluster_file.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "sim/base/error.h"
#include "sim/cluster/cluster.h"

namespace mop::calibrate {
namespace {

using Json = nlohmann::ordered_json;

// With all that it has from its base.
Json flat(const std::filesystem::path& path) {
  std::ifstream file(path);
  const Json own = Json::parse(file, nullptr, false);
  if (own.is_discarded() || !own.is_object())
    throw UserError(fmt::format("{} is not a JSON object", path.string()));
  if (!own.contains("base")) return own;
  Json json = flat(path.parent_path() / (own["base"].get<std::string>() + ".json"));
  json["description"] = own.value("description", std::string());
  for (const char* section : {"figures", "tables"}) {
    if (!own.contains(section)) continue;
    for (const auto& [name, entry] : own[section].items())
      json[section].erase("native_" + name);  // as the reader does
    for (const auto& [name, entry] : own[section].items()) json[section][name] = entry;
  }
  return json;
}

Json spread(const Reading& reading) {
  return {reading.low, reading.high};
}

Json json_of(const Provenance& p) {
  return {{"host", p.host},       {"cpu", p.cpu},   {"kernel", p.kernel},   {"date", p.date},
          {"command", p.command}, {"gpus", p.gpus}, {"seconds", p.seconds}, {"environment", p.environment}};
}

// An entry a line, and a point of a table a line, so that differences can be read.
std::string lines(const Json& json) {
  std::string text = fmt::format("{{\n\"description\": {},\n\"provenance\": {},\n\"figures\": {{",
                                 json["description"].dump(), json["provenance"].dump());
  const char* between = "\n";
  for (const auto& [name, entry] : json["figures"].items())
    text += fmt::format("{}  {}: {}", std::exchange(between, ",\n"), Json(name).dump(), entry.dump());
  text += "\n},\n\"tables\": {";
  between = "\n";
  for (const auto& [name, entry] : json["tables"].items()) {
    Json rest = entry;
    rest.erase("points");
    std::string points, head = rest.dump();
    head.pop_back();
    for (const Json& point : entry["points"])
      points += fmt::format("{}\n    {}", points.empty() ? "" : ",", point.dump());
    text += fmt::format("{}  {}: {}, \"points\": [{}]}}", std::exchange(between, ",\n"), Json(name).dump(),
                        head, points);
  }
  return text + "\n}\n}\n";
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name")) return line.substr(std::min(line.size(), line.find(": ") + 2));
  return "unknown";
}

// Products and attention are as of the largest clock in a file that has it, and of a warm GPU in one that has
// not: what a base has of the other kind goes.
void keep_one_clock(Json& json, const Findings& findings) {
  constexpr const char* kLargest = "largest_clock_hz";
  constexpr std::array kClocked{"native_matmul",
                                "native_matmul_gradient",
                                "native_grouped_matmul",
                                "native_grouped_matmul_gradient",
                                "native_grouped_matmul_added",
                                "native_attention_forward",
                                "native_attention_backward",
                                "native_window_attention_forward",
                                "native_window_attention_backward"};
  const auto measured = [&](const char* table) { return findings.tables.contains(table); };
  const bool before = json["figures"].contains(kLargest), now = findings.figures.contains(kLargest);
  if (before == now || std::ranges::none_of(kClocked, measured)) return;
  for (const char* table : kClocked)
    if (!measured(table)) json["tables"].erase(table);
  json["figures"].erase(kLargest);
}

}  // namespace

Provenance provenance_of_this_host() {
  Provenance p;
  utsname system{};
  uname(&system);
  p.host = system.nodename;
  p.kernel = system.release;
  p.cpu = fmt::format("{}, {} cores", cpu_name(), std::thread::hardware_concurrency());
  p.date = fmt::format("{:%Y-%m-%d %H:%M} UTC",
                       fmt::gmtime(std::chrono::system_clock::to_time_t(std::chrono::system_clock::now())));
  for (char** entry = environ; *entry != nullptr; ++entry)
    if (std::string_view(*entry).starts_with("NCCL_")) p.environment.emplace_back(*entry);
  return p;
}

std::string to_json(const Provenance& provenance) {
  return json_of(provenance).dump();
}

Provenance provenance_from_json(const std::string& text) {
  try {
    const Json json = Json::parse(text);
    return {json.at("host"),        json.at("kernel"),  json.at("cpu"),  json.at("date"),
            json.at("environment"), json.at("command"), json.at("gpus"), json.at("seconds")};
  } catch (const Json::exception& error) {
    throw InternalError(std::string("a calibration's provenance is no such JSON: ") + error.what());
  }
}

std::string cluster_file(const std::filesystem::path& base, const Findings& findings, const Provenance& p) {
  Json json = flat(base);
  const std::string where =
      fmt::format("mop calibrate, {}, {}, {}", p.date, findings.machine, findings.libraries);
  json["description"] =
      fmt::format("{}, measured by mop calibrate; the rest as {}", findings.machine, base.stem().string());
  json["provenance"] = json_of(p);
  json["provenance"].update(
      Json{{"machine", findings.machine}, {"libraries", findings.libraries}, {"base", base.stem().string()}});
  keep_one_clock(json, findings);
  if (!findings.cut_short.empty()) json["provenance"]["cut_short"] = findings.cut_short;
  if (!findings.unsupported.empty()) json["provenance"]["unsupported"] = findings.unsupported;
  for (const auto& [name, figure] : findings.figures)
    json["figures"][name] = {{"value", figure.reading.value},
                             {"source", "measured"},
                             {"where", figure.what + "; " + where},
                             {"spread", spread(figure.reading)}};
  for (const auto& [name, table] : findings.tables) {
    Json points = Json::array(), spreads = Json::array();
    for (const auto& [at, reading] : table.points) {
      Json point = at;
      point.push_back(reading.value);
      points.push_back(point);
      spreads.push_back(spread(reading));
    }
    json["tables"][name] = {{"source", "measured"},
                            {"where", table.what + "; " + where},
                            {"spread", spreads},
                            {"points", points}};
  }
  return lines(json);
}

void write_cluster_file(const std::filesystem::path& path, const std::string& text) {
  // Beside the file, of a name that is a cluster's: it is read before it takes the file's place.
  const std::filesystem::path fresh =
      path.parent_path() / fmt::format(".{}.{}.json", path.stem().string(), getpid());
  const auto fail = [&](const std::string& why) {
    std::error_code ignored;
    std::filesystem::remove(fresh, ignored);
    throw UserError(fmt::format("{} cannot be written: {}", path.string(), why));
  };
  std::ofstream file(fresh);
  file << text;
  file.close();
  if (!file) fail("no such folder, no permission, or the disk is full");
  try {
    cluster::read_cluster(fresh.string());
  } catch (const UserError& error) {
    fail(error.what());
  }
  std::error_code error;
  std::filesystem::rename(fresh, path, error);
  if (error) fail(error.message());
}

}  // namespace mop::calibrate
