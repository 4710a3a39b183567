#include "exec/cuda/communicators.h"

#include <set>

#include "kernels/check.h"

namespace mop::cuda {

void check(ncclResult_t status, const char* what) {
  if (status != ncclSuccess)
    throw kernels::CudaError(std::string(what) + ": " + ncclGetErrorString(status) + ", " + ncclGetLastError(nullptr));
}

namespace {

int64_t base_of(int64_t rank, const program::Group& g) { return rank - rank / g.stride % g.size * g.stride; }

std::set<std::pair<uint16_t, program::Stream>> used(const program::StepProgram& program) {
  std::set<std::pair<uint16_t, program::Stream>> all;
  for (const program::Op& op : program.ops)
    if (program::is_collective(op.kind)) all.insert({op.group, op.stream});
  return all;
}

}  // namespace

std::vector<GroupKey> group_keys(const program::StepProgram& program, int64_t ranks) {
  std::set<GroupKey> keys;
  for (const auto& [group, stream] : used(program))
    for (int64_t r = 0; r < ranks; ++r) keys.insert({group, stream, base_of(r, program.groups[group])});
  return {keys.begin(), keys.end()};
}

Communicators::Communicators(const program::StepProgram& program, int64_t rank,
                             const std::map<GroupKey, ncclUniqueId>& ids) {
  // In the same order on every rank: each call waits for its group.
  for (const auto& [group, stream] : used(program)) {
    const program::Group& g = program.groups[group];
    ncclComm_t comm = nullptr;
    check(ncclCommInitRank(&comm, static_cast<int>(g.size), ids.at({group, stream, base_of(rank, g)}),
                           static_cast<int>(rank / g.stride % g.size)),
          "ncclCommInitRank");
    all_[{group, stream}] = comm;
  }
}

Communicators::~Communicators() {
  for (const auto& [key, comm] : all_) ncclCommDestroy(comm);
}

}  // namespace mop::cuda
