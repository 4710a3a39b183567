// Trains on a machine: its ranks with their data, step by step.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "exec/checkpoint/reader.h"
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

struct TrainerOptions : MachineOptions {
  Hyperparameters hyper;
};

struct StepReport {
  int64_t step = 0;  // from 0
  double loss = 0;   // mean cross-entropy over all targets of the step, and the balance loss where it counts
  double balance_loss = 0;              // its part, weighted; 0 without
  std::optional<double> gradient_norm;  // before clipping; none where the plan does not clip
  double learning_rate = 0;
  double seconds = 0;
  double clock_hz = 0;               // of the multiprocessors of this process's GPU; 0: not known
  std::vector<double> clocks_hz;     // of every process, by rank, where a run has gathered them
  double expert_imbalance = 1;       // rows of the fullest expert over the mean, worst layer of this process
  interpreter::StepSummary overlap;  // of the process's first rank; with trace only
};

class Trainer {
 public:
  // Prepared and data outlive it. The machine: made with the same options.
  Trainer(const Prepared& prepared, const data::Sequences& data, const TrainerOptions& options,
          std::unique_ptr<Machine> machine);
  // On the CPU.
  Trainer(const Prepared& prepared, const data::Sequences& data, const TrainerOptions& options)
      : Trainer(prepared, data, options, make_cpu_machine(prepared, options)) {}

  // One of the two, before the first step.
  void start(const weights::Source& source);
  // From a checkpoint of any plan and number of ranks. Errors: UserError when it is of another model.
  void resume(const checkpoint::Reader& reader);

  // Errors: UserError for a loss or gradient norm that is not finite (names the first operation that made it,
  // with check_finite), a token beyond the vocabulary; InternalError. The trainer is unusable after an error.
  StepReport step();

  // Finishes updates that the last step left to the next. Idempotent; the next step's results do not change.
  void flush();

  int64_t steps_done() const { return step_; }
  checkpoint::State state(uint64_t seed) const;
  const Shards& shards() const { return shards_; }  // after flush()

  int64_t bytes_addressed(program::Space space) const;  // highest of any rank, from the arena's start
  std::vector<program::OpSpan> profiled_trace(int rank) const { return machine_->profiled_trace(rank); }
  int64_t workspace_bytes() const { return machine_->workspace_bytes(); }
  Machine& machine() { return *machine_; }
  launch::Peers& peers() { return machine_->peers(); }

 private:
  size_t own(int rank) const { return static_cast<size_t>(rank - machine_->ranks().front()); }
  interpreter::Step step_of(int64_t number, int rank);
  interpreter::AdamW adam_of(int64_t number) const;
  [[noreturn]] void not_finite(const StepReport& report) const;
  struct Sums {
    double squared_norm, loss, balance_loss, unused;
  };
  Sums sums() const;

  const Prepared& prepared_;
  const TrainerOptions options_;
  std::unique_ptr<Machine> machine_;
  Shards shards_;
  std::vector<data::Batches> batches_;                  // by rank of this process
  std::vector<interpreter::Interpreter> interpreters_;  // likewise
  program::BufferId sums_buffer_ = program::kNoBuffer;
  int64_t step_ = 0;
  data::Position position_;
};

}  // namespace mop::train
