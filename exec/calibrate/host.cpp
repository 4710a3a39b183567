// The host's side: copies to and from it, and the CPU's AdamW.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <functional>
#include <optional>
#include <set>

#include "exec/calibrate/benchmarks.h"
#include "exec/host/adam.h"
#include "exec/host/memory.h"
#include "kernels/check.h"
#include "sim/program/master.h"

namespace mop::calibrate {
namespace {

constexpr int64_t kLarge = int64_t{256} << 20, kSmall = 64 << 10;
// Of pinned memory, in each direction, and for how long both go through it: as those of a step do. On one
// host 256 MiB again and again came down at 89 GB/s in all, the checkpoints of a run on it at 127; on another
// 40 ms of both ways went at 156, the states of a run, 51 GiB a GPU for two seconds, at 113; on a third 12
// GiB each way went at 166, those states at 140.
constexpr int64_t kMostWalk = int64_t{32} << 30;
// Others on the machine use its memory, too, and by turns: on one host two GPUs' copies went at 152 GB/s for
// 1.6 seconds and at 112 for 0.7, again and again; on another AdamW, with nothing beside it, at 120 and at
// 195 within a minute, some seconds each. A step has the mean; what quarters of a second had is the spread.
constexpr double kWindow = 2.5, kAdamWindow = 5;
constexpr int64_t kParameters = 100'000'000;
// Of a parameter: its states; its gradient and its weights, in bf16. DRAM: states read and written, and
// those.
constexpr int64_t kStateBytes = program::state_bytes(program::Master::states), kRingBytes = 4;
constexpr double kTraffic = 2 * kStateBytes + kRingBytes;
constexpr int64_t kBesideAdam = 128;  // copies, of kLarge: a second or more

void copy(std::byte* to, const std::byte* from, int64_t bytes, cudaStream_t stream) {
  kernels::check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream), "a copy");
}

// In each of two directions. All together half of the host's memory, and of what it has to give, process 0's
// word for all.
int64_t walk_bytes(Bench& bench) {
  const int64_t total = host::total_memory(), given = host::memory_grows() ? total : host::available_memory(),
                all = bench.from_first(std::min(total / 2, given / 5 * 4));
  return std::clamp(all / (2 * bench.ranks()) / kLarge * kLarge, kLarge, kMostWalk);
}

// The next piece of `walk` bytes of pinned memory, from `begin` on, every time.
std::byte* next_piece(std::byte* begin, int64_t walk, int64_t& turn) {
  return begin + turn++ % (walk / kLarge) * kLarge;
}

Rates times(Rates rates, double factor) {
  for (std::vector<double>* values : {&rates.mean, &rates.shown})
    for (double& one : *values) one *= factor;
  return rates;
}

}  // namespace

