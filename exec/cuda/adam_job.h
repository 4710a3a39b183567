// A CPU update that a CUDA stream runs in its turn.
#pragma once
#include <cstdint>
#include <vector>

#include "exec/cuda/rank.h"
#include "exec/host/adam.h"
#include "exec/interpreter/step.h"

namespace mop::cuda {

struct Rank::AdamJob {
  using Pair = host::AdamPair;

  AdamJob();

  float* states = nullptr;
  int64_t bucket = 0;
  bool master = true, clipped = false;
  std::vector<Pair> pairs;
  interpreter::AdamW adam;
  PinnedBytes factor;

  void run() const;  // on the process's workers; no CUDA inside
};

}  // namespace mop::cuda
