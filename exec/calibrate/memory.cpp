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

// Every rank's `bytes / ranks` of the first half of a buffer, which has twice `bytes`, into the second.
void gather(Bench& bench, ncclComm_t comm, std::byte* buffer, int64_t bytes) {
  int ranks = 0;
  cuda::check(ncclCommCount(comm, &ranks), "ncclCommCount");
  run(bench, [&](cudaStream_t s) {
    cuda::check(
        ncclAllGather(buffer, buffer + bytes, static_cast<size_t>(bytes / 2 / ranks), ncclBfloat16, comm, s),
        "an all-gather");
  });
}

// Sends and receives among all.
void exchange(Bench& bench, ncclComm_t comm, std::byte* buffer, int64_t bytes) {
  const auto count = static_cast<size_t>(bytes / 2 / bench.ranks());
  run(bench, [&](cudaStream_t s) {
    cuda::check(ncclGroupStart(), "an all-to-all");
    for (int peer = 0; peer < bench.ranks(); ++peer) {
      cuda::check(ncclSend(buffer, count, ncclBfloat16, peer, comm, s), "an all-to-all");
      cuda::check(ncclRecv(buffer + bytes + 2 * peer * static_cast<int64_t>(count), count, ncclBfloat16, peer,
                           comm, s),
                  "an all-to-all");
    }
    cuda::check(ncclGroupEnd(), "an all-to-all");
  });
}

constexpr int64_t kMoved = 64 << 20;

}  // namespace

// Between hosts: fewer channels, whose buffers are the host's.
void memory_of_network(Bench& bench) {
  std::byte* const buffer = bench.take(2 * kMoved);
  const int peers = bench.ranks() / 2 - 1;  // of one host
  if (bench.ranks() % 2 != 0) return bench.release();
  gather(bench, bench.communicator(bench.ranks()), buffer, kMoved);
  exchange(bench, bench.communicator(bench.ranks()), buffer, kMoved);  // what the first ones take beyond
  Growth growth(bench);
  if (peers > 0) {
    const Communicator all(bench);
    gather(bench, all.get(), buffer, kMoved);
    bench.figure("emulated_network_communicator_bytes",
                 fmt::format("one more NCCL communicator of {} GPUs, halves of which it takes for two hosts, "
                             "once it has gathered",
                             bench.ranks()),
                 {growth.step()});
    exchange(bench, all.get(), buffer, kMoved);
    bench.figure("emulated_network_p2p_bytes",
                 "point-to-point buffers of such a communicator, a peer that is not on the other host",
                 {growth.step() / peers});
  }
  growth.step();
  const Communicator pair(bench, bench.ranks() / 2);
  gather(bench, pair.get(), buffer, kMoved);
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
    run(bench, experts_product(bench, 32, 2048, 1536, 32768, gradient));
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
  gather(bench, bench.communicator(bench.ranks()), buffer, kMoved);
  const double first = growth.step();
  const Communicator second(bench);
  const double idle = growth.step();
  gather(bench, second.get(), buffer, kMoved);
  const double another = idle + growth.step();
  const auto connect = [&](ncclComm_t comm) {
    exchange(bench, comm, buffer, kMoved);
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
