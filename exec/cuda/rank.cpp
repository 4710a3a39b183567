#include "exec/cuda/rank.h"

#include <fmt/format.h>
#include <nvtx3/nvToolsExt.h>
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "exec/cpu/routing.h"
#include "exec/cuda/adam_job.h"
#include "exec/cuda/operands.h"
#include "kernels/check.h"
#include "kernels/elementwise.h"
#include "kernels/fallback.h"
#include "sim/base/error.h"

namespace mop::cuda {

using kernels::check;
using program::OpKind;

namespace {

constexpr auto kPatience = std::chrono::minutes(10);  // with a GPU that does not get on
constexpr unsigned long kTimerSlack = 1000;           // ns
constexpr int kFlags = 3;                             // invalid token, invalid target, norm not finite

}  // namespace

Rank::Rank(int device, int rank, const program::StepProgram& program, const interpreter::Memory& memory,
           const cpu::Constants& constants, std::unique_ptr<Communicators> communicators,
           std::unique_ptr<PeerMemory> peers, size_t trace_spans, bool check_finite)
    : device_(device),
      rank_(rank),
      program_(program),
      memory_(memory),
      constants_(constants),
      communicators_(std::move(communicators)),
      peers_(std::move(peers)),
      host_workspace_(cpu::workspace_bytes(program)),
      rows_of_experts_(constants.model),
      spans_(trace_spans, [this](size_t event, Stream stream) {
        check(cudaEventRecord(span_events_[event], streams_[static_cast<size_t>(stream)]),
              "recording an event");
      }) {
  // Sleeps between polls of the GPU, which waits for the host's plans, would last 50 us longer.
  prctl(PR_SET_TIMERSLACK, kTimerSlack);
  // What others wait for gets free multiprocessors before what computes.
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities");
  for (size_t s = 0; s < streams_.size(); ++s)
    check(cudaStreamCreateWithPriority(&streams_[s], cudaStreamNonBlocking,
                                       static_cast<Stream>(s) == Stream::compute ? least : greatest),
          "a stream");

  // Tables and constants of the device.
  const size_t table = constants.rope.cos.size() * sizeof(float);
  rope_tables_ = device_bytes(static_cast<int64_t>(2 * table), "the rotary tables");
  cos_ = reinterpret_cast<const float*>(rope_tables_.get());
  sin_ = reinterpret_cast<const float*>(rope_tables_.get() + table);
  check(cudaMemcpy(rope_tables_.get(), constants.rope.cos.data(), table, cudaMemcpyHostToDevice),
        "the rotary tables");
  check(cudaMemcpy(rope_tables_.get() + table, constants.rope.sin.data(), table, cudaMemcpyHostToDevice),
        "the rotary tables");
  std::vector<int32_t> identity(static_cast<size_t>(program.round_rows));
  for (size_t i = 0; i < identity.size(); ++i) identity[i] = static_cast<int32_t>(i);
  identity_ = device_bytes(static_cast<int64_t>(identity.size() * 4), "an index");
  check(cudaMemcpy(identity_.get(), identity.data(), identity.size() * 4, cudaMemcpyHostToDevice),
        "an index");
  flags_ = device_bytes(kFlags * 4, "flags");
  host_flags_ = pinned_bytes(kFlags * 4, "flags");
  const std::array<int32_t, kFlags> clear{INT32_MAX, INT32_MAX, 0};
  check(cudaMemcpy(flags_.get(), clear.data(), sizeof clear, cudaMemcpyHostToDevice), "flags");

  // What operations need beside their operands.
  int64_t counts = 0, tokens = 0;
  adam_jobs_.resize(program.ops.size());
  std::vector<std::pair<const std::byte*, int64_t>> plans;
  for (program::OpId id = 0; id < program.ops.size(); ++id) {
    const program::Op& op = program.ops[id];
    names_.push_back(program.op_name(id));
    const std::vector<Operand> operands = operands_of(op);
    const size_t reads = reads_of(op);
    const std::span all(operands);
    need_scratch(op.stream, scratch_of(op, all.first(reads), all.subspan(reads), 0));
    if (op.kind == OpKind::plan_routing) {
      HostPlan& plan = plans_[operands[reads].data];
      plan.plan.resize(static_cast<size_t>(bytes_of(operands[reads])) + 64);
      plans.emplace_back(operands[reads].data, bytes_of(operands[0]));
      counts += bytes_of(operands[0]);
    }
    if (op.kind == OpKind::next_batch) {
      int64_t bytes = 8;
      for (size_t i = reads; i < operands.size(); ++i) bytes += bytes_of(operands[i]);
      batches_[op.does.a] = {reinterpret_cast<std::byte*>(tokens), nullptr};
      documents_[operands[reads + 3].data] = 0;
      tokens += (bytes + 63) / 64 * 64;
    }
    if (op.kind == OpKind::adam_host) adam_jobs_[id] = std::make_unique<AdamJob>();
  }
  pinned_counts_ = pinned_bytes(counts, "expert counts");
  std::byte* at = pinned_counts_.get();
  for (const auto& [where, bytes] : plans) {
    plans_[where].counts = at;
    at += bytes;
  }
  pinned_batches_ = pinned_bytes(tokens, "a step's tokens");
  for (auto& [micro, batch] : batches_) {
    batch.first = pinned_batches_.get() + reinterpret_cast<intptr_t>(batch.first);
    check(cudaEventCreateWithFlags(&batch.second, cudaEventDisableTiming), "an event");
  }
  flows_.reserve(4096);
  groups_.reserve(1024);
  added_groups_.reserve(1024);
  expert_rows_.reserve(1024);
  biases_.reserve(1024);
  d_biases_.reserve(1024);
  span_events_.resize(2 * trace_spans);
  for (cudaEvent_t& event : span_events_) check(cudaEventCreate(&event), "an event");
  if (trace_spans > 0) check(cudaEventCreate(&trace_start_), "an event");
  if (check_finite) {
    finite_ = std::make_unique<FiniteWatch>(program, rank);
    for (int s = 0; s < program::kStreams; ++s)
      need_scratch(static_cast<Stream>(s), kernels::kSquareSumScratch);
  }
  prepare_experts();
  check(cudaDeviceSynchronize(),
        "constants of the device");  // streams that do not block would not wait for their copies
  clock_.look(streams_[static_cast<size_t>(Stream::compute)]);
}

// In the first slot of every buffer.
std::vector<Operand> Rank::operands_of(const program::Op& op) const {
  std::vector<Operand> all;
  for (const program::Use& use : program_.operands(op))
    all.push_back(
        {use.buffer == program::kNoBuffer ? nullptr : memory_.at(use.buffer, 0) + use.view.offset, use.view});
  return all;
}

size_t Rank::reads_of(const program::Op& op) const {
  return static_cast<size_t>(std::ranges::count(program_.operands(op), false, &program::Use::write));
}

void Rank::need_scratch(Stream stream, int64_t bytes) {
  const auto s = static_cast<size_t>(stream);
  if (bytes <= scratch_bytes_[s]) return;
  check(cudaStreamSynchronize(streams_[s]), "what uses a stream's workspace");
  scratch_[s].reset();
  scratch_[s] = device_bytes(bytes, "a stream's workspace");
  workspace_bytes_ += bytes - scratch_bytes_[s];
  scratch_bytes_[s] = bytes;
}

Rank::~Rank() {
  cudaSetDevice(device_);
  for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  for (const auto& [micro, batch] : batches_) cudaEventDestroy(batch.second);
  for (cudaEvent_t event : span_events_) cudaEventDestroy(event);
  if (trace_start_ != nullptr) cudaEventDestroy(trace_start_);
}

void Rank::reserve(uint32_t events) {
  for (uint32_t i = 0; i < events; ++i) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
    events_.push_back(event);
  }
  recorded_.assign(events, false);
}

