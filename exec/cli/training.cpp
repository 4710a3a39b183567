#include "exec/cli/training.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <numeric>
#include <span>

#include "exec/checkpoint/folder.h"
#include "exec/checkpoint/writer.h"
#include "exec/host/memory.h"
#ifdef MOP_CUDA
#include "exec/cuda/devices.h"
#include "exec/cuda/libraries.h"
#include "exec/cuda/memory.h"
#include "exec/host/adam.h"
#include "kernels/fallback.h"
#endif
#include "sim/base/error.h"
#include "sim/base/median.h"
#include "sim/base/quantity.h"
#include "sim/cli/stop_on_signal.h"
#include "sim/program/arena.h"

namespace mop::cli {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Saves while the steps go on: what a checkpoint holds is copied, and the copy written by another thread.
class Saver {
 public:
  Saver(const std::string& folder, int keep, launch::Peers& peers) : writer_(folder, keep, peers.channel()) {}

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

// The CPU backend: what would be HBM is memory of this host, too.
std::unique_ptr<train::Machine> on_this_host(const train::Prepared& prepared,
                                             const train::MachineOptions& options) {
  const auto& [hbm, host] = prepared.memory.arenas;
  const int64_t ranks = prepared.job.ranks, needed = ranks * (hbm.bytes + host.bytes),
                there = host::available_memory();
  const auto too_little = [&] {
    const bool mostly_hbm = hbm.bytes >= host.bytes;
    return UserError(
        fmt::format("{}; take fewer --ranks, a smaller model or --context, or --gpus",
                    program::shortfall(
                        fmt::format("memory for {} rank{} of the CPU backend", ranks, ranks == 1 ? "" : "s"),
                        needed, there, prepared.program, mostly_hbm ? hbm : host,
                        mostly_hbm ? program::Space::hbm : program::Space::host)));
  };
  // A virtual machine whose memory grows may have shown a small part of it, but not any part.
  constexpr int64_t kMostGrowth = 64;
  if (there > 0 && needed > there * (host::memory_grows() ? kMostGrowth : 1)) throw too_little();
  try {
    return train::make_cpu_machine(prepared, options);
  } catch (const std::bad_alloc&) {
    throw too_little();
  }
}

std::unique_ptr<train::Machine> make_machine(const train::Prepared& prepared, const TrainingOptions& options,
                                             std::unique_ptr<launch::Peers> peers, TrainingReport& report,
                                             const TrainingObserver& observer) {
#ifdef MOP_CUDA
  if (options.place) {
    cuda::ask_for_queues();
    report.libraries = cuda::check_libraries();
    observer.say(fmt::format("{}; CPU AdamW: {}", report.libraries, host::text(host::adam_path())));
    kernels::warn_of_fallbacks([say = observer.say](const std::string& path) { say("warning: " + path); });
    const std::string warning =
        cuda::check_host_memory(prepared.memory.arenas.host.bytes, options.place->local_size);
    if (!warning.empty()) observer.say(warning);
    train::MachineOptions machine = options.trainer;
    machine.say = observer.say;
    return train::make_cuda_machine(prepared, machine, *options.place, std::move(peers));
  }
#else
  (void)peers, (void)report, (void)observer;
#endif
  if (options.place)
    throw UserError(
        "this build has no CUDA: install the CUDA toolkit, run ./setup and build again; or run without "
        "--gpus");
  return on_this_host(prepared, options.trainer);
}

// Process 0 writes, and calls for each parameter as it comes to it; the others bring their parts until it
// says no more.
void export_weights(train::Trainer& trainer, const model::ModelConfig& model,
                    const TrainingOptions& options) {
  launch::Peers& peers = trainer.peers();
  const auto read = [&](model::ParameterId id, float* out) {
    trainer.shards().read(id, train::What::weights, out);
  };
  if (peers.rank() != 0) {
    for (std::vector<float> none;;) {
      const std::vector<std::byte> heard = peers.broadcast({});
      if (heard.empty()) return;
      model::ParameterId id;
      std::memcpy(&id, heard.data(), sizeof id);
      read(id, none.data());
    }
  }
  weights::write_hugging_face(model, options.config_json, options.export_folder, options.export_type,
                              [&](model::ParameterId id, float* out) {
                                peers.broadcast(std::as_bytes(std::span(&id, 1)));
                                read(id, out);
                              });
  peers.broadcast({});
}

// Everybody's numbers, largest of all.
int64_t most_of(launch::Peers& peers, int64_t mine) {
  return std::ranges::max(launch::everyones(peers, mine));
}

// Of the ranks of process 0's host together.
host::Rates host_rates(train::Machine& machine, const TrainingOptions& options) {
  if (!options.place) return {};
  const host::Rates own = machine.host_rates();
  host::Rates all;
  const auto sum = [&](double mine) {
    const std::vector<double> each = launch::everyones(machine.peers(), mine);
    return std::accumulate(
        each.begin(), each.begin() + std::min<int64_t>(std::ssize(each), options.place->local_size), 0.0);
  };
  all.both_ways = sum(own.both_ways);
  all.adam = sum(own.adam);
  return all;
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
    throw UserError(fmt::format(
        "the checkpoint '{}' is of step {}, and --steps is {}: nothing is left to do; ask for more",
        reader->path().string(), reader->state().step, options.steps));
  trainer.resume(*reader);
  observer.say(fmt::format("resumed from {} (step {}, {} ranks, {})", reader->path().string(),
                           reader->state().step, reader->state().ranks, reader->state().plan));
}

void train_and_save(train::Trainer& trainer, const train::Prepared& prepared, const TrainingOptions& options,
                    const TrainingObserver& observer, Saver* saver, const weights::Source* source,
                    Clock::time_point begin, TrainingReport& report) {
  const train::Job& job = prepared.job;
  launch::Peers& peers = trainer.peers();
  if (!options.resume.empty())
    resume(trainer, options, observer);
  else if (source)
    trainer.start(*source);
  else
    trainer.start(weights::RandomSource(job.model, options.seed));

  if (options.place)
    observer.say(fmt::format("weights ready after {}", format_seconds(seconds_since(begin))));
  report.host_rates.push_back(host_rates(trainer.machine(), options));
  if (observer.host_rates) observer.host_rates(report.host_rates.front());
  report.tokens_per_step = prepared.micro_sequences() * job.workload.accumulate * job.workload.context;
  report.hbm_bytes = prepared.memory.arenas.hbm.bytes;
  report.host_bytes = prepared.memory.arenas.host.bytes;
  report.workspace_bytes = trainer.workspace_bytes();
  const StopOnSignal stopping;
  int64_t saved = -1;
  const auto save = [&] {
    if (!saver || saved == trainer.steps_done()) return;
    saver->save(trainer, options.seed);
    saved = trainer.steps_done();
  };
  while (trainer.steps_done() < options.steps && !report.interrupted) {
    const int64_t step = trainer.steps_done();
    if (step == options.profile_first) {
      trainer.machine().profile(true);
      peers.barrier();  // nobody waits in the step for those to whom it took longer
    }
    report.steps.push_back(trainer.step());
    train::StepReport& done = report.steps.back();
    struct Said {
      int64_t stop;  // a signal may have reached some of them
      double clock_hz;
    };
    for (const Said& said : launch::everyones(peers, Said{StopOnSignal::stop ? 1 : 0, done.clock_hz})) {
      report.interrupted |= said.stop != 0;
      done.clocks_hz.push_back(said.clock_hz);
    }
    observer.step(done);
    if (step == options.profile_last) {
      trainer.machine().profile(false);
      observer.profiled(trainer);
    }
    if (options.save_every > 0 && trainer.steps_done() % options.save_every == 0) save();
  }
  trainer.flush();
  save();
  if (saver) {
    saver->wait();
    observer.say(fmt::format(
        "checkpoint of step {} in {}", trainer.steps_done(),
        (std::filesystem::path(options.save) / checkpoint::step_name(trainer.steps_done())).string()));
  }
  report.hbm_addressed = trainer.bytes_addressed(program::Space::hbm);
  report.expert_rows = trainer.machine().expert_rows();
  report.device_bytes = most_of(peers, trainer.machine().device_bytes_in_use());
  report.host_rates.push_back(host_rates(trainer.machine(), options));
  if (observer.measured) observer.measured(report);
  if (!options.export_folder.empty() && !report.interrupted) {
    export_weights(trainer, job.model, options);
    observer.say(fmt::format("weights exported to {}", options.export_folder));
  }
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
                            const TrainingObserver& observer, std::unique_ptr<launch::Peers> given) {
  const train::Job& job = prepared.job;
  const data::Dataset data(options.data_path, options.data);
  std::unique_ptr<weights::Source> source;
  if (!options.weights.empty())
    source = std::make_unique<weights::HuggingFaceSource>(job.model, options.weights);

  const Clock::time_point begin = Clock::now();
  TrainingReport report;
  launch::Peers* const before = given.get();
  // Before the long part: a folder that cannot be written is known now.
  std::unique_ptr<Saver> saver;
  if (!options.save.empty()) saver = std::make_unique<Saver>(options.save, options.keep, *before);
  train::Trainer trainer(prepared, data, options.trainer,
                         make_machine(prepared, options, std::move(given), report, observer));
  if (options.place)
    observer.say(
        fmt::format("memory and communicators ready after {}", format_seconds(seconds_since(begin))));
  launch::Peers& peers = trainer.peers();
  try {
    train_and_save(trainer, prepared, options, observer, saver.get(), source.get(), begin, report);
  } catch (const std::exception& error) {
    // Here, while everything is still there: what hangs in NCCL would hang in the course of an exception,
    // too.
    if (peers.size() > 1 || dynamic_cast<const interpreter::Stalled*>(&error) != nullptr)
      peers.abandon(error.what(), dynamic_cast<const UserError*>(&error) != nullptr ? 2 : 1);
    throw;
  }
  saver.reset();  // its channel ends before the peers that it is one of
  return report;
}

}  // namespace mop::cli
