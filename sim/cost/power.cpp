#include "sim/cost/power.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "sim/base/error.h"

namespace mop::cost {
namespace {

constexpr double kLeastClock = 0.3, kMostExponent = 4;
constexpr std::array kTensor{"matmul",
                             "deep_matmul",
                             "grouped_matmul",
                             "attention_forward",
                             "attention_backward",
                             "narrow_attention_forward",
                             "narrow_attention_backward"};
constexpr auto kMixed = static_cast<size_t>(Draws::deep_matmul), kMemory = static_cast<size_t>(Draws::memory);

}  // namespace

Draws draws_of_product(double k) {
  constexpr double kDeep = 2560;
  return k < kDeep ? Draws::matmul : Draws::deep_matmul;
}

Draws draws_of_attention(double width, bool forward) {
  constexpr double kNarrow = 128;
  if (width <= kNarrow) return forward ? Draws::narrow_attention_forward : Draws::narrow_attention_backward;
  return forward ? Draws::attention_forward : Draws::attention_backward;
}

double Work::lasts(const Clocks& clocks) const {
  double sum = seconds[kMemory];
  for (size_t k = 0; k < kTensorDraws; ++k) sum += seconds[k] / clocks.tensor[k];
  return sum;
}

double Power::Draw::watts(double clock) const {
  return at_largest * std::pow(clock, exponent);
}

// Where the clocks hardly differ nothing is learnt of the exponent: the cube, of a voltage that rises with
// the clock.
Power::Draw Power::Draw::through(double clock_a, double watts_a, double clock_b, double watts_b) {
  constexpr double kApart = 0.02, kCube = 3;
  if (watts_a <= 0) return {};
  Draw draw{0, kCube};
  if (const double apart = std::log(clock_b / clock_a); std::abs(apart) > kApart)
    draw.exponent = std::clamp(std::log(std::max(1.0, watts_b) / watts_a) / apart, 0.0, kMostExponent);
  draw.at_largest = watts_a / std::pow(clock_a, draw.exponent);
  return draw;
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
  const double largest = figure("largest_clock_hz");
  const auto clock = [&](const std::string& name) {
    return std::min(1.0, figure(name + "_clock_hz") / largest);
  };
  Power p;
  p.idle_ = figure("idle_power_w");
  p.limit_ = figure("power_limit_w");
  if (cluster.gpus_per_node() > 1) p.links_ = std::max(0.0, figure("link_power_w") - p.idle_);
  for (size_t k = 0; k < kTensorDraws; ++k) {
    std::string name = kTensor[k];  // files of before 29 November 2026 have one for all attention
    if (name.find("attention") != std::string::npos && !cluster.figures.contains(name + "_power_w"))
      name = "attention";
    p.most_[k] = clock(name + "_burst");
    p.draw_[k] = Draw::through(clock(name), figure(name + "_power_w") - p.idle_, clock(name + "_among"),
                               figure(name + "_among_power_w") - p.idle_);
  }
  // Deep products among memory-bound kernels: what those draw at the clock that is then set is the rest.
  const double share = figure("mixed_matmul_share"), products = clock("mixed_matmul"),
               set = clock("mixed_memory_bound"), of_memory = figure("memory_bound_power_w") - p.idle_,
               rest = (figure("mixed_power_w") - p.idle_ - share * p.draw_[kMixed].watts(products)) /
                      (1 - share);
  // What sags less with power to spare sags less within the limit, too.
  const double sag = 1 - std::min(1.0, products / set), spare = std::max(1e-3, 1 - p.most_[kMixed]);
  for (size_t k = 0; k < kTensorDraws; ++k)
    p.sag_[k] = std::clamp(1 - sag * (1 - p.most_[k]) / spare, kLeastClock, 1.0);
  p.draw_[kMemory] = Draw::through(1, of_memory, set, rest);
  const auto found = cluster.tables.find("gpu_clock");
  if (found == cluster.tables.end()) return p;
  const auto clock_of = [&](int64_t gpu) { return found->second.table.at({static_cast<double>(gpu + 1)}); };
  if (clock_of(cluster.gpus_per_node() - 1).outside) return p;  // of a smaller host
  for (int64_t gpu = 0; gpu < cluster.gpus_per_node(); ++gpu) p.over_median_.push_back(clock_of(gpu).value);
  return p;
}

Clocks Power::at(double set) const {
  Clocks clocks;
  clocks.set = set;
  for (size_t k = 0; k < kTensorDraws; ++k) clocks.tensor[k] = std::min(most_[k], sag_[k] * set);
  return clocks;
}

// A GPU whose clock is lower than the median's draws what that one draws at its own.
Clocks Power::clocks(const Work& work, double seconds, const Clocks& now, double over_median) const {
  const double rest = std::max(0.0, seconds - work.lasts(now));
  const auto within = [&](double set) {
    const Clocks clocks = at(set);
    double joules =
        (work.seconds[kMemory] + work.hbm) * draw_[kMemory].watts(set / over_median) + work.links * links_;
    for (size_t k = 0; k < kTensorDraws; ++k)
      joules += work.seconds[k] / clocks.tensor[k] * draw_[k].watts(clocks.tensor[k] / over_median);
    return joules <= (limit_ - idle_) * (work.lasts(clocks) + rest);
  };
  if (within(1)) return at(1);
  double low = kLeastClock, high = 1;
  for (int i = 0; i < 40; ++i) (within((low + high) / 2) ? low : high) = (low + high) / 2;
  return at(low);
}

double Power::mean_clock(const Work& work, double seconds, const Clocks& clocks) const {
  const double tensor = std::accumulate(work.seconds.begin(), work.seconds.begin() + kTensorDraws, 0.0),
               others = std::max(0.0, seconds - (work.lasts(clocks) - work.seconds[kMemory]));
  return (tensor + others * clocks.set) / std::max(seconds, work.lasts(clocks));
}

}  // namespace mop::cost
