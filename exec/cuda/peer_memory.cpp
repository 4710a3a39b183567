#include "exec/cuda/peer_memory.h"

#include <cuda.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>

#include "exec/cuda/operands.h"
#include "kernels/check.h"
#include "kernels/elementwise.h"
#include "kernels/fallback.h"
#include "sim/program/landing.h"

namespace mop::cuda {
namespace {

using interpreter::Call;
using kernels::check;
using program::OpKind;

constexpr int64_t kAlign = 256;
static_assert(program::kMostLanding <= kernels::kMostPieces);
constexpr size_t kText = 160;  // of an obstacle, as ranks tell one another
enum Stage { kReady, kWritten };

// Where rank `from` tells that it has come to the n-th exchange, or has written all of it.
int64_t signal_at(Stage stage, int ranks, int64_t from) {
  return int64_t{stage} * ranks + from;
}

// What a rank tells the others of itself.
struct Card {
  char host[64] = {};  // GPUs of one host reach one another; NCCL_HOSTID splits it, as it does for NCCL
  int device = 0;      // as this host counts them
  cudaUUID_t uuid{};
};
struct Handles {
  cudaIpcMemHandle_t arena{}, shared{};
};

// Of the driver, which this program is not linked to.
template <class F>
F driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  if (found == nullptr) throw kernels::CudaError(fmt::format("the GPU driver has no {}", name));
  return reinterpret_cast<F>(found);
}

void check_driver(CUresult status, const char* what) {
  if (status != CUDA_SUCCESS)
    throw kernels::CudaError(fmt::format("{}: driver error {}", what, static_cast<int>(status)));
}

void write_signal(cudaStream_t queue, uint32_t* where, uint32_t value) {
  static const auto write =
      driver<CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned)>("cuStreamWriteValue32");
  check_driver(write(queue, reinterpret_cast<CUdeviceptr>(where), value, CU_STREAM_WRITE_VALUE_DEFAULT),
               "writing a signal to another GPU");
}

void wait_for_signal(cudaStream_t queue, const uint32_t* where, uint32_t value) {
  static const auto wait =
      driver<CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned)>("cuStreamWaitValue32");
  check_driver(wait(queue, reinterpret_cast<CUdeviceptr>(where), value, CU_STREAM_WAIT_VALUE_GEQ),
               "waiting for another GPU's signal");
}

cudaIpcMemHandle_t handle_of(std::byte* memory) {
  cudaIpcMemHandle_t handle{};
  check(cudaIpcGetMemHandle(&handle, memory), "a handle for other processes");
  return handle;
}

Card card_of_this() {
  Card card;
  const char* name = std::getenv("NCCL_HOSTID");
  if (name != nullptr)
    std::strncpy(card.host, name, sizeof card.host - 1);
  else
    gethostname(card.host, sizeof card.host - 1);
  check(cudaGetDevice(&card.device), "the device");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, card.device), "the device");
  card.uuid = properties.uuid;
  return card;
}

// Of a GPU of this host as this process counts them, which may see fewer than there are.
std::optional<int> device_here(const Card& card) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "the devices");
  for (int device = 0; device < devices; ++device) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "a device");
    if (std::memcmp(&properties.uuid, &card.uuid, sizeof card.uuid) == 0) return device;
  }
  return std::nullopt;
}

std::byte* open(const cudaIpcMemHandle_t& handle) {
  void* memory = nullptr;
  if (cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess)
    return static_cast<std::byte*>(memory);
  cudaGetLastError();
  return nullptr;
}

std::vector<plan::Span> reducing_groups(const program::StepProgram& program) {
  std::vector<plan::Span> groups;
  for (const program::Op& op : program.ops)
    if (op.kind == OpKind::reduce_scatter && program::by_copy_engines(program, op))
      groups.push_back(program.groups[op.group].span());
  return groups;
}

}  // namespace

PeerMemory::PeerMemory(const program::StepProgram& program, std::byte* arena, launch::Peers& peers)
    : PeerMemory(arena, reducing_groups(program), peers) {}

