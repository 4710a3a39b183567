// What is trained, and everything that follows from it before the first byte is allocated.
#pragma once
#include <memory>

#include "exec/interpreter/memory.h"
#include "sim/model/counts.h"
#include "sim/plan/least_loaded.h"
#include "sim/program/lower.h"
#include "sim/program/parameters.h"

namespace mop::train {

struct Job {
  model::ModelConfig model;
  plan::Plan plan;  // resolved; fsdp2 plans with runtime native
  int64_t ranks = 1;
  plan::Workload workload;
};

// The program, the same for every rank, and where its buffers are.
struct Prepared {
  // guard: bytes around every buffer for checks. Errors: UserError for a plan that does not fit the model and
  // ranks; InternalError for a plan whose program cannot be run.
  explicit Prepared(Job job, int64_t guard = 0);
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  const Job job;
  const plan::Layout layout;
  const program::ParameterLayout parameters;
  const program::StepProgram program;
  const interpreter::MemoryPlan memory;

  int64_t tokens() const {
    return program::tokens_per_rank(layout, job.workload);
  }  // of a rank and micro-batch
  plan::LeastLoadedOptions least_loaded() const;
  int64_t micro_sequences() const { return layout.sequence_groups * job.workload.sequences; }
};

}  // namespace mop::train
