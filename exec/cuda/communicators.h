// NCCL communicators of one rank: one for each meeting of its program (sim/program/meetings.h).
#pragma once
#include <nccl.h>

#include <functional>
#include <map>
#include <vector>

#include "exec/launch/peers.h"
#include "sim/program/program.h"

namespace mop::cuda {

// Errors: kernels::CudaError with NCCL's reason.
void check(ncclResult_t status, const char* what);

class Communicators {
 public:
  // Collective over all ranks of the run, of which peers has one a process. The device is current. copied:
  // whether NCCL is left out of an operation, the same on all ranks of its group.
  Communicators(const program::StepProgram& program, launch::Peers& peers,
                const std::function<bool(const program::Op&)>& copied);
  ~Communicators();  // collective, too, unless an exception is under way: then they are aborted
  Communicators(const Communicators&) = delete;
  Communicators& operator=(const Communicators&) = delete;

  ncclComm_t of(const program::Op& op) const { return by_use_.at({op.group, op.stream}); }
  // Errors: kernels::CudaError for what NCCL found out by itself, such as a peer that is gone.
  void check_health() const;

 private:
  std::vector<ncclComm_t> all_;
  std::map<std::pair<uint16_t, program::Stream>, ncclComm_t> by_use_;
};

}  // namespace mop::cuda
