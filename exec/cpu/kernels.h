// The operations of sim/program/ops.h on the CPU: the reference of every other backend. Matrix products by
// Eigen, everything in fp32 or better inside, bf16 or fp32 in memory. No kernel allocates: temporaries are on
// the stack or in the thread's Workspace.
#pragma once
#include <memory>
#include <span>

#include "exec/interpreter/call.h"
#include "exec/interpreter/step.h"
#include "sim/model/config.h"
#include "sim/model/rope.h"
#include "sim/plan/least_loaded.h"

namespace mop::cpu {

using interpreter::Call;
using interpreter::Operand;

// What does not change between steps.
struct Constants {
  const model::ModelConfig& model;
  model::Rope rope;  // tables for all positions of the context
  plan::LeastLoadedOptions least_loaded;
  int64_t round_rows = 0;
  int spill_slots = 0;
};

// Scratch memory of one thread, allocated once and said beside the arena in every memory report.
class Workspace;

// Runs one local operation to its end. Errors: InternalError for operands that do not fit ops.h; UserError
// for what the data did wrong (a token beyond the vocabulary, a gradient norm that is not finite).
void run(const Call& call, const Constants& constants, const interpreter::Step& step, Workspace& workspace);

// Everyone's call of one collective, by index; waits for the group.
class Meeting {
 public:
  virtual ~Meeting() = default;
  virtual std::span<const Call* const> calls() const = 0;
  virtual void barrier() = 0;
};

// Runs one collective: every rank of the group calls it with its own call. On entry all calls() are there, on
// return all ranks have finished reading this rank's operands.
void run_collective(const Call& call, Meeting& meeting, Workspace& workspace);

}  // namespace mop::cpu
