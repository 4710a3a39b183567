#include "sim/engine/sharing.h"

#include "sim/engine/tasks.h"

namespace mop::engine {
namespace {

using Wide = unsigned __int128;

Wide product(int64_t a, int64_t b) {
  return static_cast<Wide>(a) * static_cast<Wide>(b);
}

}  // namespace

void Sharing::freeze(Flow& flow, uint32_t rate) {
  flow.rate = rate;
  for (uint32_t u = flow.first_use; u < flow.last_use; ++u) {
    Resource& resource = resources_[uses_[u].resource];
    resource.left -= uses_[u].amount * rate;
    resource.demand -= uses_[u].amount * flow.weight;
  }
}

void Sharing::solve() {
  for (Resource& resource : resources_) resource.left = kFull * kFull;
  rising_.resize(flows_.size());
  for (uint32_t i = 0; i < rising_.size(); ++i) rising_[i] = i;

  while (!rising_.empty()) {
    // The next level at which a resource saturates, as the fraction left / demand.
    int64_t left = 0, demand = 0;
    for (const Resource& resource : resources_) {
      if (resource.demand == 0) continue;
      if (demand == 0 || product(resource.left, demand) < product(left, resource.demand)) {
        left = resource.left;
        demand = resource.demand;
      }
    }

    // Tasks that reach full speed below that level: without them the level is higher, so look again.
    const Wide full = product(kFull, demand);
    size_t kept = 0;
    for (const uint32_t i : rising_) {
      if (product(left, flows_[i].weight) >= full) {
        freeze(flows_[i], kFull);
      } else {
        rising_[kept++] = i;
      }
    }
    if (kept < rising_.size()) {
      rising_.resize(kept);
      continue;
    }

    for (Resource& resource : resources_) {
      resource.saturated =
          resource.demand != 0 && product(resource.left, demand) == product(left, resource.demand);
    }
    kept = 0;
    for (const uint32_t i : rising_) {
      Flow& flow = flows_[i];
      bool saturated = false;
      for (uint32_t u = flow.first_use; u < flow.last_use; ++u)
        saturated |= resources_[uses_[u].resource].saturated;
      if (saturated) {
        freeze(flow, static_cast<uint32_t>(left * flow.weight / demand));
      } else {
        rising_[kept++] = i;
      }
    }
    rising_.resize(kept);
  }
}

}  // namespace mop::engine
