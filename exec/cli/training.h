// A training run from weights or a checkpoint to the last step: its loop, its checkpoints and what it
// measured. On GPUs every process of the run calls it, and all see the same report.
#pragma once
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "exec/data/dataset.h"
#include "exec/train/trainer.h"

namespace mop::cli {

struct TrainingOptions {
  int64_t steps = 100;
  std::optional<launch::Place> place;  // of this process, on a GPU; else all ranks are here, on the CPU
  uint64_t seed = 0;
  train::TrainerOptions trainer;
  data::DatasetOptions data;
  std::string data_path;
  std::string weights;                          // a Hugging Face folder; empty: random
  std::string save, resume;                     // folders of checkpoints; empty: none
  int64_t profile_first = 0, profile_last = 0;  // steps, from 0; the timeline is that of the last of them
  int64_t save_every = 0;                       // steps; 0: at the end only
  int keep = 2;
  std::string export_folder;  // Hugging Face folder to write at the end; empty: none
  weights::Type export_type = weights::Type::bf16;
  std::filesystem::path config_json;  // of the model, for the export
};

struct TrainingReport {
  std::vector<train::StepReport> steps;
  int64_t tokens_per_step = 0;
  int64_t hbm_bytes = 0, host_bytes = 0;  // arenas of a rank
  int64_t hbm_addressed = 0;              // highest byte that an operation used
  int64_t workspace_bytes = 0;            // of a rank, beside the arenas
  int64_t device_bytes = 0;  // of the fullest GPU after the last step, everything included; 0: no GPU
  std::vector<std::vector<int64_t>> expert_rows;  // train::Machine::expert_rows of the last step
  // What the host's memory gave before the first step and after the last, to all ranks of process 0's host.
  std::vector<host::Rates> host_rates;
  std::string libraries;  // of the GPU and their versions
  bool interrupted = false;
  double median_seconds() const;        // of the second half of the steps
  double mean_exposed_seconds() const;  // likewise
};

struct TrainingObserver {
  std::function<void(const std::string&)> say;         // a line of progress: resumed from, saved to
  std::function<void(const host::Rates&)> host_rates;  // before the first step; may be missing
  std::function<void(const train::StepReport&)> step;
  std::function<void(train::Trainer&)> profiled;  // in every process, after the last profiled step
  // Likewise, after the last step and its checkpoint, before the export, which may still fail.
  std::function<void(const TrainingReport&)> measured;
};

// Runs until the last step or the first Ctrl-C (or SIGTERM), which finishes the step and writes a checkpoint.
// Errors: UserError, InternalError; what was saved before stays. peers: of options.place, which it takes.
TrainingReport run_training(const train::Prepared& prepared, const TrainingOptions& options,
                            const TrainingObserver& observer,
                            std::unique_ptr<launch::Peers> peers = launch::alone());

}  // namespace mop::cli
