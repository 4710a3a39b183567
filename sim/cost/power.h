// The clocks that a GPU keeps within its power limit. Two things hold the clock of the multiprocessors down.
// While tensor cores work, the voltage sags and the clock with it, at once: even for a moment and with power
// to spare, deep products run at 1.61 of an H200's 1.98 GHz. And a loop of some hundred milliseconds sets the
// clock so that the mean power stays within the limit: in a row such products run at 1.34 GHz, by turns with
// memory-bound kernels, a fourth of the time, at 1.39 while those run at 1.54 (hwmodels/h200x2.json,
// 2026-11-28). So what a product takes depends on how busy the step is with products: forward is faster than
// backward.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "sim/cluster/cluster.h"
#include "sim/program/program.h"

namespace mop::cost {

// Kinds of work that draw differently, those of the tensor cores first. A product that adds up few products
// for each of its results (k of 2048) stores more often, and draws a fifth less above idle than one that adds
// up many. grouped_matmul: of many experts in one kernel. Attention of narrow heads (64) does fewer FLOPs a
// cycle than that of wide ones.
enum class Draws : uint8_t {
  matmul,
  deep_matmul,
  grouped_matmul,
  attention_forward,
  attention_backward,
  narrow_attention_forward,
  narrow_attention_backward,
  memory
};
inline constexpr size_t kTensorDraws = 7, kDraws = 8;
Draws draws_of_product(double k);
Draws draws_of_attention(double width, bool forward);  // width: of queries and of values, together

// Shares of the largest clock: what the loop has set, which all have but tensor work, by kind.
struct Clocks {
  double set = 1;
  std::array<double, kTensorDraws> tensor{1, 1, 1, 1, 1, 1, 1};
};

// The loop is faster than a step: forward, with the update before or under it, and backward, with recompute,
// have clocks of their own.
inline constexpr size_t kStages = 2;
inline size_t stage_of(program::Phase phase) {
  return phase == program::Phase::recompute || phase == program::Phase::backward ? 1 : 0;
}
using StepClocks = std::array<Clocks, kStages>;

// What a stage does: seconds of each kind on the compute stream, with the multiprocessors at their largest
// clock, and seconds for which the other streams' kernels, and what attention streams, would keep all of HBM
// busy, and exchanges all links.
struct Work {
  std::array<double, kDraws> seconds{};
  double hbm = 0, links = 0;
  // Of the compute stream.
  double lasts(const Clocks& clocks) const;
};
using StepWork = std::array<Work, kStages>;

class Power {
 public:
  // Nothing where the cluster's file has no such figures; then its tables are of a warm GPU's clock. Errors:
  // UserError where some are missing.
  static std::optional<Power> of(const cluster::ClusterModel& cluster);

  // With which the mean power of a stage stays within the limit. It takes `seconds` with the clocks
  // `now`, and is longer or shorter by as much as its tensor work is. over_median: of the GPU, as below.
  Clocks clocks(const Work& work, double seconds, const Clocks& now, double over_median = 1) const;

  // Of a stage with these clocks, by time, which is what a measurement sees.
  double mean_clock(const Work& work, double seconds, const Clocks& clocks) const;

  // GPUs of a host differ: the clock that the node's gpu-th, from 0, has under tensor work, over the
  // median's.
  double over_median(int64_t gpu) const {
    return static_cast<size_t>(gpu) < over_median_.size() ? over_median_[static_cast<size_t>(gpu)] : 1;
  }

 private:
  // Watts above idle: `at_largest` times the clock's power `exponent`.
  struct Draw {
    double at_largest = 0, exponent = 1;
    double watts(double clock) const;
    // The first for certain, the second as closely as an exponent from 0 to 4 allows.
    static Draw through(double clock_a, double watts_a, double clock_b, double watts_b);
  };
  Clocks at(double set) const;

  double limit_ = 0, idle_ = 0, links_ = 0;  // of links above idle
  std::array<double, kTensorDraws> sag_{};   // clock under tensor work over the one that is set
  std::array<double, kTensorDraws> most_{};  // clock under it that nothing limits
  std::array<Draw, kDraws> draw_{};
  std::vector<double> over_median_;  // by GPU of a node; empty: all alike
};

}  // namespace mop::cost
