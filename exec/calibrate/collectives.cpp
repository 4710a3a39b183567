// Collectives in groups of every size: by NCCL, on its transports of a host and of a network, and by copy
// engines.
#include <fmt/format.h>

#include "exec/calibrate/benchmarks.h"
#include "exec/cuda/communicators.h"
#include "sim/base/error.h"
#include "sim/program/landing.h"

namespace mop::calibrate {
namespace {

constexpr int64_t kMost = int64_t{1} << 32;  // the experts of a layer have more than a GiB

// Bytes that pass each GPU's link over the buffer's, one way.
double bus_bytes(Collective collective, int size, int64_t bytes) {
  if (collective == Collective::send) return static_cast<double>(bytes);
  const double part = static_cast<double>(bytes) * (size - 1) / size;
  return collective == Collective::all_reduce ? 2 * part : part;
}

// What every rank of a group of `size` gets a whole part of, near to `bytes`: all groups have their points on
// one grid.
int64_t divisible(int64_t bytes, int size) {
  return bytes / (512 * size) * 512 * size;
}

void measure(Bench& bench, const std::string& table, const std::string& what, Collective collective, int size,
             int64_t bytes, const Work& work, Runs runs = Runs::in_a_row) {
  bench.point(table, what + "; (ranks, bytes of the full buffer) -> bus bytes/s",
              {static_cast<double>(size), static_cast<double>(bytes)},
              bus_bytes(collective, size, divisible(bytes, size)),
              bench.time(work, bench.transfer(), runs, bench.in_group(size)));
  bench.release();
}

}  // namespace

const char* name(Collective collective) {
  switch (collective) {
    case Collective::all_gather:
      return "all_gather";
    case Collective::reduce_scatter:
      return "reduce_scatter";
    case Collective::all_reduce:
      return "all_reduce";
    case Collective::all_to_all:
      return "all_to_all";
    case Collective::send:
      return "send";
  }
  return "";
}

Work by_nccl(Bench& bench, Collective collective, int size, int64_t bytes) {
  ncclComm_t const comm = bench.communicator(size);
  std::byte *const in = bench.take(bytes), *const out = bench.take(bytes);
  if (comm == nullptr) return {};  // of a rank that is left over, which has nothing to run
  return by_nccl(comm, collective, in, out, bytes);
}

Work by_nccl(ncclComm_t comm, Collective collective, std::byte* in, std::byte* out, int64_t bytes) {
  int size = 0, rank = 0;
  cuda::check(ncclCommCount(comm, &size), "ncclCommCount");
  cuda::check(ncclCommUserRank(comm, &rank), "ncclCommUserRank");
  const auto all = static_cast<size_t>(bytes / 2), part = all / static_cast<size_t>(size);
  return [=](cudaStream_t stream) {
    switch (collective) {
      case Collective::all_gather:
        return cuda::check(ncclAllGather(in, out, part, ncclBfloat16, comm, stream), "an all-gather");
      case Collective::reduce_scatter:
        return cuda::check(ncclReduceScatter(in, out, part, ncclBfloat16, ncclSum, comm, stream),
                           "a reduce-scatter");
      case Collective::all_reduce:
        return cuda::check(ncclAllReduce(in, out, all, ncclBfloat16, ncclSum, comm, stream), "an all-reduce");
      case Collective::all_to_all: {
        cuda::check(ncclGroupStart(), "an all-to-all");
        for (int peer = 0; peer < size; ++peer) {
          const size_t at = static_cast<size_t>(peer) * part * 2;
          cuda::check(ncclSend(in + at, part, ncclBfloat16, peer, comm, stream), "an all-to-all");
          cuda::check(ncclRecv(out + at, part, ncclBfloat16, peer, comm, stream), "an all-to-all");
        }
        return cuda::check(ncclGroupEnd(), "an all-to-all");
      }
      case Collective::send:
        if (rank < size / 2)
          return cuda::check(ncclSend(in, all, ncclBfloat16, rank + size / 2, comm, stream), "a send");
        if (rank < size / 2 * 2)
          return cuda::check(ncclRecv(out, all, ncclBfloat16, rank - size / 2, comm, stream), "a receive");
    }
  };
}

Work by_copy_engines(Bench& bench, Collective collective, int size, int64_t bytes) {
  ensure(collective == Collective::all_gather || collective == Collective::reduce_scatter,
         "copy engines gather and scatter");
  const std::byte* const in = bench.take(bytes);
  std::byte* const out = bench.take(bytes);
  const plan::Span group{size, 1};
  const int64_t part = bytes / size;
  return [=, &peers = bench.peer_memory()](cudaStream_t stream) {
    if (collective == Collective::all_gather)
      peers.all_gather(group, in, out, part, stream);
    else
      peers.reduce_scatter(group, in, kernels::Type::bf16, {out, kernels::Type::bf16, 1, part / 2, part / 2},
                           false, stream);
  };
}

void collectives(Bench& bench, bool emulated) {
  const int64_t most = emulated ? int64_t{1} << 30 : kMost, step = emulated ? 64 : 4;
  // The largest group first, and large buffers.
  for (int size = bench.ranks(); size >= (emulated ? bench.ranks() : 2); --size)
    for (int64_t bytes = most; bytes >= 1 << 16; bytes /= step)
      for (const Collective c : {Collective::all_gather, Collective::reduce_scatter, Collective::all_reduce,
                                 Collective::all_to_all, Collective::send}) {
        if (c == Collective::send && !emulated) continue;  // NVLink is the same both ways
        if (!bench.more()) return;
        measure(
            bench, fmt::format("{}{}", emulated ? "emulated_network_" : "native_", name(c)),
            fmt::format(
                "NCCL {}, bf16, back to back{}", name(c),
                emulated ? ", its network transport over the loopback device between two halves of the GPUs"
                         : ""),
            c, size, bytes, by_nccl(bench, c, size, divisible(bytes, size)));
      }
}

void copy_engines(Bench& bench) {
  for (int size = bench.ranks(); size >= 2; --size)
    for (int64_t bytes = kMost; bytes >= 1 << 16; bytes /= 4)
      for (const Collective c : {Collective::all_gather, Collective::reduce_scatter}) {
        if (c == Collective::reduce_scatter && size > program::kMostLanding) continue;
        const bool all_reach = bench.from_first(bench.peer_memory().reaches({bench.ranks(), 1}));
        if (!all_reach || !bench.more()) return;
        measure(bench, fmt::format("copy_engine_{}", name(c)),
                fmt::format("{} by copy engines (exec/cuda/peer_memory.h), bf16", name(c)), c, size, bytes,
                by_copy_engines(bench, c, size, divisible(bytes, size)),
                Runs::one_by_one);  // tens of launches each
      }
}

}  // namespace mop::calibrate
