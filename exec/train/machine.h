// What a trainer runs on: the ranks of this process with their memory and their queues, on the CPU or on a
// GPU, and the other processes of the run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ranges>
#include <string>
#include <vector>

#include "exec/host/rates.h"
#include "exec/interpreter/backend.h"
#include "exec/interpreter/memory.h"
#include "exec/launch/peers.h"
#include "exec/train/job.h"
#include "sim/program/timeline.h"

namespace mop::train {

class Machine {
 public:
  virtual ~Machine() = default;

  // Those of this process; every `rank` below is one of them.
  virtual std::ranges::iota_view<int, int> ranks() const = 0;
  // The processes that have the others. Collective calls on it are collective calls on whatever uses the
  // machine.
  virtual launch::Peers& peers() = 0;

  // Rank's arenas; addresses of the machine's own memory.
  virtual const interpreter::Memory& memory(int rank) const = 0;
  virtual interpreter::Backend& backend(int rank) = 0;

  // Calls body(rank) on a thread of every one of ranks() and waits for all. Errors: the first of any, in a
  // body or an operation; the machine is unusable then.
  virtual void run(const std::function<void(int rank)>& body) = 0;

  // Between the host and a rank's memory, while nothing runs.
  virtual void read(int rank, const std::byte* from, std::byte* to, int64_t bytes) const = 0;
  virtual void write(int rank, std::byte* to, const std::byte* from, int64_t bytes) = 0;

  // What a rank executed since the last clear_trace, by events around each operation or around those between
  // two waits; nothing where the machine keeps no trace. profiled_trace: the same of a profiled step, each
  // operation by itself, by what timed it; nothing where that could not be.
  virtual std::vector<program::OpSpan> trace(int rank) const = 0;
  virtual std::vector<program::OpSpan> profiled_trace(int rank) const { return trace(rank); }
  virtual void clear_trace() = 0;
  // Whether profiled_trace last had the times of events, whose busy counts waits for room as well.
  virtual bool timed_by_events() const = 0;
  // Between the two, CUPTI times the operations where there is a trace; or an attached profiler records (nsys
  // --capture-range=cudaProfilerApi), which leaves CUPTI to nobody else.
  virtual void profile(bool on) = 0;

  // Rows of the fullest expert over the mean of all, over an expert group: the worst layer since the last
  // call. 1: none.
  virtual double take_expert_imbalance() = 0;
  // By layer (empty for dense ones): rows of each expert that this was of, in forward and again in backward.
  // Of all groups that the ranks of this process are in, and as often as ranks of theirs are here.
  virtual const std::vector<std::vector<int64_t>>& expert_rows() const = 0;

  // Mean clock of the multiprocessors of this process's GPU in the last step; 0: no GPU, or no step before
  // it.
  virtual double clock_hz() const = 0;
  // Of this process's rank, where host memory has a part in the steps. Collective; between steps.
  virtual host::Rates host_rates() { return {}; }
  virtual int64_t workspace_bytes() const = 0;  // of a rank, beside its arenas
  // Memory of the GPU in use, whoever uses it: context, libraries and NCCL as well, but not CUPTI. 0: no GPU.
  virtual int64_t device_bytes_in_use() const = 0;
  // The first operation, in issue order, that made a number that is not finite, where somebody watched.
  virtual std::optional<std::string> first_not_finite() const = 0;
};

struct MachineOptions {
  bool trace = false;         // keep the operations' times of the last step
  bool check_guards = false;  // needs Prepared with guards
  bool check_finite = false;  // remember the first operation that makes a number that is not finite
  std::function<void(const std::string&)> say;  // of preparations that take seconds; may be missing
};

// All ranks in this process, each a few threads. Errors: UserError when the machine lacks the memory.
std::unique_ptr<Machine> make_cpu_machine(const Prepared& prepared, const MachineOptions& options);

// Rank place.rank on GPU place.local_rank of this host; peers: of the other ranks' processes. Collective. In
// builds with CUDA only. Errors: UserError for fewer GPUs than ranks, too little memory of the GPU or the
// host, libraries older than those built against.
std::unique_ptr<Machine> make_cuda_machine(const Prepared& prepared, const MachineOptions& options,
                                           const launch::Place& place, std::unique_ptr<launch::Peers> peers);

}  // namespace mop::train
