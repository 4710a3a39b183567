#include "exec/cuda/adam_job.h"

namespace mop::cuda {

Rank::AdamJob::AdamJob() : factor(pinned_bytes(sizeof(float), "a clip factor")) {
  pairs.reserve(2);
  host::Workers::of_process();  // start here, not on CUDA's thread in the first step
}

void Rank::AdamJob::run() const {
  const float scale = clipped ? *reinterpret_cast<const float*>(factor.get()) : 1.0F;
  host::adam({states, bucket, master, pairs, scale, adam}, host::Workers::of_process());
}

}  // namespace mop::cuda
