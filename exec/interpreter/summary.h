// What one step's timeline of a rank says of overlap, by the simulator's definitions.
#pragma once
#include <array>
#include <cstdint>
#include <span>

#include "sim/program/timeline.h"

namespace mop::interpreter {

// Where one span is of several operations (exec/cuda/span_log.h), what lies between them counts as work: then
// what is exposed is a lower bound.
struct StepSummary {                  // nanoseconds
  int64_t compute_busy = 0;           // the compute stream works
  int64_t exposed_communication = 0;  // it does not, and a stream other than the host's does
  std::array<int64_t, program::kStreams> busy{};
  int64_t planning_stall = 0;  // it does not between a plan_routing and what comes next on it
  std::array<int64_t, program::kStreams> exposed{};  // a stream works while the compute stream does not
};

StepSummary summarize(const program::StepProgram& program, std::span<const program::OpSpan> spans);

}  // namespace mop::interpreter
