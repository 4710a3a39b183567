// One GPU as a backend: a CUDA stream for each stream of the program, kernels of kernels/, NCCL between
// ranks. What the interpreter launches is enqueued at once; nothing is allocated in a step.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "exec/cpu/kernels.h"
#include "exec/cpu/routing.h"
#include "exec/cpu/workspace.h"
#include "exec/cuda/activity_recorder.h"
#include "exec/cuda/communicators.h"
#include "exec/cuda/finite_watch.h"
#include "exec/cuda/memory.h"
#include "exec/cuda/peer_memory.h"
#include "exec/cuda/span_log.h"
#include "exec/cuda/step_clock.h"
#include "exec/interpreter/backend.h"
#include "exec/interpreter/memory.h"
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/grouped_matmul.h"
#include "kernels/matmul.h"
#include "kernels/routing.h"
#include "sim/plan/rounds.h"
#include "sim/program/timeline.h"

namespace mop::cuda {

using interpreter::Call;
using interpreter::Launch;
using interpreter::Operand;
using program::Stream;

class Rank final : public interpreter::Backend {
 public:
  // device: made current on the calling thread, which must be the one that launches. memory: zero, or of no
  // matter, as products of experts are tried in it. communicators, peers: of this rank. check_finite:
  // remember the first operation that makes a number that is not finite.
  Rank(int device, int rank, const program::StepProgram& program, const interpreter::Memory& memory,
       const cpu::Constants& constants, std::unique_ptr<Communicators> communicators,
       std::unique_ptr<PeerMemory> peers, size_t trace_spans, bool check_finite = false);
  ~Rank() override;

  void reserve(uint32_t events) override;
  void launch(Stream stream, const Launch& launch) override;
  void record(Stream stream, uint32_t event) override;
  void wait(Stream stream, uint32_t event) override;
  int64_t rounds(uint32_t event, const Call& plan) override;
  // Errors also: UserError for a token beyond the vocabulary, a gradient norm that is not finite,
  // interpreter::Stalled for a GPU that does not get on for ten minutes (names the operation, where times are
  // kept).
  void synchronize() override;

  int64_t workspace_bytes() const { return workspace_bytes_; }
  double clock_hz() const { return clock_.hz(); }  // of the multiprocessors, between the last two synchronize
  cpu::ExpertRows& expert_rows() { return rows_of_experts_; }
  // After synchronize; since clear_trace. By events, around runs of operations (exec/cuda/span_log.h);
  // profiled_trace: by CUPTI, where that is on, each operation by itself; empty where CUPTI was on and told
  // nothing.
  std::vector<program::OpSpan> trace() const;
  std::vector<program::OpSpan> profiled_trace();
  void clear_trace();
  // While on, operations are timed by CUPTI where that can be, not by events. Between steps.
  void profile(bool on);
  bool timed_by_cupti() const { return timed_by_cupti_; }  // what profiled_trace last gave
  // After synchronize, whether it threw or not.
  std::optional<std::string> first_not_finite() const;

 private:
  // ---- operations.cpp
  void run_local(const Launch& launch, cudaStream_t stream);
  void gemm(const Call& call, cudaStream_t stream);
  void attention(const Call& call, cudaStream_t stream);
  void cross_entropy(const Call& call, cudaStream_t stream);
  void adam(const Launch& launch, cudaStream_t stream);
  void adam_host(const Launch& launch, cudaStream_t stream);
  void copy_bytes(const Call& call, cudaStream_t stream);
  void next_batch(const Launch& launch, cudaStream_t stream);
  int64_t scratch_of(const program::Op& op, std::span<const Operand> in, std::span<const Operand> out,
                     int64_t documents);
  void make_room_for(int64_t documents);

