// HBM outside of any buffer, as cudaMemGetInfo sees it come.
#include "exec/host/memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>

#include "exec/calibrate/benchmarks.h"
#include "exec/cuda/communicators.h"
#include "sim/base/quantity.h"
#include "sim/program/landing.h"

namespace mop::calibrate {
namespace {

constexpr int64_t kMoved = 64 << 20;

// One of a stream's own, as exec/cuda/communicators.h makes them; ends with the object. Of every `stride`th
// rank.
class Communicator {
 public:
  explicit Communicator(Bench& bench, int stride = 1) {
    for (int first = 0; first < stride; ++first) {
      ncclUniqueId id{};
      if (bench.rank() == 0) cuda::check(ncclGetUniqueId(&id), "ncclGetUniqueId");
      id = bench.from_first(id);
      if (bench.rank() % stride == first)
        cuda::check(ncclCommInitRank(&comm_, bench.ranks() / stride, id, bench.rank() / stride),
                    "ncclCommInitRank");
    }
  }
  ~Communicator() { std::uncaught_exceptions() > 0 ? ncclCommAbort(comm_) : ncclCommDestroy(comm_); }
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  ncclComm_t get() const { return comm_; }

 private:
  ncclComm_t comm_ = nullptr;
};

// What came since it was asked before, or was made.
class Growth {
 public:
  explicit Growth(Bench& bench) : bench_(bench) { step(); }
  double step() {
    bench_.peers().barrier();
    const int64_t used = bench_.used_bytes(), more = used - before_;
    bench_.peers().barrier();
    before_ = used;
    return static_cast<double>(more);
  }

 private:
  Bench& bench_;
  int64_t before_ = 0;
};

void run(Bench& bench, const Work& work) {
  work(bench.compute());
  cudaStreamSynchronize(bench.compute());
}

// Of kMoved bytes, from the first half of a buffer of twice as many to the second.
void move_by_nccl(Bench& bench, ncclComm_t comm, Collective collective, std::byte* buffer) {
  run(bench, by_nccl(comm, collective, buffer, buffer + kMoved, kMoved));
}

}  // namespace

// Between hosts: fewer channels, whose buffers are the host's.
void memory_of_network(Bench& bench) {
  if (bench.ranks() % 2 != 0) return;
  const int peers = bench.ranks() / 2 - 1;  // of one host
  std::byte* const buffer = bench.take(2 * kMoved);
  move_by_nccl(bench, bench.communicator(bench.ranks()), Collective::all_gather, buffer);
  move_by_nccl(bench, bench.communicator(bench.ranks()), Collective::all_to_all,
               buffer);  // what the first ones take beyond
  Growth growth(bench);
  if (peers > 0) {
    const Communicator all(bench);
    move_by_nccl(bench, all.get(), Collective::all_gather, buffer);
    bench.figure("emulated_network_communicator_bytes",
                 fmt::format("one more NCCL communicator of {} GPUs, halves of which it takes for two hosts, "
                             "once it has gathered",
                             bench.ranks()),
                 {growth.step()});
    move_by_nccl(bench, all.get(), Collective::all_to_all, buffer);
    bench.figure("emulated_network_p2p_bytes",
                 "point-to-point buffers of such a communicator, a peer that is not on the other host",
                 {growth.step() / peers});
  }
  growth.step();
  const Communicator pair(bench, bench.ranks() / 2);
  move_by_nccl(bench, pair.get(), Collective::all_gather, buffer);
  bench.figure("emulated_network_pair_bytes",
               "one more NCCL communicator of one GPU of each of two such hosts, once it has gathered",
               {growth.step()});
  bench.release();
}

void memory(Bench& bench) {
  bench.figure("native_context_bytes", "CUDA context with the first kernel",
               {static_cast<double>(bench.context_bytes())});
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  bench.figure("host_bytes", "memory of the host, as the kernel counts it",
               {static_cast<double>(host::total_memory())});
  bench.figure("hbm_bytes", "cudaMemGetInfo total", {static_cast<double>(total)});

  Growth growth(bench);
  for (const bool gradient : {false, true}) {
    run(bench, dense_product(bench, 8192, 8192, 8192, gradient));
    run(bench,
        experts_product(bench, 32, 2048, 1536, 32768, gradient ? OfExperts::gradient : OfExperts::forward));
  }
  const AttentionWork attention = attention_work(bench, attention_shape(128, 128, 32, 4096, 0));
  run(bench, attention.forward);
  run(bench, attention.backward);
  bench.release();
  bench.figure("native_library_bytes",
               "cuBLASLt, cuDNN and their kernels, after products and attention of one shape each",
               {growth.step()});
  if (bench.ranks() == 1) return;

  std::byte* const buffer = bench.take(2 * kMoved);
  move_by_nccl(bench, bench.communicator(bench.ranks()), Collective::all_gather, buffer);
  const double first = growth.step();
  const Communicator second(bench);
  const double idle = growth.step();
  move_by_nccl(bench, second.get(), Collective::all_gather, buffer);
  const double another = idle + growth.step();
  const auto connect = [&](ncclComm_t comm) {
    move_by_nccl(bench, comm, Collective::all_to_all, buffer);
    return growth.step();
  };
  const double peers = bench.ranks() - 1, first_pairs = connect(bench.communicator(bench.ranks())),
               more_pairs = connect(second.get());
  bench.figure("native_communicator_bytes",
               fmt::format("one more NCCL communicator of {} GPUs, once it has gathered", bench.ranks()),
               {another});
  bench.figure("native_idle_communicator_bytes",
               fmt::format("the same before its first collective, of {} GPUs", bench.ranks()), {idle});
  bench.figure("native_communicator_p2p_bytes",
               "NCCL point-to-point buffers of one more communicator, a peer of the node",
               {more_pairs / peers});
  bench.figure("native_first_communicator_bytes", "what the first NCCL communicator takes beyond that",
               {first - another});
  bench.figure("native_first_p2p_bytes",
               "what the first one's point-to-point buffers take beyond those of one more",
               {first_pairs - more_pairs});
  bench.peer_memory();
  bench.figure(
      "native_peer_memory_bytes",
      fmt::format("a peer's arena of {} mapped by CUDA IPC, the landing zone of reduce-scatters not counted",
                  format_bytes(static_cast<double>(bench.arena_bytes()))),
      {std::max(0.0, (growth.step() - static_cast<double>(program::kLandingBytes)) / peers)});
  bench.release();
}

}  // namespace mop::calibrate