void Rank::record(Stream stream, uint32_t event) {
  check(cudaEventRecord(events_[event], streams_[static_cast<size_t>(stream)]), "recording an event");
  recorded_[event] = true;
}

void Rank::wait(Stream stream, uint32_t event) {
  if (!recorded_[event]) return;
  if (stream == Stream::compute) spans_.end_run();
  check(cudaStreamWaitEvent(streams_[static_cast<size_t>(stream)], events_[event], 0),
        "waiting for an event");
}

void Rank::launch(Stream stream, const Launch& launch) {
  cudaStream_t queue = streams_[static_cast<size_t>(stream)];
  const std::optional<size_t> span = spans_.begin(launch.call.id, *launch.call.op);
  nvtxRangePushA(names_[launch.call.id].c_str());
  // What the CPU does in a stream's turn is no activity of the GPU's.
  const bool recorded = recorder_.on() && span && launch.call.op->kind != OpKind::adam_host;
  if (recorded) recorder_.begin(*span);
  try {
    if (program::is_collective(launch.call.op->kind))
      run_exchange(launch.call, queue);
    else
      run_local(launch, queue);
  } catch (const UserError&) {
    throw;
  } catch (const std::exception& error) {
    throw InternalError(fmt::format("rank {}, operation {} ({}): {}", rank_, launch.call.id,
                                    program_.op_name(launch.call.id), error.what()));
  }
  if (recorded) recorder_.end();
  nvtxRangePop();
  if (finite_) finite_->after(launch, scratch(stream), queue);
  spans_.end();
}

