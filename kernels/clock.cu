#include "kernels/check.h"
#include "kernels/clock.h"

namespace mop::kernels {
namespace {

__global__ void read_clocks(ClockReading* to) {
  unsigned processor = 0;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(processor));
  if (processor >= kMostProcessors) return;
  ClockReading now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now.nanoseconds));
  now.cycles = clock64();
  to[processor] = now;
}

}  // namespace

void read_clock(ClockReadings* to, cudaStream_t stream) {
  read_clocks<<<kMostProcessors, 1, 0, stream>>>(to->data());
  check_launch("reading the clock");
}

double mean_clock(const ClockReadings& before, const ClockReadings& after) {
  double sum = 0;
  int count = 0;
  for (size_t i = 0; i < before.size(); ++i) {
    const ClockReading &a = before[i], &b = after[i];
    if (a.nanoseconds == 0 || b.nanoseconds <= a.nanoseconds) continue;
    sum += static_cast<double>(b.cycles - a.cycles) / static_cast<double>(b.nanoseconds - a.nanoseconds);
    ++count;
  }
  return count == 0 ? 0 : 1e9 * sum / count;
}

}  // namespace mop::kernels
