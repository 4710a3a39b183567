#include "sim/engine/tasks.h"

#include "sim/base/error.h"

namespace mop::engine {

const char* name(Resource resource) {
  static constexpr const char* kNames[kResources] = {
      "sm",      "crossbar", "hbm",     "nvlink_out", "nvlink_in", "pcie_up", "pcie_down", "pcie_both",
      "nic_out", "nic_in",   "root_up", "root_down",  "root_both", "dram",    "cores"};
  const auto index = static_cast<int>(resource);
  ensure(index < kResources, "a resource is one of the known ones");
  return kNames[index];
}

}  // namespace mop::engine
