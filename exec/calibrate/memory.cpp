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

// One of a stream's own, as exec/cuda/communicators.h makes them; ends with the object.
class Communicator {
 public:
  explicit Communicator(Bench& bench) {
    ncclUniqueId id{};
    if (bench.rank() == 0) cuda::check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    cuda::check(ncclCommInitRank(&comm_, bench.ranks(), bench.from_first(id), bench.rank()),
                "ncclCommInitRank");
  }
  ~Communicator() { std::uncaught_exceptions() > 0 ? ncclCommAbort(comm_) : ncclCommDestroy(comm_); }
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  ncclComm_t get() const { return comm_; }

 private:
  ncclComm_t comm_ = nullptr;
};

}  // namespace

void memory(Bench& bench) {
  int64_t before = 0;
  const auto step = [&] {
    bench.peers().barrier();
    const int64_t used = bench.used_bytes(), more = used - before;
    bench.peers().barrier();
    before = used;
    return static_cast<double>(more);
  };
  const auto run = [&](const Work& work) {
    work(bench.compute());
    cudaStreamSynchronize(bench.compute());
  };
  bench.figure("native_context_bytes", "CUDA context with the first kernel",
               {static_cast<double>(bench.context_bytes())});
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  bench.figure("host_bytes", "memory of the host, as the kernel counts it",
               {static_cast<double>(host::total_memory())});
  bench.figure("hbm_bytes", "cudaMemGetInfo total", {static_cast<double>(total)});

  step();
  for (const bool gradient : {false, true}) {
    run(dense_product(bench, 8192, 8192, 8192, gradient));
    run(experts_product(bench, 32, 2048, 1536, 32768, gradient));
  }
  const AttentionWork attention = attention_work(bench, attention_shape(128, 128, 32, 4096, 0));
  run(attention.forward);
  run(attention.backward);
  bench.release();
  bench.figure("native_library_bytes",
               "cuBLASLt, cuDNN and their kernels, after products and attention of one shape each", {step()});
  if (bench.ranks() == 1) return;

  bench.communicator(bench.ranks());
  const int64_t bytes = 64 << 20;
  run(by_nccl(bench, Collective::all_gather, bench.ranks(), bytes));
  const double first = step();
  const Communicator second(bench);
  const double idle = step();
  std::byte* const buffer = bench.take(2 * bytes);
  const auto count = static_cast<size_t>(bytes / 2 / bench.ranks());
  run([&](cudaStream_t s) {
    cuda::check(ncclAllGather(buffer, buffer + bytes, count, ncclBfloat16, second.get(), s), "an all-gather");
  });
  const double another = idle + step();
  const auto point_to_point = [&](ncclComm_t comm) {
    run([&](cudaStream_t s) {
      cuda::check(ncclGroupStart(), "an all-to-all");
      for (int peer = 0; peer < bench.ranks(); ++peer) {
        cuda::check(ncclSend(buffer, count, ncclBfloat16, peer, comm, s), "an all-to-all");
        cuda::check(ncclRecv(buffer + bytes, count, ncclBfloat16, peer, comm, s), "an all-to-all");
      }
      cuda::check(ncclGroupEnd(), "an all-to-all");
    });
    return step();
  };
  const double peers = bench.ranks() - 1, first_pairs = point_to_point(bench.communicator(bench.ranks())),
               more_pairs = point_to_point(second.get());
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
      {std::max(0.0, (step() - static_cast<double>(program::kLandingBytes)) / peers)});
  bench.release();
}

}  // namespace mop::calibrate
