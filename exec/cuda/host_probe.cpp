#include "exec/cuda/host_probe.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <vector>

#include "exec/host/rewrite.h"
#include "kernels/check.h"

namespace mop::cuda {
namespace {

using kernels::check;
using program::Space;

constexpr int64_t kPiece = int64_t{64} << 20, kSlots = 4, kChunk = int64_t{1} << 30;
constexpr double kSeconds = 0.7;

class Watch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

double copies(const program::StepProgram& program, const interpreter::Memory& memory, int64_t host_bytes) {
  std::byte* device = nullptr;
  int64_t room = 0;
  for (program::BufferId b = 0; b < program.buffers.size(); ++b) {
    const program::Buffer& buffer = program.buffers[b];
    if (buffer.space != Space::hbm || buffer.persistent || buffer.first == program::kNoOp) continue;
    if (memory.slot_bytes(b) > room) room = memory.slot_bytes(b), device = memory.at(b, 0);
  }
  const int64_t piece =
      std::min({kPiece, host_bytes, room / kSlots / program::kAlignment * program::kAlignment});
  if (piece == 0) return 0;
  std::byte* const host = memory.base(Space::host);
  std::array<cudaStream_t, 2> streams{};
  std::array<std::array<cudaEvent_t, kSlots>, 2> events{};
  for (size_t way = 0; way < 2; ++way) {
    check(cudaStreamCreateWithFlags(&streams[way], cudaStreamNonBlocking), "a stream");
    for (cudaEvent_t& event : events[way])
      check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
  }
  const auto [up, down] = streams;
  int64_t copied = 0;
  const Watch watch;
  for (int64_t i = 0; i < kSlots || watch.seconds() < kSeconds; ++i) {
    const auto slot = static_cast<size_t>(i % kSlots);
    if (i >= kSlots) check(cudaEventSynchronize(events[1][slot]), "a copy");
    std::byte* const there = device + i % kSlots * piece;
    std::byte* const here = host + i % (host_bytes / piece) * piece;
    const auto bytes = static_cast<size_t>(piece);
    check(cudaMemcpyAsync(there, here, bytes, cudaMemcpyHostToDevice, up), "a copy");
    check(cudaEventRecord(events[0][slot], up), "an event");
    check(cudaStreamWaitEvent(down, events[0][slot], 0), "an event");
    check(cudaMemcpyAsync(here, there, bytes, cudaMemcpyDeviceToHost, down), "a copy");
    check(cudaEventRecord(events[1][slot], down), "an event");
    copied += 2 * piece;
  }
  check(cudaStreamSynchronize(down), "copies");
  const double seconds = watch.seconds();
  for (size_t way = 0; way < 2; ++way) {
    for (cudaEvent_t event : events[way]) cudaEventDestroy(event);
    cudaStreamDestroy(streams[way]);
  }
  return static_cast<double>(copied) / seconds;
}

// Of all states that the CPU updates.
double adam(const program::StepProgram& program, const interpreter::Memory& memory, int64_t least) {
  if (std::ranges::none_of(program.ops,
                           [](const program::Op& op) { return op.kind == program::OpKind::adam_host; }))
    return 0;
  std::vector<program::BufferId> states;
  int64_t bytes = 0;
  for (program::BufferId b = 0; b < program.buffers.size(); ++b) {
    const program::Buffer& buffer = program.buffers[b];
    if (buffer.space != Space::host || buffer.holds != program::Holds::optimizer_states) continue;
    states.push_back(b), bytes += memory.slot_bytes(b);
  }
  if (states.empty() || bytes < least) return 0;
  host::Workers& workers = host::Workers::of_process();
  int64_t moved = 0;
  const Watch watch;
  for (size_t i = 0; watch.seconds() < kSeconds; i = (i + 1) % states.size())
    for (int64_t at = 0, all = memory.slot_bytes(states[i]); at < all && watch.seconds() < kSeconds;
         at += kChunk) {
      const int64_t some = std::min(kChunk, all - at);
      host::rewrite(memory.at(states[i], 0) + at, some, workers);
      moved += 2 * some;
    }
  return static_cast<double>(moved) / watch.seconds();
}

}  // namespace

host::Rates probe_host(const program::StepProgram& program, const interpreter::Memory& memory,
                       int64_t host_bytes, launch::Peers& peers, int64_t least) {
  host::Rates rates;
  if (host_bytes < least) return rates;
  peers.barrier();
  rates.both_ways = copies(program, memory, host_bytes);
  peers.barrier();
  rates.adam = adam(program, memory, least);
  peers.barrier();
  return rates;
}

}  // namespace mop::cuda
