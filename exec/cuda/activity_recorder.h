// CUPTI's records of the kernels and copies that this process launches.
#pragma once
#include <cstddef>
#include <vector>

#include "exec/cuda/activity.h"

namespace mop::cuda {

// CUPTI is one for the process, and so is what records, at any time. It is loaded by the first start():
// before that it takes nothing, and afterwards it keeps its memory on the GPU.
class ActivityRecorder {
 public:
  ActivityRecorder() = default;
  ~ActivityRecorder() { stop(); }
  ActivityRecorder(const ActivityRecorder&) = delete;
  ActivityRecorder& operator=(const ActivityRecorder&) = delete;

  // Where there is no CUPTI, or another profiler has it, stays off; a fallback says why.
  void start();
  void stop();
  bool on() const { return on_; }

  // What this thread launches between the two is of the launch. While on.
  void begin(size_t launch);
  void end();

  void clear();
  std::vector<Activity> activities();  // since clear, of all that the GPU has finished
  size_t lost() const;                 // records since clear that CUPTI dropped, or that have no times

 private:
  bool on_ = false;
};

}  // namespace mop::cuda
