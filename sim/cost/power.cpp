#include "sim/cost/power.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "sim/base/error.h"

namespace mop::cost {
namespace {

constexpr double kLeastClock = 0.3, kLeastExponent = 1.05, kMostExponent = 3;
constexpr std::array kTensor{Draws::matmul, Draws::grouped_matmul, Draws::attention};
constexpr std::array kNames{"matmul", "grouped_matmul", "attention"};

}  // namespace

Draws draws(program::OpKind kind) {
  switch (kind) {
    case program::OpKind::gemm:
      return Draws::matmul;
    case program::OpKind::grouped_gemm:
      return Draws::grouped_matmul;
    case program::OpKind::attention_fwd:
    case program::OpKind::attention_bwd:
      return Draws::attention;
    default:
      return Draws::memory;
  }
}

std::optional<Power> Power::of(const cluster::ClusterModel& cluster) {
  if (!cluster.figures.contains("largest_clock_hz")) return std::nullopt;
  const auto figure = [&](const std::string& name) {
    const auto found = cluster.figures.find(name);
    if (found == cluster.figures.end())
      throw UserError(
          fmt::format("cluster {} has products as of the largest clock, and no {}: measure it again with "
                      "mop calibrate --only power",
                      cluster.name, name));
    return found->second.value;
  };
  Power p;
  p.limit_ = figure("power_limit_w");
  p.idle_ = figure("idle_power_w");
  p.memory_ = figure("memory_bound_power_w");
  const double largest = figure("largest_clock_hz"), share = figure("mixed_matmul_share");
  // Watts above idle are to the clock's power e: of products alone, and of products among memory-bound
  // kernels, where they have the rest of what is drawn. Where products alone stay within the limit any e will
  // do.
  const double alone = figure("matmul_power_w") - p.idle_,
               among = (figure("mixed_power_w") - (1 - share) * p.memory_) / share - p.idle_,
               faster = figure("mixed_clock_hz") / figure("matmul_clock_hz");
  p.exponent_ = alone > 0 && among > alone && faster > 1
                    ? std::clamp(std::log(among / alone) / std::log(faster), kLeastExponent, kMostExponent)
                    : kMostExponent;
  for (size_t i = 0; i < kTensor.size(); ++i) {
    const std::string name = kNames[i];
    const double clock = std::min(1.0, figure(name + "_clock_hz") / largest);
    p.at_largest_[static_cast<size_t>(kTensor[i])] =
        std::max(0.0, figure(name + "_power_w") - p.idle_) / std::pow(clock, p.exponent_);
  }
  const auto found = cluster.tables.find("gpu_clock");
  if (found == cluster.tables.end()) return p;
  const auto clock_of = [&](int64_t gpu) { return found->second.table.at({static_cast<double>(gpu + 1)}); };
  if (clock_of(cluster.gpus_per_node() - 1).outside) return p;  // of a smaller host
  for (int64_t gpu = 0; gpu < cluster.gpus_per_node(); ++gpu) p.over_median_.push_back(clock_of(gpu).value);
  return p;
}

double Power::clock(const Work& work, double seconds, double at, double over_median) const {
  double tensor = 0, drawn = 0;
  for (const Draws kind : kTensor) {
    tensor += work[static_cast<size_t>(kind)];
    drawn += work[static_cast<size_t>(kind)] * at_largest_[static_cast<size_t>(kind)];
  }
  drawn *= std::pow(over_median, -exponent_);
  const double memory = work[static_cast<size_t>(Draws::memory)] * (memory_ - idle_);
  const auto within = [&](double clock) {
    const double lasts = std::max(tensor / clock, seconds + tensor * (1 / clock - 1 / at));
    return idle_ * lasts + drawn * std::pow(clock, exponent_ - 1) + memory <= limit_ * lasts;
  };
  if (within(1)) return 1;
  double low = kLeastClock, high = 1;
  for (int i = 0; i < 40; ++i) (within((low + high) / 2) ? low : high) = (low + high) / 2;
  return low;
}

}  // namespace mop::cost
