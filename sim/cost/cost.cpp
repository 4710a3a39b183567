#include "sim/cost/cost.h"

#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/suggest.h"
#include "sim/cost/models.h"

namespace mop::cost {

const char* name(Calibration calibration) { return calibration == Calibration::paper ? "paper" : "measured"; }

Calibration parse_calibration(const std::string& text) {
  if (text == "measured") return Calibration::measured;
  if (text == "paper") return Calibration::paper;
  throw UserError(unknown_name("calibration", text, std::vector<std::string>{"measured", "paper"}));
}

Placement place(const program::Group& group, int64_t gpus_per_node, int64_t gpus) {
  const int64_t node = std::min(gpus_per_node, gpus);
  if (group.stride >= node) return {1, group.size};
  const int64_t local = std::clamp<int64_t>(node / group.stride, 1, group.size);
  return {local, (group.size + local - 1) / local};
}

std::unique_ptr<CostModel> make_cost_model(Calibration calibration, const cluster::ClusterModel& cluster,
                                           const plan::Plan& plan, int64_t gpus) {
  return calibration == Calibration::paper ? make_paper(plan) : make_measured(cluster, plan, gpus);
}

}  // namespace mop::cost