// Of the events of this step; any change of it is progress.
size_t Rank::completed() const {
  size_t count = 0;
  for (size_t i = 0; i < events_.size(); ++i)
    if (recorded_[i] && cudaEventQuery(events_[i]) == cudaSuccess) ++count;
  cudaGetLastError();
  return count;
}

// Polls, since a peer that is gone would let the GPU and any blocking call wait for ever.
template <class Done>
void Rank::wait_until(const Done& done) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point progress = Clock::now(), next_look = progress + std::chrono::seconds(1);
  size_t before = 0;
  for (int64_t polls = 0;; ++polls) {
    const cudaError_t status = done();
    if (status == cudaSuccess) return;
    if (status != cudaErrorNotReady) check(status, "waiting for the GPU");
    cudaGetLastError();  // not ready is no error, though it may be kept as the last one
    if (polls > 1000) std::this_thread::sleep_for(std::chrono::microseconds(2));
    if (Clock::now() < next_look) continue;
    next_look = Clock::now() + std::chrono::seconds(1);
    communicators_->check_health();
    if (const size_t now = completed(); now != std::exchange(before, now)) progress = Clock::now();
    if (Clock::now() - progress > kPatience)
      throw interpreter::Stalled(fmt::format(
          "rank {}: no progress for {} s{}: another rank may hang, or the network between them", rank_,
          std::chrono::duration_cast<std::chrono::seconds>(kPatience).count(), unfinished()));
  }
}

// The first operation that has not ended, or those that one span is of, where times are kept.
std::string Rank::unfinished() const {
  for (size_t i = 0; i < spans_.spans().size(); ++i)
    if (spans_.has_events(i) && cudaEventQuery(span_events_[2 * i + 1]) == cudaErrorNotReady) {
      const program::OpId id = spans_.spans()[i].op;
      return fmt::format(" in operation {} ({}){}", id, program_.op_name(id),
                         spans_.alone(program_.ops[id]) ? "" : ", or one behind it on the compute stream");
    }
  return {};
}

