// NCCL communicators of one rank: one for each group and stream of a program.
#pragma once
#include <nccl.h>

#include <map>
#include <memory>
#include <vector>

#include "sim/program/program.h"

namespace mop::cuda {

void check(ncclResult_t status, const char* what);

// What all ranks of a communicator have to agree on before it exists: an id a group instance.
using GroupKey = std::tuple<uint16_t, program::Stream, int64_t>;  // group, stream, lowest rank
std::vector<GroupKey> group_keys(const program::StepProgram& program, int64_t ranks);

class Communicators {
 public:
  // Collective over all ranks of the run: everyone constructs at the same time. ids: of all group_keys. The device is
  // current.
  Communicators(const program::StepProgram& program, int64_t rank, const std::map<GroupKey, ncclUniqueId>& ids);
  ~Communicators();
  Communicators(const Communicators&) = delete;
  Communicators& operator=(const Communicators&) = delete;

  ncclComm_t of(const program::Op& op) const { return all_.at({op.group, op.stream}); }

 private:
  std::map<std::pair<uint16_t, program::Stream>, ncclComm_t> all_;
};

}  // namespace mop::cuda
