#include <array>
#include <atomic>

#include "exec/cpu/backend.h"
#include "exec/cpu/kernels.h"
#include "exec/cpu/routing.h"
#include "exec/cpu/workspace.h"
#include "exec/interpreter/interpreter.h"
#include "exec/train/machine.h"

namespace mop::train {
namespace {

using interpreter::Launch;

class CpuMachine final : public Machine {
 public:
  CpuMachine(const Prepared& prepared, const MachineOptions& options) : prepared_(prepared) {
    const Job& job = prepared.job;
    const program::StepProgram& program = prepared.program;
    const int64_t workspace = cpu::workspace_bytes(program);
    memory_.reserve(static_cast<size_t>(job.ranks));
    for (int64_t r = 0; r < job.ranks; ++r) {
      Rank& rank = *ranks_.emplace_back(std::make_unique<Rank>(prepared));
      memory_.emplace_back(program, prepared.memory, rank.hbm.data(), rank.host.data());
      if (options.check_guards || options.check_finite)
        rank.checks = std::make_unique<interpreter::Checks>(program, memory_.back(), r, options.check_finite);
      for (const program::Op& op : program.ops)
        if (auto& mine = rank.workspaces[static_cast<size_t>(op.stream)]; mine == nullptr) {
          mine = std::make_unique<cpu::Workspace>(workspace);
          rank.workspace_bytes += workspace;
        }
    }
    const auto constants = std::make_shared<cpu::Constants>(
        cpu::Constants{job.model, model::make_rope(job.model, job.workload.context), prepared.least_loaded(),
                       program.round_rows, static_cast<int>(job.plan.spill_slots)});
    const auto mine = [this](int rank, program::Stream stream) -> cpu::Workspace& {
      return *ranks_[static_cast<size_t>(rank)]->workspaces[static_cast<size_t>(stream)];
    };
    cpu::Kernels kernels;
    kernels.run = [constants, mine](int rank, program::Stream stream, const Launch& launch) {
      cpu::run(launch.call, *constants, launch.step, mine(rank, stream));
    };
    kernels.run_collective = [mine](int rank, program::Stream stream, const Launch& launch,
                                    cpu::Meeting& meeting) {
      cpu::run_collective(launch.call, meeting, mine(rank, stream));
    };
    kernels.rounds = [this](const cpu::Call& plan) {
      const plan::RoundPlan& rounds = cpu::round_plan(plan.out[0]);
      const std::lock_guard lock(expert_rows_mutex_);
      expert_rows_.add(plan.op->layer, rounds.counts());
      return int64_t{rounds.rounds()};
    };
    cpu::WorldOptions world;
    if (options.trace) world.trace_spans = interpreter::most_launches(program);
    if (ranks_.front()->checks)
      for (const auto& rank : ranks_) world.checks.push_back(rank->checks.get());
    world_ = std::make_unique<cpu::World>(
        std::vector<const program::StepProgram*>(static_cast<size_t>(job.ranks), &program),
        std::move(kernels), world);
  }
  ~CpuMachine() override { world_.reset(); }  // its threads use the rest

  std::ranges::iota_view<int, int> ranks() const override { return {0, static_cast<int>(ranks_.size())}; }
  launch::Peers& peers() override { return *peers_; }
  const interpreter::Memory& memory(int rank) const override { return memory_[static_cast<size_t>(rank)]; }
  interpreter::Backend& backend(int rank) override { return world_->backend(rank); }
  void run(const std::function<void(int)>& body) override { world_->run(body); }
  void read(int, const std::byte* from, std::byte* to, int64_t bytes) const override {
    std::copy_n(from, bytes, to);
  }
  void write(int, std::byte* to, const std::byte* from, int64_t bytes) override {
    std::copy_n(from, bytes, to);
  }
  std::vector<program::OpSpan> trace(int rank) const override { return world_->trace(rank); }
  void clear_trace() override { world_->clear_trace(); }
  bool timed_by_events() const override { return false; }
  void profile(bool) override {}
  double take_expert_imbalance() override {
    const std::lock_guard lock(expert_rows_mutex_);
    return expert_rows_.end_step();
  }
  const std::vector<std::vector<int64_t>>& expert_rows() const override {
    return expert_rows_.of_last_step();
  }
  double clock_hz() const override { return 0; }
  int64_t workspace_bytes() const override { return ranks_.front()->workspace_bytes; }
  int64_t device_bytes_in_use() const override { return 0; }

  std::optional<std::string> first_not_finite() const override {
    std::optional<interpreter::NotFinite> first;
    for (const auto& rank : ranks_)
      if (rank->checks)
        if (const auto found = rank->checks->first_not_finite();
            found && (!first || found->issue < first->issue))
          first = found;
    return first ? std::optional(first->what) : std::nullopt;
  }

 private:
  struct Rank {
    explicit Rank(const Prepared& p) : hbm(p.memory.arenas.hbm.bytes), host(p.memory.arenas.host.bytes) {}
    interpreter::HostBytes hbm, host;
    std::unique_ptr<interpreter::Checks> checks;
    std::array<std::unique_ptr<cpu::Workspace>, program::kStreams> workspaces;
    int64_t workspace_bytes = 0;
  };
  const Prepared& prepared_;
  const std::unique_ptr<launch::Peers> peers_ = launch::alone();
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<interpreter::Memory> memory_;
  std::mutex expert_rows_mutex_;
  cpu::ExpertRows expert_rows_{prepared_.job.model};
  std::unique_ptr<cpu::World> world_;
};

}  // namespace

std::unique_ptr<Machine> make_cpu_machine(const Prepared& prepared, const MachineOptions& options) {
  return std::make_unique<CpuMachine>(prepared, options);
}

}  // namespace mop::train
