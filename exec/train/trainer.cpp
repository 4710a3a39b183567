#include "exec/train/trainer.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string_view>

#include "exec/checkpoint/saved_parameters.h"
#include "sim/base/error.h"

namespace mop::train {

using program::Space;

namespace {

program::BufferId find_buffer(const program::StepProgram& program, std::string_view label) {
  for (program::BufferId id = 0; id < program.buffers.size(); ++id)
    if (label == program.buffers[id].label) return id;
  ensure(false, "every program that runs has its sums");
  return program::kNoBuffer;
}

}  // namespace

Trainer::Trainer(const Prepared& prepared, const data::Sequences& data, const TrainerOptions& options,
                 std::unique_ptr<Machine> machine)
    : prepared_(prepared),
      options_(options),
      machine_(std::move(machine)),
      shards_(prepared, *machine_),
      sums_buffer_(find_buffer(prepared.program, "step_sums")) {
  options.hyper.schedule.validate();
  const Job& job = prepared.job;
  const int64_t sharing = prepared.layout.sequence.size;
  for (const int r : machine_->ranks()) {
    batches_.emplace_back(data, data::Share{prepared.micro_sequences(), job.workload.accumulate, r / sharing,
                                            job.workload.sequences, r % sharing, prepared.tokens()});
    interpreters_.emplace_back(prepared.program, machine_->memory(r), machine_->backend(r), r);
  }
}

void Trainer::start(const weights::Source& source) {
  shards_.fill_weights([&](model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols,
                           float* out, int64_t ld) { source.read(id, row, col, rows, cols, out, ld); });
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
    return [&parameters, what](model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols,
                               float* out, int64_t ld) {
      const checkpoint::What there = parameters.has(id, what) ? what : checkpoint::What::weights;
      parameters.read(id, there, row, col, rows, cols, out, ld);
    };
  };
  shards_.fill_weights(from(checkpoint::What::master));
  shards_.fill(What::m, from(checkpoint::What::m));
  shards_.fill(What::v, from(checkpoint::What::v));
  step_ = saved.step;
  position_ = saved.data;
}

interpreter::AdamW Trainer::adam_of(int64_t number) const {
  const Hyperparameters& h = options_.hyper;
  return {number + 1, h.schedule.rate(number), h.beta1, h.beta2, h.eps, h.weight_decay};
}

interpreter::Step Trainer::step_of(int64_t number, int rank) {
  interpreter::Step step;
  step.number = number;
  step.adam = adam_of(number);
  step.deferred = adam_of(number - 1);
  step.max_norm = options_.hyper.max_norm;
  step.data = &batches_[own(rank)];
  return step;
}

Trainer::Sums Trainer::sums() const {
  Sums sums{};
  const int rank = machine_->ranks().front();
  machine_->read(rank, machine_->memory(rank).at(sums_buffer_, 0), reinterpret_cast<std::byte*>(&sums),
                 sizeof sums);
  return sums;
}

StepReport Trainer::step() {
  StepReport report;
  report.step = step_;
  report.learning_rate = options_.hyper.schedule.rate(step_);
  if (options_.trace) machine_->clear_trace();
  for (data::Batches& batches : batches_) batches.begin_step(position_);
  const auto begin = std::chrono::steady_clock::now();
  try {
    machine_->run([&](int rank) {
      interpreters_[own(rank)].run(step_of(step_, rank));
      machine_->backend(rank).synchronize();
    });
  } catch (const interpreter::Stalled&) {  // reading the sums would wait, too
    throw;
  } catch (const UserError& error) {
    const Sums so_far = sums();
    if (!std::isfinite(so_far.loss) || !std::isfinite(so_far.squared_norm)) not_finite(report);
    throw;
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const Sums result = sums();
  report.balance_loss = result.balance_loss;
  report.loss = result.loss + result.balance_loss;
  if (prepared_.job.plan.clip) report.gradient_norm = std::sqrt(result.squared_norm);
  if (!std::isfinite(report.loss)) not_finite(report);
  if (options_.trace)
    report.overlap = interpreter::summarize(prepared_.program, machine_->trace(machine_->ranks().front()));
  report.clock_hz = machine_->clock_hz();
  report.expert_imbalance = machine_->take_expert_imbalance();
  position_ = batches_.front().end_of_step();
  ++step_;
  return report;
}

void Trainer::not_finite(const StepReport& report) const {
  const std::optional<std::string> first = machine_->first_not_finite();
  throw UserError(fmt::format(
      "step {}: the loss or the gradient norm is not finite; {}; lower the learning rate, or look "
      "at the data and the weights",
      report.step,
      first ? "first: " + *first : std::string("--check-finite names the operation that made it")));
}

void Trainer::flush() {
  machine_->run([&](int rank) {
    interpreters_[own(rank)].flush(step_of(step_, rank));
    machine_->backend(rank).synchronize();
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
  for (const interpreter::Interpreter& rank : interpreters_)
    highest = std::max(highest, rank.highest_byte(space));
  return highest;
}

}  // namespace mop::train
