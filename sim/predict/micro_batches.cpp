#include "sim/predict/micro_batches.h"

#include <algorithm>
#include <vector>

namespace mop::predict {
namespace {

constexpr int64_t kFewest = 3;
// Micro-batches are what a step takes, and not copies of states behind them, which many hide and few do not.
constexpr double kMostOfIt = 0.8;

int64_t live(const std::vector<Named>& memory) {
  double bytes = 0;
  for (const Named& one : memory)
    if (one.name != kPacking) bytes += one.value;
  return static_cast<int64_t>(bytes);
}

}  // namespace

Outline outline(const Scenario& scenario, bool only_memory) {
  const auto with = [&](int64_t micro_batches) {
    Scenario s = scenario;
    s.workload.accumulate = micro_batches;
    return predict(s, {.only_memory = only_memory, .roughly_where_too_large = true});
  };
  const int64_t all = scenario.workload.accumulate;
  for (int64_t few = kFewest;; few *= 2) {
    const Prediction p = with(std::min(all, few));
    Outline o{p.fits,      p.step_time.value_or(0), tokens_per_step(scenario), p.hbm_peak, p.hbm_capacity,
              p.host_peak, p.host_capacity};
    if (all <= few) return o;
    const Prediction before = with(few - 1);
    const int64_t more = all - few;
    // Of what lives; what packing adds does not grow.
    o.hbm_peak += more * std::max<int64_t>(0, p.hbm_allocated - before.hbm_allocated);
    o.host_peak += more * std::max<int64_t>(0, live(p.host_memory) - live(before.host_memory));
    o.fits = p.fits && o.hbm_peak <= o.hbm_capacity && o.host_peak <= o.host_capacity;
    if (only_memory || !o.fits) return o;
    const double each = o.step_time / static_cast<double>(few),
                 grows = before.step_time ? o.step_time - *before.step_time : each;
    if (grows < kMostOfIt * each) continue;
    o.step_time += static_cast<double>(more) * grows;
    return o;
  }
}

}  // namespace mop::predict