PeerMemory::PeerMemory(std::byte* arena, const std::vector<plan::Span>& reducing, launch::Peers& peers)
    : peers_(peers),
      arena_(arena),
      rank_(peers.rank()),
      ranks_(peers.size()),
      all_(static_cast<size_t>(peers.size())) {
  const Card own = card_of_this();
  const std::vector<Card> cards = launch::everyones(peers_, own);
  const bool lands = std::ranges::any_of(reducing, [&](const plan::Span& group) {
    const int64_t base = group.base(rank_);
    for (int64_t i = 0; i < group.size; ++i)
      if (std::strcmp(cards[static_cast<size_t>(base + i * group.stride)].host, own.host) != 0) return false;
    return true;
  });
  shared_ = device_bytes(signal_bytes() + (lands ? program::kLandingBytes : 0),
                         "the landing zone of reduce-scatters");
  check(cudaMemset(shared_.get(), 0, static_cast<size_t>(signal_bytes())), "signals");
  check(cudaDeviceSynchronize(), "signals");
  const std::vector<Handles> handles =
      launch::everyones(peers_, Handles{handle_of(arena), handle_of(shared_.get())});
  check(cudaEventCreateWithFlags(&begun_, cudaEventDisableTiming), "an event");
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities");
  const auto make = [](Lane& lane, int priority) {
    check(cudaStreamCreateWithPriority(&lane.stream, cudaStreamNonBlocking, priority), "a stream");
    check(cudaEventCreateWithFlags(&lane.done, cudaEventDisableTiming), "an event");
  };
  for (Lane& lane : lanes_) make(lane, least);
  make(home_, greatest);
  std::array<char, kText> obstacle{};
  for (int rank = 0; rank < ranks_; ++rank) {
    const Card& card = cards[static_cast<size_t>(rank)];
    if (rank == rank_ || std::strcmp(card.host, own.host) != 0) continue;
    const std::optional<int> device = device_here(card);
    int can = device ? 0 : 1;  // of a GPU that this process does not see, only opening tells
    if (device) check(cudaDeviceCanAccessPeer(&can, own.device, *device), "access between GPUs");
    Peer& peer = all_[static_cast<size_t>(rank)];
    const Handles& given = handles[static_cast<size_t>(rank)];
    if (can != 0 && (peer.arena = open(given.arena)) != nullptr &&
        (peer.shared = open(given.shared)) != nullptr)
      continue;
    fmt::format_to_n(obstacle.data(), kText - 1, "GPU {} cannot write to GPU {} of {}", own.device,
                     card.device, card.host);
  }
  // All or none, since all ranks of a group must take the same way.
  for (const std::array<char, kText>& one : launch::everyones(peers_, obstacle))
    if (obstacle_.empty()) obstacle_ = one.data();
  if (!obstacle_.empty())
    kernels::fallback(("collectives by NCCL's kernels, not by copy engines: " + obstacle_).c_str());
}

PeerMemory::~PeerMemory() {
  const auto end = [](const Lane& lane) { cudaStreamDestroy(lane.stream), cudaEventDestroy(lane.done); };
  std::ranges::for_each(lanes_, end);
  end(home_);
  cudaEventDestroy(begun_);
  for (const Peer& peer : all_)
    for (std::byte* memory : {peer.arena, peer.shared})
      if (memory != nullptr) cudaIpcCloseMemHandle(memory);
  // What others have mapped may not be freed.
  if (std::uncaught_exceptions() == 0) peers_.barrier();
}

