#include "exec/cuda/communicators.h"

#include <cstring>
#include <exception>
#include <tuple>

#include "kernels/check.h"

namespace mop::cuda {

void check(ncclResult_t status, const char* what) {
  if (status != ncclSuccess)
    throw kernels::CudaError(std::string(what) + ": " + ncclGetErrorString(status) + ", " + ncclGetLastError(nullptr));
}

namespace {

// A stream and the shape of the groups that meet there; with the lowest rank, one of these groups.
using Meeting = std::tuple<program::Stream, int64_t, int64_t>;
using Instance = std::pair<Meeting, int64_t>;

}  // namespace

Communicators::Communicators(const program::StepProgram& program, int64_t rank, int64_t ranks, launch::Peers& peers) {
  std::map<Meeting, plan::Span> meetings;
  for (const program::Op& op : program.ops)
    if (program::is_collective(op.kind)) {
      const plan::Span span = program.groups[op.group].span();
      meetings[{op.stream, span.size, span.stride}] = span;
    }
  // Process 0 gives every instance its id; all know the order.
  std::map<Instance, ncclUniqueId> ids;
  for (const auto& [meeting, span] : meetings)
    for (int64_t r = 0; r < ranks; ++r) ids[{meeting, span.base(r)}] = {};
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
  std::map<Meeting, ncclComm_t> made;
  for (const auto& [meeting, span] : meetings) {
    ncclComm_t comm = nullptr;
    check(ncclCommInitRank(&comm, static_cast<int>(span.size), ids.at({meeting, span.base(rank)}),
                           static_cast<int>(span.index(rank))),
          "ncclCommInitRank");
    all_.push_back(made[meeting] = comm);
  }
  for (const program::Op& op : program.ops)
    if (program::is_collective(op.kind)) {
      const plan::Span span = program.groups[op.group].span();
      by_use_[{op.group, op.stream}] = made.at({op.stream, span.size, span.stride});
    }
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