  // ---- routed.cpp
  void run_routed(const Call& call, cudaStream_t stream);
  void run_exchange(const Call& call, cudaStream_t stream);
  void exchange_columns(const Call& call, cudaStream_t stream);
  void exchange_rows(const Call& call, cudaStream_t stream);
  void exchange_spilled(const Call& call, cudaStream_t stream);
  Operand on_host(const Operand& rounds) const;  // the same, where the CPU's routing code can read it
  const plan::RoundPlan& round_plan(const Operand& rounds) const;
  std::vector<kernels::Flow>& sent_flows(const Call& call, const Operand& rounds);
  std::span<const kernels::ExpertGroup> expert_groups(const Call& call, const Operand& rounds);
  // Experts whose gradients the round overwrites, by zeros where they have no rows, and adds to.
  struct GradientGroups {
    std::span<const kernels::ExpertGroup> written, added;
  };
  GradientGroups gradient_groups(const Call& call, const Operand& rounds);
  void weight_gradients(const Call& call, cudaStream_t stream);
  void bias_gradients(const Call& call, cudaStream_t stream);
  void prepare_experts();
  int64_t rows_of_round(const Call& call, const Operand& rounds) const;
  kernels::Activation activation_of(const program::Op& op) const;

  // What plan_routing leaves on the host, by the address of its `rounds`.
  struct HostPlan {
    std::byte* counts = nullptr;  // pinned, (ranks, experts) i32
    std::vector<std::byte> plan;  // aligned below: a little larger than the operand
  };
  struct AdamJob;  // of one adam_host operation

  std::vector<Operand> operands_of(const program::Op& op) const;
  size_t reads_of(const program::Op& op) const;
  void need_scratch(Stream stream, int64_t bytes);

  template <class Done>
  void wait_until(const Done& done);
  std::string unfinished() const;
  size_t completed() const;

  std::byte* scratch(Stream stream) const { return scratch_[static_cast<size_t>(stream)].get(); }

  const int device_, rank_;
  const program::StepProgram& program_;
  const interpreter::Memory memory_;
  const cpu::Constants& constants_;
  std::unique_ptr<Communicators> communicators_;
  std::unique_ptr<PeerMemory> peers_;
  cpu::Workspace host_workspace_;
  kernels::Matmul matmul_;
  kernels::GroupedMatmul grouped_;
  kernels::Attention attention_;
  std::vector<std::string> names_;  // of operations, for NVTX
  std::array<cudaStream_t, program::kStreams> streams_{};
  std::array<DeviceBytes, program::kStreams> scratch_;  // of whatever runs on the stream
  std::array<int64_t, program::kStreams> scratch_bytes_{};
  std::vector<cudaEvent_t> events_;
  std::vector<bool> recorded_;
  int64_t workspace_bytes_ = 0;
  cpu::ExpertRows rows_of_experts_;
  StepClock clock_;

  DeviceBytes rope_tables_, identity_, flags_;
  const float *cos_ = nullptr, *sin_ = nullptr;
  PinnedBytes host_flags_, pinned_counts_, pinned_batches_;
  std::map<const std::byte*, HostPlan> plans_;
  std::map<int64_t, std::pair<std::byte*, cudaEvent_t>>
      batches_;                                    // by micro-batch: pinned tokens, their copy
  std::map<const std::byte*, int64_t> documents_;  // of a batch, by its `starts`; 0: one a sequence
  int64_t most_documents_ = 0;
  std::vector<std::unique_ptr<AdamJob>> adam_jobs_;  // by operation
  std::vector<kernels::Flow> flows_;
  std::vector<kernels::ExpertGroup> groups_, added_groups_;
  std::vector<kernels::ExpertRows> expert_rows_;
  std::vector<const void*> biases_;
  std::vector<void*> d_biases_;
  std::vector<int64_t> first_of_expert_, computed_before_;
  std::vector<plan::WeightTransfer> spilled_;

  SpanLog spans_;
  std::vector<cudaEvent_t> span_events_;
  cudaEvent_t trace_start_ = nullptr;
  ActivityRecorder recorder_;
  bool timed_by_cupti_ = false;
  std::unique_ptr<FiniteWatch> finite_;
};

}  // namespace mop::cuda
