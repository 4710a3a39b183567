#include "sim/predict/estimate.h"

#include <algorithm>

namespace mop::predict {

double estimate_step_time(const Scenario&, const Details& d) {
  double longest = 0;
  for (const Schedule& schedule : d.schedules) {
    std::array<double, engine::kMaxStreams> stream{};
    double launch = 0;
    for (const engine::Task& task : schedule.graph.tasks) {
      stream[task.stream] += static_cast<double>(schedule.graph.demands[task.demand].duration);
      launch += task.launch_ns;
    }
    longest = std::max({longest, launch, *std::max_element(stream.begin(), stream.end())});
  }
  return longest * 1e-9;
}

}  // namespace mop::predict
