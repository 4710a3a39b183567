#include "exec/cli/training.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <csignal>

#include "exec/checkpoint/folder.h"
#include "exec/checkpoint/writer.h"
#include "sim/base/error.h"

namespace mop::cli {
namespace {

std::atomic<int> interrupts{0};

extern "C" void on_interrupt(int signal) {
  // The second one does not wait for the step.
  if (interrupts.fetch_add(1) > 0) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

class Interruptible {
 public:
  Interruptible() : old_int_(std::signal(SIGINT, on_interrupt)), old_term_(std::signal(SIGTERM, on_interrupt)) {
    interrupts = 0;
  }
  ~Interruptible() {
    std::signal(SIGINT, old_int_);
    std::signal(SIGTERM, old_term_);
  }
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  void (*old_int_)(int);
  void (*old_term_)(int);
};

// Saves while the steps go on: what a checkpoint holds is copied, and the copy written by another thread.
class Saver {
 public:
  Saver(const std::string& folder, int keep) : writer_(folder, keep) {}

  void save(train::Trainer& trainer, uint64_t seed) {
    writer_.wait();  // the copy is free again
    trainer.flush();
    checkpoint::Snapshot snapshot{trainer.state(seed), trainer.shards().copy_state(copy_)};
    writer_.begin(std::move(snapshot));
  }
  void wait() { writer_.wait(); }

 private:
  std::vector<std::byte> copy_;
  checkpoint::Writer writer_;  // its thread reads the copy: gone first
};

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

std::unique_ptr<train::Machine> make_machine(const train::Prepared& prepared, const TrainingOptions& options) {
#ifdef MOP_CUDA
  if (options.on_gpus) return train::make_cuda_machine(prepared, options.trainer);
#endif
  if (options.on_gpus)
    throw UserError("this build has no CUDA: install the CUDA toolkit, run ./setup and build again; or run without --gpus");
  return train::make_cpu_machine(prepared, options.trainer);
}

void resume(train::Trainer& trainer, const TrainingOptions& options, const TrainingObserver& observer) {
  std::optional<checkpoint::Reader> reader;
  if (std::filesystem::exists(std::filesystem::path(options.resume) / checkpoint::kManifestName)) {
    reader.emplace(options.resume);
  } else {
    checkpoint::Newest newest = checkpoint::open_newest(options.resume);
    for (const std::string& why : newest.skipped) observer.say("passed over: " + why);
    if (!newest.reader)
      throw UserError(fmt::format("no complete checkpoint in '{}'; start without --resume", options.resume));
    reader = std::move(newest.reader);
  }
  if (reader->state().step >= options.steps)
    throw UserError(fmt::format("the checkpoint '{}' is of step {}, and --steps is {}: nothing is left to do; ask for more",
                                reader->path().string(), reader->state().step, options.steps));
  trainer.resume(*reader);
  observer.say(fmt::format("resumed from {} (step {}, {} ranks, {})", reader->path().string(), reader->state().step,
                           reader->state().ranks, reader->state().plan));
}

}  // namespace

double TrainingReport::median_seconds() const {
  std::vector<double> seconds;
  for (size_t i = steps.size() / 2; i < steps.size(); ++i) seconds.push_back(steps[i].seconds);
  return median(std::move(seconds));
}

double TrainingReport::mean_exposed_seconds() const {
  double sum = 0;
  for (size_t i = steps.size() / 2; i < steps.size(); ++i)
    sum += static_cast<double>(steps[i].overlap.exposed_communication) * 1e-9;
  return steps.empty() ? 0 : sum / static_cast<double>(steps.size() - steps.size() / 2);
}

TrainingReport run_training(const train::Prepared& prepared, const TrainingOptions& options,
                            const TrainingObserver& observer) {
  const train::Job& job = prepared.job;
  const data::Dataset data(options.data_path, options.data);
  // Before the long part: a folder that cannot be written is known now.
  std::unique_ptr<Saver> saver;
  if (!options.save.empty()) saver = std::make_unique<Saver>(options.save, options.keep);
  std::unique_ptr<weights::Source> source;
  if (!options.weights.empty()) source = std::make_unique<weights::HuggingFaceSource>(job.model, options.weights);

  train::Trainer trainer(prepared, data, options.trainer, make_machine(prepared, options));
  if (!options.resume.empty())
    resume(trainer, options, observer);
  else if (source)
    trainer.start(*source);
  else
    trainer.start(weights::RandomSource(job.model, options.seed));

  TrainingReport report;
  report.tokens_per_step = prepared.micro_sequences() * job.workload.accumulate * job.workload.context;
  report.hbm_bytes = prepared.memory.arenas.hbm.bytes;
  report.host_bytes = prepared.memory.arenas.host.bytes;
  report.workspace_bytes = trainer.workspace_bytes();
  const Interruptible interruptible;
  int64_t saved = -1;
  const auto save = [&] {
    if (!saver || saved == trainer.steps_done()) return;
    saver->save(trainer, options.seed);
    saved = trainer.steps_done();
  };
  while (trainer.steps_done() < options.steps && !report.interrupted) {
    report.steps.push_back(trainer.step());
    observer.step(report.steps.back());
    if (options.save_every > 0 && trainer.steps_done() % options.save_every == 0) save();
    report.interrupted = interrupts > 0;
  }
  trainer.flush();
  save();
  if (saver) {
    saver->wait();
    observer.say(fmt::format("checkpoint of step {} in {}", trainer.steps_done(),
                             (std::filesystem::path(options.save) / checkpoint::step_name(trainer.steps_done())).string()));
  }
  report.hbm_addressed = trainer.bytes_addressed(program::Space::hbm);
  if (!options.export_folder.empty() && !report.interrupted) {
    weights::write_hugging_face(job.model, options.config_json, options.export_folder, options.export_type,
                                [&](model::ParameterId id, float* out) {
                                  trainer.shards().read(id, train::What::weights, out);
                                });
    observer.say(fmt::format("weights exported to {}", options.export_folder));
  }
  if (observer.end) observer.end(trainer);
  return report;
}

}  // namespace mop::cli
