#include "exec/cuda/communicators.h"

#include <cstring>
#include <exception>
#include <tuple>

#include "kernels/check.h"
#include "sim/program/meetings.h"

namespace mop::cuda {

void check(ncclResult_t status, const char* what) {
  if (status != ncclSuccess)
    throw kernels::CudaError(std::string(what) + ": " + ncclGetErrorString(status) + ", " + ncclGetLastError(nullptr));
}

Communicators::Communicators(const program::StepProgram& program, int64_t ranks, launch::Peers& peers,
                             const std::function<bool(const program::Op&)>& copied) {
  // Process 0 gives every group of a meeting its id, here by its first rank; all know the order. Meetings of any rank: where
  // only some reach one another, the others need theirs.
  const std::vector<program::Meeting> possible = program::meetings(program, [](const program::Op&) { return false; }),
                                      own = program::meetings(program, copied);
  using Key = std::tuple<program::Stream, int64_t, int64_t>;
  const auto key = [](program::Stream stream, const plan::Span& span) { return Key{stream, span.size, span.stride}; };
  std::map<std::pair<Key, int64_t>, ncclUniqueId> ids;
  for (const program::Meeting& meeting : possible)
    for (int64_t r = 0; r < ranks; ++r) ids[{key(meeting.stream, meeting.span), meeting.span.base(r)}] = {};
  std::vector<ncclUniqueId> given;
  if (peers.rank() == 0)
    for (size_t i = 0; i < ids.size(); ++i) check(ncclGetUniqueId(&given.emplace_back()), "ncclGetUniqueId");
  const std::vector<std::byte> heard = peers.broadcast(std::as_bytes(std::span(given)));
  size_t at = 0;
  for (auto& [instance, id] : ids) {
    std::memcpy(&id, heard.data() + at, sizeof id);
    at += sizeof id;
  }
  // In the same order on every rank: each call waits for its group.
  std::map<Key, ncclComm_t> made;
  for (const auto& [stream, span, pairwise] : own) {
    ncclComm_t comm = nullptr;
    check(ncclCommInitRank(&comm, static_cast<int>(span.size), ids.at({key(stream, span), span.base(peers.rank())}),
                           static_cast<int>(span.index(peers.rank()))),
          "ncclCommInitRank");
    all_.push_back(made[key(stream, span)] = comm);
  }
  for (const program::Op& op : program.ops)
    if (program::is_collective(op.kind) && !copied(op))
      by_use_[{op.group, op.stream}] = made.at(key(op.stream, program.groups[op.group].span()));
}

Communicators::~Communicators() {
  for (ncclComm_t comm : all_) std::uncaught_exceptions() > 0 ? ncclCommAbort(comm) : ncclCommDestroy(comm);
}

void Communicators::check_health() const {
  for (ncclComm_t comm : all_) {
    ncclResult_t found = ncclSuccess;
    check(ncclCommGetAsyncError(comm, &found), "ncclCommGetAsyncError");
    check(found, "NCCL");
  }
}

}  // namespace mop::cuda
