// What it takes to launch a kernel.
#include <chrono>

#include "exec/calibrate/benchmarks.h"
#include "kernels/check.h"
#include "kernels/elementwise.h"

namespace mop::calibrate {

void launches(Bench& bench) {
  constexpr int kKernels = 400;  // fewer than a queue of the hardware takes
  const kernels::Matrix tiny = bench.matrix(1, 256),
                        large = bench.matrix(1 << 15, 1 << 15, kernels::Type::f32);
  const auto kernel = [&] { kernels::add({tiny, tiny, tiny}, bench.compute()); };
  cudaEvent_t event = nullptr;
  kernels::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
  cudaEvent_t begin = nullptr, end = nullptr;
  kernels::check(cudaEventCreate(&begin), "an event");
  kernels::check(cudaEventCreate(&end), "an event");
  std::vector<double> cpu, device;
  for (int repeat = 0; repeat < 12; ++repeat) {
    // Behind work of some milliseconds the device runs the kernels back to back, and the host is not held up.
    for (int i = 0; i < 4; ++i) kernels::clear({large}, bench.compute());
    kernels::check(cudaEventRecord(begin, bench.compute()), "an event");
    for (int i = 0; i < kKernels; ++i) kernel();
    kernels::check(cudaEventRecord(end, bench.compute()), "an event");
    kernels::check(cudaEventSynchronize(end), "tiny kernels");
    float milliseconds = 0;
    kernels::check(cudaEventElapsedTime(&milliseconds, begin, end), "an event");

    for (int i = 0; i < 4; ++i) kernels::clear({large}, bench.compute());
    const auto from = std::chrono::steady_clock::now();
    for (int i = 0; i < kKernels; ++i) {
      kernel();
      kernels::check(cudaEventRecord(event, bench.compute()), "an event");
      kernels::check(cudaStreamWaitEvent(bench.transfer(), event, 0), "an event");
    }
    const std::chrono::duration<double, std::nano> launching = std::chrono::steady_clock::now() - from;
    kernels::check(cudaDeviceSynchronize(), "tiny kernels");
    if (repeat < 2) continue;
    cpu.push_back(launching.count() / kKernels);
    device.push_back(milliseconds * 1e6 / kKernels);
  }
  for (cudaEvent_t one : {event, begin, end}) cudaEventDestroy(one);
  bench.figure("native_launch_ns",
               "C++ launch of one kernel, with the record of an event and another stream's wait, CPU time",
               cpu);
  bench.figure("native_kernel_ns", "tiny kernels of ours back to back, device time", device);
  bench.release();
}

}  // namespace mop::calibrate