int64_t PeerMemory::signal_bytes() const {
  const auto bytes = static_cast<int64_t>(sizeof(uint32_t)) * 2 * ranks_;
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

bool PeerMemory::reaches(const plan::Span& group) const {
  if (!obstacle_.empty()) return false;
  const int64_t base = group.base(rank_);
  for (int64_t i = 0; i < group.size; ++i)
    if (const int64_t rank = base + i * group.stride;
        rank != rank_ && all_[static_cast<size_t>(rank)].arena == nullptr)
      return false;
  return true;
}

bool PeerMemory::takes(const program::StepProgram& program, const program::Op& op) const {
  return program::by_copy_engines(program, op) && reaches(program.groups[op.group].span());
}

void PeerMemory::run(const Call& call, const plan::Span& group, cudaStream_t queue) {
  const Operand &in = call.in[0], &out = call.out[0];
  if (call.op->kind == OpKind::all_gather) return all_gather(group, in.data, out.data, bytes_of(in), queue);
  const int64_t elements = out.view.elements();
  reduce_scatter(group, in.data, type_of(in.view.type),
                 {out.data, type_of(out.view.type), 1, elements, elements}, call.op->does.accumulate, queue);
}

template <class From, class To>
void PeerMemory::exchange(const plan::Span& group, int64_t bytes, const From& from, const To& to,
                          cudaStream_t queue) {
  const int64_t index = group.index(rank_), base = group.base(rank_);
  const uint32_t* const own = signals(shared_.get());
  // At any time each writes to another.
  const auto others = [&](const auto& body) {
    for (int64_t distance = 1; distance < group.size; ++distance) {
      const int64_t i = (index + distance) % group.size, rank = base + i * group.stride;
      Peer& peer = all_[static_cast<size_t>(rank)];
      body(peer, i, rank, peer.calls);
    }
  };
  if (group.size == 1) return;
  others([&](Peer& peer, int64_t, int64_t, uint32_t& calls) {
    write_signal(queue, signals(peer.shared) + signal_at(kReady, ranks_, rank_), ++calls);
  });
  // Every lane takes its part of what goes to each.
  check(cudaEventRecord(begun_, queue), "an exchange");
  const int64_t share = (bytes / kLanes + kAlign - 1) / kAlign * kAlign;
  for (int l = 0; l < kLanes; ++l) {
    const Lane& lane = lanes_[static_cast<size_t>(l)];
    const int64_t first = std::min(bytes, l * share),
                  some = l + 1 == kLanes ? bytes - first : std::min(share, bytes - first);
    if (some == 0) continue;
    check(cudaStreamWaitEvent(lane.stream, begun_, 0), "an exchange");
    others([&](Peer& peer, int64_t i, int64_t rank, uint32_t calls) {
      wait_for_signal(lane.stream, own + signal_at(kReady, ranks_, rank), calls);
      check(cudaMemcpyAsync(to(peer, i) + first, from(i) + first, static_cast<size_t>(some),
                            cudaMemcpyDeviceToDevice, lane.stream),
            "a copy to another GPU");
    });
    check(cudaEventRecord(lane.done, lane.stream), "an exchange");
    check(cudaStreamWaitEvent(queue, lane.done, 0), "an exchange");
  }
  others([&](Peer& peer, int64_t, int64_t, uint32_t calls) {
    write_signal(queue, signals(peer.shared) + signal_at(kWritten, ranks_, rank_), calls);
  });
  others([&](Peer&, int64_t, int64_t rank, uint32_t calls) {
    wait_for_signal(queue, own + signal_at(kWritten, ranks_, rank), calls);
  });
}

void PeerMemory::all_gather(const plan::Span& group, const std::byte* in, std::byte* out, int64_t bytes,
                            cudaStream_t queue) {
  std::byte* const home = out + group.index(rank_) * bytes;
  if (home != in) {
    check(cudaEventRecord(begun_, queue), "a shard");
    check(cudaStreamWaitEvent(home_.stream, begun_, 0), "a shard");
    check(cudaMemcpyAsync(home, in, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, home_.stream),
          "a shard");
    check(cudaEventRecord(home_.done, home_.stream), "a shard");
  }
  exchange(
      group, bytes, [&](int64_t) { return in; },
      [&](const Peer& peer, int64_t) { return peer.arena + (home - arena_); }, queue);
  if (home != in) check(cudaStreamWaitEvent(queue, home_.done, 0), "a shard");
}

void PeerMemory::reduce_scatter(const plan::Span& group, const std::byte* in, kernels::Type type,
                                const kernels::Matrix& out, bool accumulate, cudaStream_t queue) {
  const int64_t index = group.index(rank_), each = static_cast<int64_t>(kernels::size_of(type)),
                bytes = out.cols * each;
  const int64_t slot = program::landing_slot(group.size);
  // Where in the zone of rank `to` of the group rank `from` writes.
  const auto slot_of = [&](int64_t from, int64_t to) {
    return (from - to - 1 + group.size) % group.size * slot;
  };
  for (int64_t first = 0; first < bytes; first += slot) {
    const int64_t some = std::min(slot, bytes - first), elements = some / each;
    exchange(
        group, some, [&](int64_t i) { return in + i * bytes + first; },
        [&](const Peer& peer, int64_t i) { return landing(peer.shared) + slot_of(index, i); }, queue);
    kernels::SumPiecesArgs sum{{}, static_cast<int>(group.size), type, {}, accumulate};
    for (int64_t i = 0; i < group.size; ++i)
      sum.pieces[static_cast<size_t>(i)] =
          i == index ? in + i * bytes + first : landing(shared_.get()) + slot_of(i, index);
    sum.y = {
        static_cast<std::byte*>(out.data) + first / each * static_cast<int64_t>(kernels::size_of(out.type)),
        out.type, 1, elements, elements};
    kernels::sum_pieces(sum, queue);
  }
}

}  // namespace mop::cuda
