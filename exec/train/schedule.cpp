#include "exec/train/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "sim/base/error.h"

namespace mop::train {

void Schedule::validate() const {
  if (!std::isfinite(peak) || peak < 0)
    throw UserError(fmt::format("the learning rate must be a number of at least 0, not {}", peak));
  if (decay == Decay::cosine && !(minimum >= 0 && minimum <= peak))
    throw UserError(fmt::format(
        "the least learning rate must lie between 0 and the learning rate {}, not at {}", peak, minimum));
  if (warmup < 0 || warmup > steps)
    throw UserError(
        fmt::format("the warm-up must be between 0 and all {} steps long, not {}", steps, warmup));
}

double Schedule::rate(int64_t step) const {
  const auto done = static_cast<double>(step + 1);
  const auto begin = static_cast<double>(warmup);
  if (step < warmup) return peak * done / begin;
  if (decay == Decay::constant) return peak;
  const double progress = std::min(1.0, (done - begin) / static_cast<double>(steps - warmup));
  return minimum + (peak - minimum) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

}  // namespace mop::train
