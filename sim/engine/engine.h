// The discrete-event engine: runs a Machine for consecutive steps until the step time is steady.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "sim/engine/tasks.h"

namespace mop::engine {

// start: after the launch, the waits and the meeting; room may come later, and only then resources. busy: the
// rest of end - start it waited for room.
struct Span {
  Time start = 0, end = 0, busy = 0;
};

// One stretch of the last step's critical path, latest first. `task` = kLaunch: the CPU thread launches.
inline constexpr uint32_t kLaunch = 0xffffffff;
struct Stretch {
  uint32_t rank, task;
  Time start, end;
};

struct RankReport {
  Time exposed_communication = 0;  // last step: communication runs and stream 0 does not compute
  Time compute_busy = 0;           // last step: stream 0 computes
  std::vector<Span> spans;         // by task, last step
  // By resource, over the last step: capacity used, in ns x kFull. At most step_time x kFull, or the engine
  // is wrong. A node's resources count all that its ranks use, and read the same in each of them.
  std::array<__int128, kResources> used{};
};

struct Report {
  Time step_time = 0;  // between the ends of the last two steps
  std::vector<Time> step_end;
  bool steady = false;  // the last two steps took the same time
  uint64_t events = 0;  // task starts and completions processed
  uint64_t tasks = 0;   // tasks completed
  std::vector<RankReport> ranks;
  std::vector<Stretch> critical_path;  // covers the last step without holes: durations add up to step_time
};

struct Options {
  int max_steps = 8;     // gives up on steadiness after this many
  double tolerance = 0;  // two step times this close, relative, are steady
};

// Errors: InternalError on a deadlock (names the first waiting tasks), a cycle, an index out of range.
Report run(const Machine& machine, const Options& options = {});

}  // namespace mop::engine
