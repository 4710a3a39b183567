#include "sim/validate/host_memory.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "sim/program/master.h"

namespace mop::validate {
namespace {

using Json = nlohmann::json;

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// What as many GPUs do by the calibration, bytes/s. What limits it is the host, or each GPU.
struct Calibrated {
  double each, host;
  bool by_host() const { return host <= each; }
  double rate() const { return std::min(each, host); }
};
Calibrated copies(const HostMemory& found, const cluster::ClusterModel& cluster) {
  return {static_cast<double>(found.gpus) * cluster["pcie_both_bw"], cluster["root_both_bw"]};
}
Calibrated adam(const HostMemory& found, const cluster::ClusterModel& cluster) {
  return {static_cast<double>(found.gpus * program::kHostAdamTraffic) * cluster["host_adam_rate_alone"],
          cluster.native("dram_bw")};
}

double over(const std::vector<double>& found, const Calibrated& calibrated) {
  return found.empty() ? 1 : mean(found) / calibrated.rate();
}

}  // namespace

std::string to_json(const HostMemory& found) {
  return Json{{"gpus", found.gpus}, {"both_ways_bw", found.both_ways}, {"adam_bw", found.adam}}.dump();
}

std::optional<HostMemory> host_memory_of(const std::string& json) {
  const Json found = Json::parse(json);
  HostMemory memory{found.value("gpus", int64_t{0}), found.value("both_ways_bw", std::vector<double>()),
                    found.value("adam_bw", std::vector<double>())};
  if (memory.gpus < 1 || (memory.both_ways.empty() && memory.adam.empty())) return std::nullopt;
  return memory;
}

HostFactors factors(const HostMemory& found, const cluster::ClusterModel& cluster) {
  const Calibrated calibrated = copies(found, cluster);
  HostFactors f;
  f.copies = over(found.both_ways, calibrated);
  // Where AdamW was not seen, copies that the host's memory limits tell of it.
  f.dram = !found.adam.empty() ? over(found.adam, adam(found, cluster)) : calibrated.by_host() ? f.copies : 1;
  return f;
}

void apply(const HostMemory& found, cluster::ClusterModel& cluster) {
  const HostFactors by = factors(found, cluster);
  const auto scale = [&](const char* name, double factor) {
    if (const auto one = cluster.figures.find(name); one != cluster.figures.end() && factor != 1) {
      one->second.value *= factor;
      one->second.where = "as the run found it";
    }
  };
  const bool by_host = copies(found, cluster).by_host();
  for (const char* name : {"root_up_bw", "root_down_bw", "root_both_bw"}) scale(name, by.copies);
  if (!by_host)
    for (const char* name : {"pcie_up_bw", "pcie_down_bw", "pcie_both_bw"}) scale(name, by.copies);
  for (const char* name : {"native_dram_bw", "dram_bw", "host_adam_rate_alone"}) scale(name, by.dram);
}

std::string describe(const HostMemory& found, const cluster::ClusterModel& cluster) {
  std::vector<std::string> parts;
  const auto add = [&](const char* what, const std::vector<double>& rates, const Calibrated& calibrated) {
    if (!rates.empty())
      parts.push_back(fmt::format("{} {:.0f} GB/s, {:.0f} when {} was calibrated", what, mean(rates) * 1e-9,
                                  calibrated.rate() * 1e-9, cluster.name));
  };
  add("copies both ways", found.both_ways, copies(found, cluster));
  add("AdamW on the CPU", found.adam, adam(found, cluster));
  return fmt::format("{}", fmt::join(parts, "; "));
}

}  // namespace mop::validate
