// What one step's timelines say operation kind by operation kind: the same sums of a measured step and of a
// simulated one.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sim/program/timeline.h"

namespace mop::validate {

struct OpSum {
  std::string name;    // "experts grouped_gemm": component and kind, as Prediction::time_by_kind has it
  std::string stream;  // "compute"
  double seconds = 0;  // that a rank is busy with it in one step
  double count = 0;    // executions
};

struct OpSums {
  std::vector<OpSum> operations;  // the longest first
  double wait = 0;  // that collectives lasted on the median rank, from start to end, beyond their seconds
  double step = 0;  // seconds of the step that they are of
  // What timed a measured step: "cupti", "threads" (of the CPU), or "events", which count waits for room
  // among the multiprocessors as busy.
  std::string intervals{};
};

// Busy times: the median over ranks; of a collective, in which ranks may wait for the last one, the shortest
// of all ranks, execution by execution. members: how many ranks each timeline stands for; empty: one each.
// `step` and `intervals` are left to the caller.
OpSums sum_operations(std::span<const program::RankTimeline> ranks, std::span<const int64_t> members = {});

// As a record's detail keeps them, under kOpSums. Errors: UserError for what to_json did not write.
inline constexpr const char* kOpSums = "operations";
std::string to_json(const OpSums& sums);
OpSums op_sums_of(const std::string& json);

}  // namespace mop::validate
