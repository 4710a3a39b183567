#include "sim/predict/micro_batches.h"

#include <algorithm>

namespace mop::predict {
namespace {

constexpr int64_t kFew = 3;

}  // namespace

Outline outline(const Scenario& scenario, bool only_memory) {
  const auto with = [&](int64_t micro_batches) {
    Scenario s = scenario;
    s.workload.accumulate = micro_batches;
    return predict(s, {.only_memory = only_memory});
  };
  const int64_t all = scenario.workload.accumulate;
  const Prediction p = with(std::min(all, kFew));
  Outline o{p.fits,      p.step_time.value_or(0), tokens_per_step(scenario), p.hbm_peak, p.hbm_capacity,
            p.host_peak, p.host_capacity};
  if (all <= kFew) return o;
  const Prediction before = with(kFew - 1);
  const int64_t more = all - kFew;
  o.hbm_peak += more * (p.hbm_peak - before.hbm_peak);
  o.host_peak += more * (p.host_peak - before.host_peak);
  o.fits = o.hbm_peak <= o.hbm_capacity && o.host_peak <= o.host_capacity;
  if (p.step_time && before.step_time)
    o.step_time += static_cast<double>(more) * (*p.step_time - *before.step_time);
  return o;
}

}  // namespace mop::predict
