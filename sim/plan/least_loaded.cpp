#include "sim/plan/least_loaded.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "sim/base/error.h"

namespace mop::plan {
namespace {

void check(const LeastLoadedOptions& options) {
  if (!(options.alpha > 0) || !std::isfinite(options.alpha))
    throw UserError(
        fmt::format("least-loaded alpha is {}: it must be greater than zero, usually 1.0", options.alpha));
  if (options.min_rows < 1)
    throw UserError(
        fmt::format("least-loaded min_rows is {}: it must be at least 1, usually 1024", options.min_rows));
  if (!(options.lambda >= 0))
    throw UserError(fmt::format(
        "least-loaded lambda is {}: it must not be negative, usually 1.3; inf never spills", options.lambda));
}

}  // namespace

LeastLoadedPlan least_loaded(std::span<const int64_t> loads, int ranks, const LeastLoadedOptions& options,
                             std::pmr::memory_resource* memory) {
  check(options);
  const int experts = static_cast<int>(loads.size());
  ensure(ranks >= 1 && experts >= ranks && experts % ranks == 0, "the ranks divide the experts");
  ensure(std::ranges::all_of(loads, [](int64_t load) { return load >= 0; }), "no load is negative");

  // What a rank will compute if nothing more is moved: rows assigned to it, and rows of its own experts still
  // to come. The pseudo-code keeps the two apart (assigned, pending) but only ever uses their sum.
  std::pmr::vector<int64_t> committed(static_cast<size_t>(ranks), memory);
  for (int e = 0; e < experts; ++e) committed[owner(e, experts, ranks)] += loads[e];
  const int64_t total = std::accumulate(committed.begin(), committed.end(), int64_t{0});
  const int64_t most = *std::ranges::max_element(committed);

  LeastLoadedPlan plan(memory);
  // Beyond the total a cap means nothing more: clamped so that a huge alpha cannot overflow.
  plan.cap = static_cast<int64_t>(
      std::min(std::floor(options.alpha * static_cast<double>(total) / ranks), static_cast<double>(total)));
  plan.spilling = ranks > 1 && total > 0 &&
                  static_cast<double>(most) * ranks >= options.lambda * static_cast<double>(total);

  std::pmr::vector<int> order(loads.size(), memory);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, [&](int a, int b) { return loads[a] != loads[b] ? loads[a] > loads[b] : a < b; });

  const size_t most_transfers = plan.spilling ? loads.size() + static_cast<size_t>(ranks) : 0;
  plan.transfers.reserve(most_transfers);
  plan.assignments.reserve(loads.size() + most_transfers);
  for (const int e : order) {
    const int64_t load = loads[e];
    if (load == 0) break;
    const int home = owner(e, experts, ranks);
    committed[home] -= load;
    const int64_t keep = std::clamp(plan.cap - committed[home], int64_t{0}, load);
    if (!plan.spilling || load - keep < options.min_rows) {  // fits, or an excess too small to move
      plan.assignments.push_back({e, home, 0, load});
      committed[home] += load;
      continue;
    }
    if (keep > 0) plan.assignments.push_back({e, home, 0, keep});
    committed[home] += keep;

    const size_t first_transfer = plan.transfers.size();
    for (int64_t next = keep; next < load;) {
      // Only the least loaded helper matters: where it has too little room, so have all the others.
      int helper = home == 0 ? 1 : 0;
      for (int o = helper + 1; o < ranks; ++o)
        if (o != home && committed[o] < committed[helper]) helper = o;
      const int64_t rest = load - next;
      int64_t rows = std::min(rest, plan.cap - committed[helper]);
      if (rows <= 0 || (rows < options.min_rows && rows < rest)) rows = rest;  // forced: nobody has room

      if (next > keep && plan.assignments.back().rank == helper)
        plan.assignments.back().last += rows;
      else
        plan.assignments.push_back({e, helper, next, next + rows});
      const auto sent = std::span(plan.transfers).subspan(first_transfer);
      if (std::ranges::none_of(sent, [&](const WeightTransfer& t) { return t.to == helper; }))
        plan.transfers.push_back({e, home, helper});
      committed[helper] += rows;
      next += rows;
    }
  }
  plan.rows = std::move(committed);  // all experts are assigned, so nothing is pending
  return plan;
}

int64_t least_loaded_bytes(int ranks, int experts) {
  constexpr int64_t kAllocations = 5;
  const int64_t transfers = experts + ranks;
  return static_cast<int64_t>(sizeof(int64_t)) * ranks + static_cast<int64_t>(sizeof(int)) * experts +
         static_cast<int64_t>(sizeof(Assignment)) * (experts + transfers) +
         static_cast<int64_t>(sizeof(WeightTransfer)) * transfers +
         kAllocations * static_cast<int64_t>(alignof(std::max_align_t));
}

}  // namespace mop::plan
