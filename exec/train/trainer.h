// Trains on the CPU backend: all ranks in this process, their arenas, threads and data.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "exec/checkpoint/reader.h"
#include "exec/cpu/backend.h"
#include "exec/data/batches.h"
#include "exec/interpreter/interpreter.h"
#include "exec/interpreter/summary.h"
#include "exec/train/job.h"
#include "exec/train/schedule.h"
#include "exec/train/shards.h"
#include "exec/weights/weights.h"

namespace mop::train {

struct Hyperparameters {
  Schedule schedule;
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  double max_norm = 1;  // of the gradient, where the plan clips
};

struct TrainerOptions {
  Hyperparameters hyper;
  bool trace = false;           // keep the operations' times of the last step
  bool check_guards = false;    // needs Prepared with guards
  bool check_finite = false;    // remember the first operation that makes a number that is not finite
};

struct StepReport {
  int64_t step = 0;  // from 0
  double loss = 0;   // mean cross-entropy over all targets of the step, and the balance loss where it counts
  double balance_loss = 0;            // its part, weighted; 0 without
  std::optional<double> gradient_norm;  // before clipping; none where the plan does not clip
  double learning_rate = 0;
  double seconds = 0;
  interpreter::StepSummary overlap;  // of rank 0; with trace only
};

class Trainer {
 public:
  // Prepared and data outlive it. Errors: UserError when the machine lacks the memory.
  Trainer(const Prepared& prepared, const data::Sequences& data, const TrainerOptions& options);
  ~Trainer();

  // One of the two, before the first step.
  void start(const weights::Source& source);
  // From a checkpoint of any plan and number of ranks. Errors: UserError when it is of another model.
  void resume(const checkpoint::Reader& reader);

  // Errors: UserError for a loss or gradient norm that is not finite (names the first operation that made it, with
  // check_finite), a token beyond the vocabulary; InternalError. The trainer is unusable after an error.
  StepReport step();

  // Finishes updates that the last step left to the next. Idempotent; the next step's results do not change.
  void flush();

  int64_t steps_done() const { return step_; }
  checkpoint::State state(uint64_t seed) const;
  // After flush(); pointing into the arenas.
  const Shards& shards() const { return *shards_; }

  int64_t bytes_addressed(program::Space space) const;  // highest of any rank, from the arena's start
  std::vector<program::OpSpan> trace(int rank) const;
  int64_t workspace_bytes() const;  // of all threads of a rank

 private:
  struct Rank;
  interpreter::Step step_of(int64_t number, Rank& rank) const;
  interpreter::AdamW adam_of(int64_t number) const;
  [[noreturn]] void not_finite(const StepReport& report) const;
  const double* sums() const;

  const Prepared& prepared_;
  const data::Sequences& data_;
  const TrainerOptions options_;
  std::vector<interpreter::Memory> memory_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::unique_ptr<cpu::World> world_;
  std::unique_ptr<Shards> shards_;
  int64_t step_ = 0;
  data::Position position_;
  program::BufferId sums_buffer_ = program::kNoBuffer;
};

}  // namespace mop::train