void host_copies(Bench& bench) {
  const int64_t walk = walk_bytes(bench);
  std::byte *const device = bench.take(2 * kLarge), *const pinned = bench.pinned(2 * walk);
  int64_t turn_up = 0, turn_down = 0;
  bench.figure("gpus_per_node", "GPUs that were measured", {static_cast<double>(bench.ranks())});
  const Work up = [=,
                   &turn_up](cudaStream_t s) { copy(device, next_piece(pinned, walk, turn_up), kLarge, s); },
             down = [=, &turn_down](cudaStream_t s) {
               copy(next_piece(pinned + walk, walk, turn_down), device + kLarge, kLarge, s);
             };
  for (const int gpus : std::set<int>{1, std::min(2, bench.ranks()), bench.ranks()}) {
    if (!bench.more()) return;
    const bool mine = bench.rank() < gpus;
    const double window = gpus == bench.ranks() ? kWindow : kWindow / 4;
    const Job job_up{up, bench.up(), bench.agreed(bench.time(up, bench.up(), Runs::in_a_row, mine))},
        job_down{down, bench.down(), bench.agreed(bench.time(down, bench.down(), Runs::in_a_row, mine))};
    const Rates alone_up = rates_of(bench.again(job_up, mine, window), kLarge),
                alone_down = rates_of(bench.again(job_down, mine, window), kLarge);
    const auto [beside_up, beside_down] = bench.beside(job_up, job_down, mine, window);
    const Rates both_up = rates_of(beside_up, kLarge), both_down = rates_of(beside_down, kLarge);
    Rates both;
    std::vector<double> of_both;
    if (!both_up.mean.empty() && !both_down.mean.empty()) {
      both.mean = {both_up.mean[0] + both_down.mean[0]}, of_both = {both_down.mean[0] / both.mean[0]};
      for (size_t i = 0; i < std::min(both_up.shown.size(), both_down.shown.size()); ++i)
        both.shown.push_back(both_up.shown[i] + both_down.shown[i]);
    }
    // The median of the GPUs' rates, times how many there are.
    const auto record = [&](const char* direction, const char* what, const Rates& each) {
      const std::string said =
          fmt::format("{} GiB of pinned memory, {} MiB at a time, {}", walk >> 30, kLarge >> 20, what);
      const Rates in_all = times(each, gpus);
      if (const std::optional<Reading> reading = bench.reading(in_all)) {
        FoundTable& table = bench.findings().tables[fmt::format("host_copies_{}", direction)];
        table.what = said + "; (GPUs at once) -> bytes/s of all";
        table.points.push_back({{static_cast<double>(gpus)}, *reading});
      }
      if (gpus == 1) bench.figure(fmt::format("pcie_{}_bw", direction), said + ", one GPU", each);
      if (gpus == bench.ranks())
        bench.figure(fmt::format("root_{}_bw", direction),
                     fmt::format("{}, {} GPUs at once, in all", said, gpus), in_all);
    };
    record("up", "host to device", alone_up);
    record("down", "device to host", alone_down);
    record("both", "both ways at once, sum", both);
    const std::string part = "of what goes both ways at once, the part from device to host, ";
    if (gpus == 1) bench.figure("pcie_down_share", part + "one GPU", of_both);
    if (gpus == bench.ranks())
      bench.figure("root_down_share", part + fmt::format("{} GPUs at once", gpus), of_both);
  }
  const bool first = bench.rank() == 0;
  Seconds small = bench.time([=](cudaStream_t s) { copy(pinned, device, kSmall, s); }, bench.down(),
                             Runs::one_by_one, first);
  for (double& s : small) s *= 1e9;
  bench.figure("copy_latency_ns", "64 KiB to pinned memory, one GPU", small);
  bench.peers().barrier();
  bench.release();
}

// All processes' AdamW while all copy to their GPUs, as the weights of a layer go beside the update of the
// next, and little comes down then. A copy beside AdamW is as fast as the latency of busy memory has it,
// whether one GPU copies or three. pinned, walk: what is copied from, and bytes of it. traffic: of an update,
// bytes; rate: bytes/s of updates without copies.
void adam_beside_copies(Bench& bench, const std::function<void()>& update, std::byte* pinned, int64_t walk,
                        double traffic, double rate) {
  using Clock = std::chrono::steady_clock;
  std::byte* const device = bench.take(kLarge);
  int64_t turn = 0;
  cudaEvent_t begun = nullptr, done = nullptr;
  for (cudaEvent_t* event : {&begun, &done}) kernels::check(cudaEventCreate(event), "an event");
  bench.peers().barrier();
  update();
  kernels::check(cudaEventRecord(begun, bench.up()), "an event");
  for (int64_t i = 0; i < kBesideAdam; ++i) copy(device, next_piece(pinned, walk, turn), kLarge, bench.up());
  kernels::check(cudaEventRecord(done, bench.up()), "an event");
  const Clock::time_point begin = Clock::now();
  Clock::time_point end = begin;
  int updates = 0;  // that began while copies were under way
  for (; cudaEventQuery(done) == cudaErrorNotReady; ++updates) update(), end = Clock::now();
  kernels::check(cudaEventSynchronize(done), "copies");
  for (int i = 0; i < 3; ++i) update();  // for those that still copy
  float copied_ms = 0;
  kernels::check(cudaEventElapsedTime(&copied_ms, begun, done), "an event");
  for (cudaEvent_t event : {begun, done}) cudaEventDestroy(event);
  const double adam = updates * traffic / std::chrono::duration<double>(end - begin).count(),
               copies = static_cast<double>(kBesideAdam * kLarge) / (copied_ms * 1e-3);
  const std::string what = fmt::format("{} processes' AdamW while each copies {} GiB to its GPU",
                                       bench.ranks(), kBesideAdam * kLarge >> 30);
  bench.figure("adam_beside_copies", what + ", its rate over that without", {adam / rate});
  bench.figure("copies_beside_adam", what + ", bytes that are copied for each of AdamW's", {copies / adam});
}

