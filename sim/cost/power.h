// The clock that a GPU keeps within its power limit. Tensor cores draw more than the limit at the largest
// clock: in a row, 8192^3 products hold an H200 at 1.52 of 1.98 GHz, grouped products at 1.63, attention's
// backward at 1.74, while memory-bound kernels draw 519 W and a GPU that waits 124 (4 x H200, 2026-11-27). So
// what a product takes depends on what runs before and behind it: the clock follows within some milliseconds,
// and one clock for a step is the model here.
#pragma once
#include <array>
#include <optional>
#include <vector>

#include "sim/cluster/cluster.h"
#include "sim/program/program.h"

namespace mop::cost {

// Kinds of work that draw differently.
enum class Draws : uint8_t { matmul, grouped_matmul, attention, memory };
inline constexpr size_t kDraws = 4;
Draws draws(program::OpKind kind);  // of an operation on the compute stream

// Seconds of each in a step, with the multiprocessors at their largest clock.
using Work = std::array<double, kDraws>;

class Power {
 public:
  // Nothing where the cluster's file has no such figures; then its tables are of a warm GPU's clock. Errors:
  // UserError where some are missing.
  static std::optional<Power> of(const cluster::ClusterModel& cluster);

  // The clock, as a share of the largest, with which the mean power of a step stays within the limit. The
  // step takes `seconds` with the clock `at`, and is longer or shorter by as much as its tensor work is.
  // over_median: of the GPU, as below.
  double clock(const Work& work, double seconds, double at, double over_median = 1) const;

  // GPUs of a host differ: the clock that the node's gpu-th, from 0, has under tensor work, over the
  // median's.
  double over_median(int64_t gpu) const {
    return static_cast<size_t>(gpu) < over_median_.size() ? over_median_[static_cast<size_t>(gpu)] : 1;
  }

 private:
  double limit_ = 0, idle_ = 0, memory_ = 0;
  std::array<double, kDraws> at_largest_{};  // watts above idle, of tensor work
  double exponent_ = 0;                      // of the clock in these
  std::vector<double> over_median_;          // by GPU of a node; empty: all alike
};

}  // namespace mop::cost
