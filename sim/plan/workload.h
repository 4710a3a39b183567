// Workload: what is trained on in one optimizer step, the same for every plan compared.
#pragma once
#include <cstdint>

#include "sim/plan/routing.h"

namespace mop::plan {

enum class Precision : uint8_t { bf16, fp32 };  // of weights and activations; sums are fp32 or better
constexpr const char* name(Precision precision) {
  return precision == Precision::fp32 ? "fp32" : "bf16";
}

inline constexpr int64_t kMostMicroBatches = 4096;  // of a step

struct Workload {
  int64_t context = 4096;  // tokens of one sequence (S)
  int64_t sequences = 1;   // per micro-batch of one sequence group: the ranks that share a sequence
  int64_t accumulate = 1;  // micro-batches a step
  Precision precision = Precision::bf16;
  bool balance_loss = false;  // the router's auxiliary loss is part of the loss
  Routing routing;
};

}  // namespace mop::plan
