// What a run found its host's memory to give. Others on the host use it, too, and what they leave changes
// within seconds (reports/measurements/h200x2/adam_over_time.txt): a run is predicted for what it found, as
// it is for the rows that its experts had.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sim/cluster/cluster.h"

namespace mop::validate {

inline constexpr const char* kHostMemory = "host_memory";  // in a record's detail

// Of all of a host's ranks together, before the first step and after the last; bytes/s. Empty: not measured.
struct HostMemory {
  int64_t gpus = 0;
  std::vector<double> both_ways;  // copies up and down at once
  std::vector<double> adam;       // the CPU's AdamW
};
std::string to_json(const HostMemory& found);
std::optional<HostMemory> host_memory_of(const std::string& json);  // nothing: nothing was measured

// Found over calibrated. 1: not measured.
struct HostFactors {
  double copies = 1, dram = 1;
};
HostFactors factors(const HostMemory& found, const cluster::ClusterModel& cluster);
// The cluster becomes what the run found.
void apply(const HostMemory& found, cluster::ClusterModel& cluster);
// "copies both ways 134 GB/s, 161 when h200x2 was calibrated"; of what was measured.
std::string describe(const HostMemory& found, const cluster::ClusterModel& cluster);

}  // namespace mop::validate
