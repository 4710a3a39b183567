#include "exec/cuda/step_clock.h"

#include "kernels/check.h"

namespace mop::cuda {

using kernels::check;

StepClock::StepClock() : reading_(device_bytes(sizeof(kernels::ClockReadings), "a reading of the clock")) {
  check(cudaMemset(reading_.get(), 0, sizeof(kernels::ClockReadings)), "a reading of the clock");
}

void StepClock::look(cudaStream_t stream) {
  kernels::read_clock(reinterpret_cast<kernels::ClockReadings*>(reading_.get()), stream);
  kernels::ClockReadings now;
  check(cudaMemcpyAsync(&now, reading_.get(), sizeof now, cudaMemcpyDeviceToHost, stream),
        "a reading of the clock");
  check(cudaStreamSynchronize(stream), "a reading of the clock");
  hz_ = kernels::mean_clock(last_, now);
  last_ = now;
}

}  // namespace mop::cuda
