// The clock of the multiprocessors while something runs: each counts its cycles, and all see one timer.
#pragma once
#include <cuda_runtime_api.h>

#include <array>

namespace mop::kernels {

struct ClockReading {
  unsigned long long cycles = 0, nanoseconds = 0;
};
inline constexpr int kMostProcessors = 160;
using ClockReadings = std::array<ClockReading, kMostProcessors>;  // by multiprocessor; zeros: not read

// to: in device memory, zeros before. Reads those multiprocessors that get a block: on an idle GPU all.
void read_clock(ClockReadings* to, cudaStream_t stream);

// Mean clock between two readings, in Hz; 0 where no multiprocessor is in both.
double mean_clock(const ClockReadings& before, const ClockReadings& after);

}  // namespace mop::kernels