// Through as much memory as a step's states take: the same 1.2 GB again and again had given 151 GB/s in all
// where the states of a run, 20 GiB a GPU, came and went at 198.
void host_adam(Bench& bench) {
  host::Workers& workers = host::Workers::of_process();
  const int64_t walked = 2 * walk_bytes(bench),
                updates = std::max<int64_t>(1, (walked / kParameters - 2 * kRingBytes) / kStateBytes),
                used = kParameters * (kStateBytes * updates + 2 * kRingBytes);
  std::byte* const slab = bench.pinned(std::max(walked, used));  // as much as copies take: it stays for them
  std::byte* const rings = slab + kStateBytes * kParameters * updates;
  workers.run([&](int thread) {  // 0.01, neither zero nor denormal; of the rings as pairs of bf16
    const host::Range part = host::part_of(used / 4, 1024, thread, workers.count());
    auto* const values = reinterpret_cast<float*>(slab);
    std::fill(values + part.begin, values + part.end, std::bit_cast<float>(0x3c243c24U));
  });
  int64_t turn = 0;
  const auto update = [&] {  // gradients come and weights go in rings of two
    auto* const states = reinterpret_cast<float*>(slab + kStateBytes * kParameters * (turn % updates));
    std::byte* const ring = rings + kRingBytes * kParameters * (turn % 2);
    const host::AdamPair pair{ring, program::Type::bf16, ring + 2 * kParameters, program::Type::bf16,
                              0,    kParameters};
    host::adam({states, kParameters, true, {&pair, 1}, 1, {10 + turn, 1e-3, 0.9, 0.95, 1e-8, 0.1}}, workers);
    ++turn;
  };
  // Through all of the memory, and for as long as `window`; without those at both ends, as the others run
  // then.
  const auto rates = [&](bool mine, double window) {
    bench.peers().barrier();
    using Clock = std::chrono::steady_clock;
    const Clock::time_point begin = Clock::now();
    const auto since = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
    Seconds ends;
    for (const size_t least = static_cast<size_t>(std::max<int64_t>(10, updates));
         mine && (ends.size() < least || since() < window);)
      update(), ends.push_back(since());
    bench.peers().barrier();
    Seconds runs;
    for (size_t i = 2; i + 1 < ends.size(); ++i) runs.push_back(ends[i] - ends[i - 1]);
    return rates_of(runs, kParameters);
  };
  const std::string what = fmt::format(
      "CPU AdamW, fp32 states of {:.1f} GiB, bf16 gradients and weights, {} threads a process, {}",
      std::ldexp(static_cast<double>(kStateBytes * kParameters * updates), -30), workers.count(),
      host::text(host::adam_path()));
  bench.figure("host_adam_rate_alone", what + ", one process, parameters/s",
               rates(bench.rank() == 0, kAdamWindow / 2));
  const Rates traffic = times(rates(true, kAdamWindow), kTraffic * bench.ranks());
  bench.figure("native_dram_bw",
               fmt::format("{}, {} processes at once, 28 bytes a parameter", what, bench.ranks()), traffic);
  adam_beside_copies(bench, update, slab, used, kTraffic * kParameters,
                     bench.agreed(traffic.mean) / bench.ranks());
  bench.release();
}

}  // namespace mop::calibrate
