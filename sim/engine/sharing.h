// Who gets how much of the resources that too many want: weighted max-min fairness with bounds.
//
// Task i has a weight w_i and draws a_ir of resource r at full speed (kFull = all of it). Its rate x_i
// satisfies
//
//     sum_i a_ir * x_i  <=  kFull * kFull        for every resource r          (capacity)
//     0 <= x_i <= kFull                          for every task i              (bound)
//
// and x_i / w_i cannot grow without shrinking some x_j / w_j that is no larger (fairness). Progressive
// filling finds the one solution: a common level rises from 0 and x_i = min(kFull, level * w_i), until a
// resource saturates; its tasks keep their rates, the others go on rising. Levels are exact fractions and
// rates are rounded down, so the capacities always hold, and all resources that saturate at one level freeze
// together, so the order in which tasks and resources were added cannot matter.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mop::engine {

class Sharing {
 public:
  void clear() {
    resources_.clear();
    flows_.clear();
    uses_.clear();
  }
  uint32_t add_resource() {
    resources_.push_back({});
    return static_cast<uint32_t>(resources_.size() - 1);
  }
  uint32_t add_flow(uint32_t weight) {
    const auto uses = static_cast<uint32_t>(uses_.size());
    flows_.push_back({weight, 0, uses, uses});
    return static_cast<uint32_t>(flows_.size() - 1);
  }
  void add_use(uint32_t resource, int64_t amount) {  // by the flow added last; at least one a flow
    uses_.push_back({resource, amount});
    ++flows_.back().last_use;
    resources_[resource].demand += amount * flows_.back().weight;
  }

  // Precondition: the amounts on one resource add up to at most 2^36 (then all products below fit).
  void solve();
  uint32_t rate(uint32_t flow) const { return flows_[flow].rate; }

 private:
  struct Resource {
    int64_t left = 0;    // capacity that the frozen tasks leave
    int64_t demand = 0;  // sum of amount * weight of the tasks still rising: saturates at level left / demand
    bool saturated = false;
  };
  struct Flow {
    uint32_t weight, rate, first_use, last_use;
  };
  struct Use {
    uint32_t resource;
    int64_t amount;
  };

  void freeze(Flow& flow, uint32_t rate);

  std::vector<Resource> resources_;
  std::vector<Flow> flows_;
  std::vector<Use> uses_;
  std::vector<uint32_t> rising_;
};

}  // namespace mop::engine
