// What the suite must hold: errors over many comparisons against bounds.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "sim/validate/comparison.h"

namespace mop::validate {

struct Bounds {                                // relative errors
  double hbm = 0.01, host = 0.02;              // worst run
  double step_mean = 0.05, step_worst = 0.12;  // held-out runs
  double ratio = 0.05;                         // of mop to fsdp2, worst set of plans
  double ranking = 0.02;                       // time lost by the plan that was predicted best, worst set
  double operation = 0.10;                     // worst kind's median
};
inline constexpr double kShare = 0.02;  // of the step, from which on a kind of operation counts

// "hbm=1%,step-mean=5": those that differ, in percent. Errors: UserError with the nearest name.
Bounds parse_bounds(const std::string& text);
std::string describe(const Bounds& bounds);  // parse_bounds reads it back

struct Verdict {
  std::string name;  // as parse_bounds has it, or "predicted"
  std::string of;    // "worst of 12 runs: #7 qwen-4k"
  double bound = 0;
  double value = 0;
  size_t count = 0;  // what it is of; 0: nothing to test
  bool holds() const { return count == 0 || value <= bound; }
};

// Step times of runs on GPUs only. When none is held out, the bounds of step times are of all.
std::vector<Verdict> judge(std::span<const Comparison> comparisons, const Bounds& bounds);

struct StepErrors {
  size_t count = 0;
  double mean = 0, worst = 0;  // absolute
};
StepErrors step_errors(std::span<const Comparison> comparisons, bool held_out_only);

// Plans of one question: the same model, cluster, GPUs, context, tokens a step, routing and precision.
struct PlanSet {
  std::string question;
  std::vector<const Comparison*> plans;  // at least two; the fastest measured first
};
std::vector<PlanSet> plan_sets(std::span<const Comparison> comparisons);

// Errors of one kind of operation ("grouped_gemm", over all components) in the runs where it holds kShare of
// the step.
struct KindErrors {
  std::string kind;
  std::vector<double> errors;  // absolute, sorted
  double median() const;
};
std::vector<KindErrors> kind_errors(std::span<const Comparison> comparisons);

}  // namespace mop::validate
