// Learning rate over the steps of a run: linear warm-up to the peak, then constant, or along half a cosine
// down to the minimum, which the last step has.
#pragma once
#include <cstdint>

namespace mop::train {

enum class Decay : uint8_t { constant, cosine };

struct Schedule {
  Decay decay = Decay::cosine;
  double peak = 0, minimum = 0;
  int64_t warmup = 0;  // steps: the first one has peak / warmup, the last of them the peak
  int64_t steps = 0;   // of the whole run; beyond them the rate stays the minimum

  // Throws UserError for rates that are negative, not finite or a minimum above the peak, and for a warm-up
  // that is negative or longer than the run.
  void validate() const;

  double rate(int64_t step) const;  // step counts from 0
};

}  // namespace mop::train
