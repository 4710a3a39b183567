#include "sim/cost/cost.h"

#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/suggest.h"
#include "sim/cost/models.h"

namespace mop::cost {

const char* name(Calibration calibration) {
  return calibration == Calibration::paper ? "paper" : "measured";
}

Calibration parse_calibration(const std::string& text) {
  if (text == "measured") return Calibration::measured;
  if (text == "paper") return Calibration::paper;
  throw UserError(unknown_name("calibration", text, std::vector<std::string>{"measured", "paper"}));
}

Placement place(const program::Group& group, int64_t gpus_per_node, int64_t gpus) {
  const int64_t node = std::min(gpus_per_node, gpus), span = group.size * group.stride;
  if (span <= node && node % span == 0) return {group.size, 1};
  if (group.stride % node == 0) return {group.size, group.size};
  if (node % group.stride == 0 && span % node == 0) return {group.size, span / node};
  int64_t most = 1;
  for (int64_t block = 0; block < gpus; block += span) {
    for (int64_t base = block; base < block + group.stride; ++base) {
      int64_t nodes = 0, last = -1;
      for (int64_t i = 0; i < group.size; ++i) {
        const int64_t at = (base + i * group.stride) / node;
        if (at != last) ++nodes, last = at;
      }
      most = std::max(most, nodes);
    }
  }
  return {group.size, most};
}

LinkBytes in_a_ring(const Placement& at, double bytes) {
  const double n = static_cast<double>(at.ranks), passing = bytes * (n - 1) / n;
  return {at.local() > 1 ? passing : 0, at.nodes > 1 ? passing / at.local() : 0};
}

LinkBytes among_all(const Placement& at, double bytes) {
  const double n = static_cast<double>(at.ranks), g = at.local();
  return {bytes * (g - 1) / n, bytes * (n - g) / n};
}

std::unique_ptr<CostModel> make_cost_model(Calibration calibration, const cluster::ClusterModel& cluster,
                                           const plan::Plan& plan, int64_t gpus, int64_t gpus_per_node,
                                           const StepClocks& clocks) {
  return calibration == Calibration::paper ? make_paper(plan)
                                           : make_measured(cluster, plan, gpus, gpus_per_node, clocks);
}

}  // namespace mop::cost
