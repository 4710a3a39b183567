// Lowering: from a model, a workload and a resolved plan to the program of one rank. All that the product
// knows of parallelism is in plan/ and in these functions.
#pragma once
#include <vector>

#include "sim/model/config.h"
#include "sim/model/counts.h"
#include "sim/plan/plan.h"
#include "sim/plan/workload.h"
#include "sim/program/program.h"

namespace mop::program {

inline constexpr int64_t kBf16 = 2, kFp32 = 4, kIdBytes = 4;  // bytes of an element; of a token or row id

// Rows that a rank exchanges and computes on one MoE layer, for one micro-batch. Known only at run time in
// reality; drawn from the workload's routing here. mop programs have the same buffers whatever it says.
struct ExpertLoad {
  int64_t rounds = 1;    // streaming rounds that the whole expert group agrees on (mop)
  int64_t computed = 0;  // rows that this rank computes
  int64_t sent = 0;      // rows that its tokens need (tokens x top_k)
  // Of both, those that it exchanges with other ranks of its node, and with other nodes: the larger of both
  // directions.
  int64_t moved_within = 0, moved_across = 0;
  int64_t experts = 0;  // that it computes, as many as if equally loaded (plan::effective_experts)
  int64_t touched = 0;  // that have any rows
  int64_t spilled_in = 0, spilled_out = 0;  // experts whose weights it borrows, lends
  int64_t spilled_across = 0;               // of other nodes: the larger of both
  bool operator==(const ExpertLoad&) const = default;
};

struct LoweringInput {
  const model::ModelConfig& model;
  const model::Parameters& parameters;
  const plan::Plan& plan;  // resolved and valid
  const plan::Layout& layout;
  const plan::Workload& workload;
  int64_t context_rank = 0;       // position in the context-parallel group (unbalanced ring)
  std::vector<ExpertLoad> loads;  // (L); dense layers' entries are ignored
};

// Tokens a rank holds of one micro-batch between the blocks.
int64_t tokens_per_rank(const plan::Layout& layout, const plan::Workload& workload);

StepProgram lower(const LoweringInput& input);
StepProgram lower_pytorch(
    const LoweringInput& input);  // fsdp2 as PyTorch runs it: a description, not runnable
StepProgram lower_native(const LoweringInput& input);  // what our executor runs

}  // namespace mop::program
