#include "sim/predict/checks.h"

#include <fmt/format.h>

#include <cmath>

#include "sim/base/error.h"

namespace mop::predict {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds)
    throw InternalError(
        fmt::format("a prediction failed its own check: {}; please report the command", what));
}

}  // namespace

void check(const Scenario& s, const Details& d, const Prediction& p) {
  ensure(p.step_time.has_value(), "a prediction that fits has a step time");
  const double step = *p.step_time;
  constexpr double kRounding = 1 + 1e-6;
  // Floors from the data sheet. The paper's calibration is a fit, not a machine: it is exempt from the
  // machine's floors.
  for (const Schedule& schedule : d.schedules) {
    if (s.calibration != cost::Calibration::measured) break;
    const double flops = schedule.flops / s.cluster["peak_flops"],
                 bytes = schedule.hbm_bytes / s.cluster["hbm_peak_bw"];
    require(step * kRounding >= flops,
            fmt::format("the step takes {} s, its FLOPs alone take {} s at peak", step, flops));
    require(step * kRounding >= bytes,
            fmt::format("the step takes {} s, its HBM bytes alone take {} s", step, bytes));
  }
  for (const Named& busy : p.busy)
    require(busy.value <= kRounding, fmt::format("{} is used to {} of its capacity", busy.name, busy.value));
  // Rows are neither made nor lost on their way to the experts: over all ranks, as many are computed as are
  // sent.
  for (int64_t l = 0; l < s.model.layers; ++l) {
    if (!s.model.moe[static_cast<size_t>(l)]) continue;
    int64_t sent = 0, computed = 0;
    for (const RankClass& c : d.fold.classes) {
      const program::ExpertLoad& load = d.loads[c.kind][static_cast<size_t>(l)];
      sent += c.members * load.sent;
      computed += c.members * load.computed;
    }
    require(sent == computed,
            fmt::format("layer {} sends {} rows to experts that compute {}", l, sent, computed));
  }
  double path = 0;
  for (const Named& part : p.time) path += part.value;
  require(std::abs(path - step) <= 1e-6 * step + 1e-9,
          fmt::format("the critical path adds up to {} s, not {} s", path, step));
  double held = 0;
  for (const Named& part : p.memory) held += part.value;
  require(std::abs(held - static_cast<double>(p.hbm_peak)) <= 1e-3 * static_cast<double>(p.hbm_peak),
          fmt::format("memory rows add up to {}, the peak is {}", held, p.hbm_peak));
  require(p.hbm_arena >= p.hbm_allocated, "the arena is smaller than its live bytes");
  if (s.calibration == cost::Calibration::measured) require(p.mfu <= 1, fmt::format("MFU is {}", p.mfu));
}

}  // namespace mop::predict
