// A timeline in the trace event format of Chrome, which Perfetto reads: a process a rank, a thread a stream,
// live memory as counters. Predictions and measurements are written alike, so that the two can be laid over
// each other.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sim/program/program.h"

namespace mop::program {

struct OpSpan {  // one execution of an operation, in nanoseconds of any clock that all ranks share
  OpId op = 0;
  int64_t start = 0, end = 0;
  int64_t busy = 0;  // kernels or copies of it ran; else it waited for room, its copies for other ranks
};

struct RankTimeline {
  std::string title;  // "rank 3, kimi-k2 mop"
  const StepProgram* program = nullptr;
  std::vector<OpSpan> spans;  // of one step
};

// Times are counted from the first start of all. Errors: UserError when the file cannot be written.
void write_timeline(const std::string& path, std::span<const RankTimeline> ranks);
// That it can, before the long part; what the file holds stays. Errors: as of that.
void check_timeline(const std::string& path);

}  // namespace mop::program
