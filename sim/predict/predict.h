// One scenario in, one prediction out.
#pragma once
#include <array>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sim/engine/engine.h"
#include "sim/predict/fold.h"
#include "sim/predict/scenario.h"
#include "sim/predict/schedule.h"
#include "sim/program/arena.h"
#include "sim/program/program.h"

namespace mop::predict {

struct Named {
  std::string name;
  double value;
};

inline constexpr const char* kPacking = "packing";  // of memory: what arenas take beyond what lives in them

// All byte figures are of the worst rank (HBM) or node (host); times in seconds.
struct Prediction {
  bool fits = false;
  std::string why_not;        // by how much, and the largest buffers
  int64_t hbm_allocated = 0;  // most bytes of live buffers
  int64_t hbm_arena = 0;      // what the static planner needs for them
  int64_t hbm_peak = 0;       // arena (mop) or live bytes (fsdp2), with the constants
  int64_t hbm_capacity = 0;
  int64_t host_peak = 0, host_capacity = 0;  // per node
  std::vector<Named> memory;  // HBM by what it holds, at the peak, constants included: adds up to hbm_peak
  std::vector<Named> host_memory;
  std::optional<double> step_time;  // empty when it does not fit
  std::optional<double> clock;      // Hz of the slowest GPU within its power limit, where that is known
  double estimate = 0;              // closed form, beside the event result
  int64_t tokens_per_step = 0;
  double model_flops_per_token = 0;
  double tokens_per_s_per_gpu = 0, mfu = 0;
  std::vector<Named> time;          // critical path by component: adds up to step_time
  std::vector<Named> time_by_kind;  // critical path by component and operation
  std::vector<Named> busy;          // fraction of the step that each resource is used, worst rank
  double exposed_communication = 0, compute_busy = 0;
  std::string bound_by;
  std::vector<std::string> warnings;  // operations beyond the calibrated range, assumptions that matter
  double imbalance = 1;               // max/mean rows of a rank before least-loaded planning
  uint64_t operations = 0;            // simulated, over all steps and classes
  uint64_t program_operations = 0;    // of one rank's program
  size_t classes = 0;
  bool steady = true;
  double wall_time = 0;
};

// Everything behind a prediction, for traces and inspection.
struct Details {
  std::vector<program::StepProgram> programs;  // by kind of rank; one alone when all kinds run the same (mop)
  const program::StepProgram& program(size_t kind) const {
    return programs[kind < programs.size() ? kind : 0];
  }
  std::vector<std::vector<program::ExpertLoad>> loads;  // by kind of rank, by layer
  std::vector<Schedule> schedules;                      // by kind of rank
  Fold fold;
  engine::Report report;
  std::optional<double> clock;  // as in the prediction
  bool clock_settled = true;
  program::Arena hbm, host;  // of the worst rank
  size_t worst = 0;          // its kind
};

struct PredictOptions {
  bool unfold = false;  // simulate every rank
  bool only_memory = false;
  // Of our executor's plans whose live bytes alone are too many: those, without placing buffers, which takes
  // most of the time.
  bool roughly_where_too_large = false;
};

// Errors: UserError as validate(); InternalError when a check of the prediction fails (checks.h).
Prediction predict(const Scenario& scenario, const PredictOptions& options = {}, Details* details = nullptr);

}  // namespace mop::predict
