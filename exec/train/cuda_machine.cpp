#include <cuda_profiler_api.h>
#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <optional>
#include <thread>

#include "exec/cuda/devices.h"
#include "exec/cuda/host_probe.h"
#include "exec/cuda/libraries.h"
#include "exec/cuda/memory.h"
#include "exec/cuda/rank.h"
#include "exec/cuda/staging.h"
#include "exec/host/workers.h"
#include "exec/interpreter/interpreter.h"
#include "exec/train/machine.h"
#include "kernels/check.h"
#include "sim/base/error.h"
#include "sim/base/quantity.h"

namespace mop::train {
namespace {

using kernels::check;

// The rank of this process on its GPU.
class CudaMachine final : public Machine {
 public:
  CudaMachine(const Prepared& prepared, const MachineOptions& options, const launch::Place& place,
              std::unique_ptr<launch::Peers> peers)
      : peers_(std::move(peers)),
        program_(prepared.program),
        host_bytes_(prepared.memory.arenas.host.bytes),
        rank_(place.rank),
        device_(choose_device(place)),
        constants_{prepared.job.model, model::make_rope(prepared.job.model, prepared.job.workload.context),
                   prepared.least_loaded(), prepared.program.round_rows,
                   static_cast<int>(prepared.job.plan.spill_slots)} {
    const program::StepProgram& program = prepared.program;
    const program::Arenas& arenas = prepared.memory.arenas;
    const auto begin = std::chrono::steady_clock::now();
    const auto tell = [&](const std::string& what) {
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      if (options.say) options.say(fmt::format("{} after {}", what, format_seconds(taken.count())));
    };
    host_.emplace(arenas.host.bytes);  // pinned before NCCL starts
    tell(fmt::format("{} of host memory pinned", format_bytes(static_cast<double>(arenas.host.bytes))));
    hbm_ = cuda::device_bytes(arenas.hbm.bytes, "the arena of a rank");
    check(cudaMemset(hbm_.get(), 0, static_cast<size_t>(arenas.hbm.bytes)), "the arena");
    check(cudaDeviceSynchronize(), "the arena");
    tell("arena");
    memory_.emplace(program, prepared.memory, hbm_.get(), host_->data());
    staging_.emplace();
    auto peer_memory = std::make_unique<cuda::PeerMemory>(program, hbm_.get(), *peers_);
    tell("memory of the other GPUs");
    auto communicators = std::make_unique<cuda::Communicators>(
        program, *peers_, [&](const program::Op& op) { return peer_memory->takes(program, op); });
    tell("communicators");
    backend_ = std::make_unique<cuda::Rank>(
        device_, rank_, program, *memory_, constants_, std::move(communicators), std::move(peer_memory),
        options.trace ? interpreter::most_launches(program) : 0, options.check_finite);
  }

  std::ranges::iota_view<int, int> ranks() const override { return {rank_, rank_ + 1}; }
  launch::Peers& peers() override { return *peers_; }
  const interpreter::Memory& memory(int) const override { return *memory_; }
  interpreter::Backend& backend(int) override { return *backend_; }
  void run(const std::function<void(int)>& body) override { body(rank_); }
  void read(int, const std::byte* from, std::byte* to, int64_t bytes) const override {
    staging_->copy(to, from, bytes);
  }
  void write(int, std::byte* to, const std::byte* from, int64_t bytes) override {
    staging_->copy(to, from, bytes);
  }
  std::vector<program::OpSpan> trace(int) const override { return backend_->trace(); }
  std::vector<program::OpSpan> profiled_trace(int) const override { return backend_->profiled_trace(); }
  void clear_trace() override { backend_->clear_trace(); }
  bool timed_by_events() const override { return !backend_->timed_by_cupti(); }
  void profile(bool on) override {
    if (on) check(cudaProfilerStart(), "the profiler");  // first, as only one may have CUPTI
    const int64_t before = device_bytes_in_use();
    backend_->profile(on);
    cupti_bytes_ += device_bytes_in_use() - before;
    if (!on) check(cudaProfilerStop(), "the profiler");
  }
  double take_expert_imbalance() override { return backend_->expert_rows().end_step(); }
  const std::vector<std::vector<int64_t>>& expert_rows() const override {
    return backend_->expert_rows().of_last_step();
  }
  double clock_hz() const override { return backend_->clock_hz(); }
  host::Rates host_rates() override { return cuda::probe_host(program_, *memory_, host_bytes_, *peers_); }
  int64_t workspace_bytes() const override { return backend_->workspace_bytes(); }
  int64_t device_bytes_in_use() const override {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return static_cast<int64_t>(total - free) - cupti_bytes_;
  }
  std::optional<std::string> first_not_finite() const override { return backend_->first_not_finite(); }

 private:
  // Made current on this thread, the only one that launches.
  static int choose_device(const launch::Place& place) {
    const int devices = cuda::count_devices("run without --gpus on the CPU");
    // A launcher that shows each process one GPU has chosen already.
    const int device = devices == 1 && std::getenv("CUDA_VISIBLE_DEVICES") != nullptr ? 0 : place.local_rank;
    if (device >= devices)
      throw UserError(fmt::format("{} ranks are on this host, which has {} GPUs; start as many as GPUs",
                                  place.local_size, devices));
    cuda::use_device(device);
    // Launchers that bind no cores leave the processes of a host to share them.
    if (host::cores_of_process().size() == std::thread::hardware_concurrency())
      host::Workers::share_cores(place.local_rank, place.local_size);
    return device;
  }

  const std::unique_ptr<launch::Peers> peers_;
  const program::StepProgram& program_;
  const int64_t host_bytes_;
  const int rank_, device_;
  const cpu::Constants constants_;
  std::optional<cuda::PinnedSlab> host_;
  cuda::DeviceBytes hbm_;
  std::optional<interpreter::Memory> memory_;
  mutable std::optional<cuda::Staging> staging_;
  std::unique_ptr<cuda::Rank> backend_;
  int64_t cupti_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Machine> make_cuda_machine(const Prepared& prepared, const MachineOptions& options,
                                           const launch::Place& place, std::unique_ptr<launch::Peers> peers) {
  return std::make_unique<CudaMachine>(prepared, options, place, std::move(peers));
}

}  // namespace mop::train
