// The mean clock of a GPU's multiprocessors from one look to the next, while it does nothing at either.
#pragma once
#include <cuda_runtime_api.h>

#include "exec/cuda/memory.h"
#include "kernels/clock.h"

namespace mop::cuda {

class StepClock {
 public:
  StepClock();
  // Waits for the reading.
  void look(cudaStream_t stream);
  double hz() const { return hz_; }  // between the last two looks; 0 before

 private:
  DeviceBytes reading_;
  kernels::ClockReadings last_{};
  double hz_ = 0;
};

}  // namespace mop::cuda