int64_t Rank::rounds(uint32_t event, const Call& plan) {
  spans_.end_run();
  wait_until([&] { return cudaEventQuery(events_[event]); });
  // The same code as on the CPU, on the host's copies.
  Operand counts = plan.in[0], rounds = on_host(plan.out[0]);
  counts.data = plans_.at(plan.out[0].data).counts;
  const std::array in{counts}, out{rounds};
  Call call = plan;
  call.in = in;
  call.out = out;
  cpu::run_routed(call, constants_, host_workspace_);
  const plan::RoundPlan& made = cpu::round_plan(rounds);
  rows_of_experts_.add(plan.op->layer, made.counts());
  return std::max<int64_t>(1, made.rounds());
}

void Rank::synchronize() {
  spans_.end_run();
  for (cudaStream_t stream : streams_) wait_until([&] { return cudaStreamQuery(stream); });
  clock_.look(streams_[static_cast<size_t>(Stream::compute)]);
  if (finite_) finite_->look();
  std::array<int32_t, kFlags> flags{};
  check(cudaMemcpy(flags.data(), flags_.get(), sizeof flags, cudaMemcpyDeviceToHost), "flags");
  if (flags[0] != INT32_MAX)
    throw UserError(fmt::format(
        "token {} of rank {} is beyond the vocabulary; the data is of another tokenizer", flags[0], rank_));
  if (flags[1] != INT32_MAX)
    throw UserError(fmt::format(
        "target {} of rank {} is beyond the vocabulary; the data is of another tokenizer", flags[1], rank_));
  if (flags[2] != 0) throw UserError(fmt::format("the gradient norm is not finite (rank {})", rank_));
}

std::optional<std::string> Rank::first_not_finite() const {
  return finite_ && finite_->first() ? std::optional(finite_->first()->what) : std::nullopt;
}

std::vector<program::OpSpan> Rank::trace() const {
  std::vector<program::OpSpan> all;
  for (const SpanLog::Span& span : spans_.spans()) {
    float start = 0, end = 0;
    check(cudaEventElapsedTime(&start, trace_start_, span_events_[2 * span.run]), "a time");
    check(cudaEventElapsedTime(&end, trace_start_, span_events_[2 * span.run + 1]), "a time");
    const auto begun = static_cast<int64_t>(static_cast<double>(start) * 1e6),
               ended = static_cast<int64_t>(static_cast<double>(end) * 1e6);
    all.push_back({span.op, begun, ended, ended - begun});
  }
  return all;
}

std::vector<program::OpSpan> Rank::profiled_trace() {
  std::vector<program::OpSpan> all = trace();
  std::vector<Activity> activities = recorder_.activities();
  timed_by_cupti_ = !activities.empty();
  if (!timed_by_cupti_) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (spans_.has_events(i)) continue;
      kernels::fallback("operations are not timed: CUPTI was on and recorded none of them");
      return {};
    }
    return all;
  }
  if (recorder_.lost() > 0)
    kernels::fallback("CUPTI lost some kernels or copies: their operations look shorter than they were");
  std::vector<bool> ran(all.size());
  for (const Activity& a : activities)
    if (a.launch < ran.size()) ran[a.launch] = true;
  refine(all, std::move(activities));
  for (size_t i = 0; i < all.size(); ++i)  // it had nothing to do
    if (!ran[i] && program_.ops[all[i].op].stream != Stream::host) all[i].start = all[i].end, all[i].busy = 0;
  return all;
}

void Rank::clear_trace() {
  spans_.clear();
  recorder_.clear();
  if (trace_start_ != nullptr) {
    check(cudaSetDevice(device_), "the device");
    check(cudaEventRecord(trace_start_, streams_[0]), "recording an event");
  }
}

void Rank::profile(bool on) {
  if (span_events_.empty()) return;
  if (on) {
    recorder_.start();
    // CUPTI makes its buffers with the first kernel.
    clock_.look(streams_[static_cast<size_t>(Stream::compute)]);
  } else {
    recorder_.stop();
  }
  spans_.set(on, on && !recorder_.on());
}

}  // namespace mop::cuda
