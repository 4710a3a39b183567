#include <fmt/format.h>

#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "exec/cuda/rank.h"
#include "exec/train/machine.h"
#include "kernels/check.h"
#include "sim/base/error.h"
#include "sim/base/quantity.h"

namespace mop::train {
namespace {

using kernels::check;

// Ranks of one process, a GPU and a thread each.
class CudaMachine final : public Machine {
 public:
  CudaMachine(const Prepared& prepared, const MachineOptions& options)
      : constants_{prepared.job.model, model::make_rope(prepared.job.model, prepared.job.workload.context),
                   prepared.least_loaded(), prepared.program.round_rows,
                   static_cast<int>(prepared.job.plan.spill_slots)} {
    const auto ranks = static_cast<size_t>(prepared.job.ranks);
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      cudaGetLastError();
      throw UserError("no GPU is found (or its driver is too old for this CUDA); run without --gpus on the CPU");
    }
    if (ranks > static_cast<size_t>(devices))
      throw UserError(fmt::format("--gpus is {}, and this host has {}", ranks, devices));
    const program::StepProgram& program = prepared.program;
    std::map<cuda::GroupKey, ncclUniqueId> ids;
    for (const cuda::GroupKey& key : cuda::group_keys(program, prepared.job.ranks))
      cuda::check(ncclGetUniqueId(&ids[key]), "ncclGetUniqueId");
    hbm_.resize(ranks);
    host_.resize(ranks);
    ranks_.resize(ranks);
    memory_.reserve(ranks);
    for (size_t r = 0; r < ranks; ++r) {
      check(cudaSetDevice(static_cast<int>(r)), "the device");
      hbm_[r] = cuda::device_bytes(prepared.memory.arenas.hbm.bytes, "the arena of a rank");
      host_[r] = cuda::pinned_bytes(prepared.memory.arenas.host.bytes, "the host arena of a rank");
      check(cudaMemset(hbm_[r].get(), 0, static_cast<size_t>(prepared.memory.arenas.hbm.bytes)), "the arena");
      memory_.emplace_back(program, prepared.memory, hbm_[r].get(), host_[r].get());
    }
    const size_t spans = options.trace ? 4 * program.ops.size() + 4096 : 0;
    run([&](int r) {
      const auto rank = static_cast<size_t>(r);
      ranks_[rank] = std::make_unique<cuda::Rank>(r, r, program, memory_[rank], constants_,
                                                  std::make_unique<cuda::Communicators>(program, r, ids), spans);
    });
  }

  const interpreter::Memory& memory(int rank) const override { return memory_[static_cast<size_t>(rank)]; }
  interpreter::Backend& backend(int rank) override { return *ranks_[static_cast<size_t>(rank)]; }

  void run(const std::function<void(int)>& body) override {
    std::exception_ptr first;
    std::mutex mutex;
    std::vector<std::jthread> threads;
    for (int r = 0; r < static_cast<int>(ranks_.size()); ++r)
      threads.emplace_back([&, r] {
        try {
          check(cudaSetDevice(r), "the device");
          body(r);
        } catch (...) {
          const std::lock_guard lock(mutex);
          if (!first) first = std::current_exception();
        }
      });
    threads.clear();
    if (first) std::rethrow_exception(first);
  }

  void read(int rank, const std::byte* from, std::byte* to, int64_t bytes) const override {
    check(cudaSetDevice(rank), "the device");
    check(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault), "a copy");
  }
  void write(int rank, std::byte* to, const std::byte* from, int64_t bytes) override {
    check(cudaSetDevice(rank), "the device");
    check(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault), "a copy");
  }
  std::vector<program::OpSpan> trace(int rank) const override { return ranks_[static_cast<size_t>(rank)]->trace(); }
  void clear_trace() override {
    for (const auto& rank : ranks_) rank->clear_trace();
  }
  int64_t workspace_bytes() const override { return ranks_.front()->workspace_bytes(); }
  std::optional<std::string> first_not_finite() const override { return std::nullopt; }

 private:
  const cpu::Constants constants_;
  std::vector<cuda::DeviceBytes> hbm_;
  std::vector<cuda::PinnedBytes> host_;
  std::vector<interpreter::Memory> memory_;
  std::vector<std::unique_ptr<cuda::Rank>> ranks_;
};

}  // namespace

std::unique_ptr<Machine> make_cuda_machine(const Prepared& prepared, const MachineOptions& options) {
  return std::make_unique<CudaMachine>(prepared, options);
}

}  // namespace mop::train
