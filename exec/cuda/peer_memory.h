// The memory of the other GPUs of this host, mapped by CUDA IPC: all-gathers and reduce-scatters by copy
// engines, which leave the multiprocessors to whatever computes beside them.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "exec/cuda/memory.h"
#include "exec/interpreter/call.h"
#include "exec/launch/peers.h"
#include "kernels/matrix.h"
#include "sim/plan/plan.h"
#include "sim/program/program.h"

namespace mop::cuda {

class PeerMemory {
 public:
  // Collective over all ranks of the run, of which peers has one a process. arena: of this rank, from
  // cudaMalloc, laid out alike on all ranks. The device is current. What stands in the way of ranks of one
  // host is logged as a fallback.
  PeerMemory(const program::StepProgram& program, std::byte* arena, launch::Peers& peers);
  // The same for any exchanges; reducing: groups that reduce as well.
  PeerMemory(std::byte* arena, const std::vector<plan::Span>& reducing, launch::Peers& peers);
  ~PeerMemory();  // collective, too, unless an exception is under way
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Whether the operation can run here; else it is NCCL's. The same answer on all ranks of its group.
  bool takes(const program::StepProgram& program, const program::Op& op) const;
  // An all-gather or a reduce-scatter (sums in fp32, in the order of the ranks). Every rank of the group must
  // come, in the same order of calls, which are all on one stream.
  void run(const interpreter::Call& call, const plan::Span& group, cudaStream_t queue);

  bool reaches(const plan::Span& group) const;
  // out: in the arena, everyone's `bytes` from in.
  void all_gather(const plan::Span& group, const std::byte* in, std::byte* out, int64_t bytes,
                  cudaStream_t queue);
  // out (1, n): this rank's part of the sum of everyone's in, (group, n) of `type`; added to it where asked.
  void reduce_scatter(const plan::Span& group, const std::byte* in, kernels::Type type,
                      const kernels::Matrix& out, bool accumulate, cudaStream_t queue);

 private:
  struct Peer {
    std::byte* arena = nullptr;  // null: out of reach
    std::byte* shared = nullptr;
    uint32_t calls = 0;  // with this rank
  };
  int64_t signal_bytes() const;
  uint32_t* signals(std::byte* shared) const { return reinterpret_cast<uint32_t*>(shared); }
  std::byte* landing(std::byte* shared) const { return shared + signal_bytes(); }

  // In a timeline the copies of one stream moved 180 GB/s, half of what the links carry: they go by several,
  // of their own.
  static constexpr int kLanes = 3;
  struct Lane {
    cudaStream_t stream = nullptr;
    cudaEvent_t done = nullptr;
  };
  // Writes bytes from from(i) to to(peer, i) for every other rank of the group, i its index. On the stream,
  // begins when all let this rank write, and ends when all have written here.
  template <class From, class To>
  void exchange(const plan::Span& group, int64_t bytes, const From& from, const To& to, cudaStream_t queue);

  launch::Peers& peers_;
  std::byte* const arena_;
  const int rank_, ranks_;
  DeviceBytes shared_;  // written by the peers: signals (2, ranks) u32, then the landing zone
  std::vector<Peer> all_;
  std::array<Lane, kLanes> lanes_{};
  Lane home_;  // what stays here is copied by multiprocessors: it waits for room among them, and the others
               // need not
  cudaEvent_t begun_ = nullptr;
  std::string obstacle_;  // why some rank of the run does not reach another of its host, the same on all;
                          // empty where all do
};

}  // namespace mop::cuda
