#include "exec/cuda/communicators.h"

#include <cstring>
#include <exception>
#include <tuple>

#include "kernels/check.h"
#include "sim/program/meetings.h"

namespace mop::cuda {

void check(ncclResult_t status, const char* what) {
  if (status != ncclSuccess)
    throw kernels::CudaError(std::string(what) + ": " + ncclGetErrorString(status) + ", " +
                             ncclGetLastError(nullptr));
}

Communicators::Communicators(const program::StepProgram& program, launch::Peers& peers,
                             const std::function<bool(const program::Op&)>& copied) {
  // Every group of a meeting has its id, here by its first rank; all know the order. Process 0 gives those
  // that any rank needs: where only some reach one another, others do not.
  using Key = std::tuple<program::Stream, int64_t, int64_t>;
  using Instance = std::pair<Key, int64_t>;
  const auto key = [](program::Stream stream, const plan::Span& span) {
    return Key{stream, span.size, span.stride};
  };
  std::map<Instance, size_t> places;
  for (const program::Meeting& meeting : program::meetings(program, [](const program::Op&) { return false; }))
    for (int64_t r = 0; r < peers.size(); ++r)
      places[{key(meeting.stream, meeting.span), meeting.span.base(r)}] = 0;
  size_t count = 0;
  for (auto& [instance, place] : places) place = count++;
  const std::vector<program::Meeting> own = program::meetings(program, copied);
  std::vector<std::byte> needed(count);
  for (const program::Meeting& meeting : own)
    needed[places.at({key(meeting.stream, meeting.span), meeting.span.base(peers.rank())})] = std::byte{1};
  std::vector<ncclUniqueId> ids(count);
  for (const std::vector<std::byte>& one : peers.gather(needed))
    for (size_t i = 0; i < count; ++i) needed[i] |= one[i];
  if (peers.rank() == 0)
    for (size_t i = 0; i < count; ++i)
      if (needed[i] != std::byte{0}) check(ncclGetUniqueId(&ids[i]), "ncclGetUniqueId");
  const std::vector<std::byte> heard = peers.broadcast(std::as_bytes(std::span(ids)));
  if (count > 0) std::memcpy(ids.data(), heard.data(), heard.size());
  // In the same order on every rank: each call waits for its group.
  std::map<Key, ncclComm_t> made;
  for (const program::Meeting& meeting : own) {
    const program::Stream stream = meeting.stream;
    const plan::Span& span = meeting.span;
    ncclComm_t comm = nullptr;
    check(ncclCommInitRank(&comm, static_cast<int>(span.size),
                           ids[places.at({key(stream, span), span.base(peers.rank())})],
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
