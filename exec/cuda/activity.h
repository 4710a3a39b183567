// When the kernels and copies of operations ran. Events around an operation also count how long its first
// kernel waited for free multiprocessors, and a copy for other ranks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sim/program/timeline.h"

namespace mop::cuda {

struct Activity {  // a kernel, a copy or a clearing
  size_t launch = 0;
  int64_t start = 0, end = 0;  // nanoseconds of any clock
};

// spans: by launch, from an event before it to one after it. Launches that have activities get what these
// say: from the first start to the last end, and busy as long as any of them ran. The activities' clock is
// set to the events' so that none lies outside of its events, or all as little as can be.
void refine(std::span<program::OpSpan> spans, std::vector<Activity> activities);

}  // namespace mop::cuda
