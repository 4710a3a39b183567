#include "exec/train/trainer.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <string_view>

#include "exec/checkpoint/saved_parameters.h"
#include "exec/cpu/kernels.h"
#include "exec/cpu/routing.h"
#include "exec/cpu/workspace.h"
#include "sim/base/error.h"

namespace mop::train {

using program::Space;

struct Trainer::Rank {
  Rank(const Prepared& p, const data::Sequences& data, int64_t rank)
      : hbm(p.memory.arenas.hbm.bytes),
        host(p.memory.arenas.host.bytes),
        batches(data, {p.micro_sequences(), p.job.workload.accumulate, rank / p.layout.sequence.size,
                       p.job.workload.sequences, rank % p.layout.sequence.size, p.tokens()}) {}

  interpreter::HostBytes hbm, host;
  data::Batches batches;
  std::unique_ptr<interpreter::Checks> checks;
  std::unique_ptr<interpreter::Interpreter> interpreter;
  std::array<std::unique_ptr<cpu::Workspace>, program::kStreams> workspaces;
};

namespace {

program::BufferId find_buffer(const program::StepProgram& program, std::string_view label) {
  for (program::BufferId id = 0; id < program.buffers.size(); ++id)
    if (label == program.buffers[id].label) return id;
  ensure(false, "every program that runs has its sums");
  return program::kNoBuffer;
}

}  // namespace

Trainer::Trainer(const Prepared& prepared, const data::Sequences& data, const TrainerOptions& options)
    : prepared_(prepared), data_(data), options_(options) {
  options.hyper.schedule.validate();
  const Job& job = prepared.job;
  const program::StepProgram& program = prepared.program;
  sums_buffer_ = find_buffer(program, "step_sums");
  memory_.reserve(static_cast<size_t>(job.ranks));
  for (int64_t r = 0; r < job.ranks; ++r) {
    ranks_.push_back(std::make_unique<Rank>(prepared, data, r));
    Rank& rank = *ranks_.back();
    memory_.emplace_back(program, prepared.memory, rank.hbm.data(), rank.host.data());
    if (options.check_guards || options.check_finite)
      rank.checks = std::make_unique<interpreter::Checks>(program, memory_.back(), r, options.check_finite);
    for (const program::Op& op : program.ops)
      if (auto& workspace = rank.workspaces[static_cast<size_t>(op.stream)]; workspace == nullptr)
        workspace = std::make_unique<cpu::Workspace>(cpu::workspace_bytes(program));
  }
  shards_ = std::make_unique<Shards>(prepared, memory_);

  const auto constants = std::make_shared<cpu::Constants>(
      cpu::Constants{job.model,
                     model::make_rope(job.model, job.workload.context),
                     {job.plan.capacity_factor, job.plan.spill_min_rows,
                      job.plan.family == plan::Family::mop && job.plan.least_loaded ? job.plan.spill_gate
                                                                                    : plan::kNeverSpill},
                     program.round_rows,
                     static_cast<int>(job.plan.spill_slots)});
  const auto workspace = [this](int rank, program::Stream stream) -> cpu::Workspace& {
    return *ranks_[static_cast<size_t>(rank)]->workspaces[static_cast<size_t>(stream)];
  };
  cpu::Kernels kernels;
  kernels.run = [constants, workspace](int rank, program::Stream stream, const interpreter::Launch& launch) {
    cpu::run(launch.call, *constants, launch.step, workspace(rank, stream));
  };
  kernels.run_collective = [workspace](int rank, program::Stream stream, const interpreter::Launch& launch,
                                       cpu::Meeting& meeting) {
    cpu::run_collective(launch.call, meeting, workspace(rank, stream));
  };
  kernels.rounds = [](const cpu::Call& plan) { return int64_t{cpu::round_plan(plan.out[0]).rounds()}; };

  cpu::WorldOptions world;
  if (options.trace) world.trace_spans = 4 * program.ops.size() + 4096;
  if (ranks_.front()->checks)
    for (const auto& rank : ranks_) world.checks.push_back(rank->checks.get());
  world_ = std::make_unique<cpu::World>(
      std::vector<const program::StepProgram*>(static_cast<size_t>(job.ranks), &program), std::move(kernels), world);
  for (size_t r = 0; r < ranks_.size(); ++r)
    ranks_[r]->interpreter = std::make_unique<interpreter::Interpreter>(
        program, memory_[r], world_->backend(static_cast<int>(r)), static_cast<int64_t>(r));
}

Trainer::~Trainer() {
  world_.reset();  // its threads use the rest
}

void Trainer::start(const weights::Source& source) {
  shards_->fill_weights([&](model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
                            int64_t ld) { source.read(id, row, col, rows, cols, out, ld); });
}

void Trainer::resume(const checkpoint::Reader& reader) {
  const checkpoint::State& saved = reader.state();
  if (saved.fingerprint != checkpoint::fingerprint(prepared_.job.model))
    throw UserError(fmt::format("checkpoint '{}' is of the model {}, whose parameters are not those of {}",
                                reader.path().string(), saved.model, prepared_.job.model.name));
  const plan::Plan plan = plan::parse_plan(saved.plan);
  const program::ParameterLayout layout(prepared_.job.model, plan, plan::layout(plan, saved.ranks));
  const checkpoint::SavedParameters parameters(reader, layout);
  const auto from = [&](checkpoint::What what) {
    return [&parameters, what](model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
                               int64_t ld) {
      const checkpoint::What there = parameters.has(id, what) ? what : checkpoint::What::weights;
      parameters.read(id, there, row, col, rows, cols, out, ld);
    };
  };
  shards_->fill_weights(from(checkpoint::What::master));
  shards_->fill(What::m, from(checkpoint::What::m));
  shards_->fill(What::v, from(checkpoint::What::v));
  step_ = saved.step;
  position_ = saved.data;
}

interpreter::AdamW Trainer::adam_of(int64_t number) const {
  const Hyperparameters& h = options_.hyper;
  return {number + 1, h.schedule.rate(number), h.beta1, h.beta2, h.eps, h.weight_decay};
}

interpreter::Step Trainer::step_of(int64_t number, Rank& rank) const {
  interpreter::Step step;
  step.number = number;
  step.adam = adam_of(number);
  step.deferred = adam_of(number - 1);
  step.max_norm = options_.hyper.max_norm;
  step.data = &rank.batches;
  return step;
}

const double* Trainer::sums() const {
  return reinterpret_cast<const double*>(memory_.front().at(sums_buffer_, 0));
}

StepReport Trainer::step() {
  StepReport report;
  report.step = step_;
  report.learning_rate = options_.hyper.schedule.rate(step_);
  if (options_.trace) world_->clear_trace();
  for (const auto& rank : ranks_) rank->batches.begin_step(position_);
  const auto begin = std::chrono::steady_clock::now();
  try {
    world_->run([&](int r) {
      Rank& rank = *ranks_[static_cast<size_t>(r)];
      rank.interpreter->run(step_of(step_, rank));
      world_->backend(r).synchronize();
    });
  } catch (const UserError& error) {
    const double loss = sums()[1];
    if (!std::isfinite(loss) || !std::isfinite(sums()[0])) not_finite(report);
    throw;
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  report.balance_loss = sums()[2];
  report.loss = sums()[1] + report.balance_loss;
  if (prepared_.job.plan.clip) report.gradient_norm = std::sqrt(sums()[0]);
  if (!std::isfinite(report.loss)) not_finite(report);
  if (options_.trace) report.overlap = interpreter::summarize(prepared_.program, world_->trace(0));
  position_ = ranks_.front()->batches.end_of_step();
  ++step_;
  return report;
}

void Trainer::not_finite(const StepReport& report) const {
  std::optional<interpreter::NotFinite> first;
  for (const auto& rank : ranks_)
    if (rank->checks)
      if (const auto found = rank->checks->first_not_finite(); found && (!first || found->issue < first->issue))
        first = found;
  throw UserError(fmt::format("step {}: the loss or the gradient norm is not finite; {}; lower the learning rate, or look "
                              "at the data and the weights",
                              report.step,
                              first ? "first: " + first->what
                                    : std::string("no operation was watched")));
}

void Trainer::flush() {
  world_->run([&](int r) {
    Rank& rank = *ranks_[static_cast<size_t>(r)];
    rank.interpreter->flush(step_of(step_, rank));
    world_->backend(r).synchronize();
  });
}

checkpoint::State Trainer::state(uint64_t seed) const {
  checkpoint::State s;
  s.step = s.optimizer_step = step_;
  s.data = position_;
  s.seed = seed;
  s.plan = plan::describe(prepared_.job.plan);
  s.ranks = prepared_.job.ranks;
  s.model = prepared_.job.model.name;
  s.fingerprint = checkpoint::fingerprint(prepared_.job.model);
  return s;
}

int64_t Trainer::bytes_addressed(Space space) const {
  int64_t highest = 0;
  for (const auto& rank : ranks_) highest = std::max(highest, rank->interpreter->highest_byte(space));
  return highest;
}

std::vector<program::OpSpan> Trainer::trace(int rank) const {
  return world_->trace(rank);
}

int64_t Trainer::workspace_bytes() const {
  int64_t threads = 0;
  for (const auto& workspace : ranks_.front()->workspaces) threads += workspace != nullptr ? 1 : 0;
  return threads * cpu::workspace_bytes(prepared_.program);
}

}  // namespace mop::train
