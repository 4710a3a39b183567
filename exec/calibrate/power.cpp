// What the GPUs draw, and at which clock, while they do one kind of work: where the power limit holds the
// clock down, kernels are as fast as what runs before and behind them lets them be (sim/cost/power.h).
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <string_view>
#include <thread>

#include "exec/calibrate/benchmarks.h"
#include "kernels/check.h"
#include "kernels/clock.h"
#include "kernels/norm.h"
#include "sim/base/median.h"

namespace mop::calibrate {
namespace {

using Clock = std::chrono::steady_clock;

// The clock settles within tens of milliseconds; the counter of joules goes on every hundred at most.
constexpr auto kSettle = std::chrono::milliseconds(250), kWatch = std::chrono::milliseconds(500);
constexpr size_t kAhead = 2;  // batches on the stream
constexpr double kBatchSeconds = 10e-3;

struct Drawn {
  double watts, hertz, seconds;  // mean clock; of one time the work
};

// While `work`, which takes about `seconds`, is done again and again; no work: while nothing is.
Drawn watch(Bench& bench, const Work& work, double seconds) {
  bench.peers().barrier();
  std::array<cudaEvent_t, kAhead> ends{};
  for (cudaEvent_t& end : ends)
    kernels::check(cudaEventCreateWithFlags(&end, cudaEventDisableTiming), "an event");
  const int batch = work ? std::max(1, static_cast<int>(kBatchSeconds / seconds)) : 0;
  const Clock::time_point begin = Clock::now();
  Clock::time_point from{}, now = begin;
  double joules = 0;
  int64_t batches = 0;
  for (size_t turn = 0; batches == 0 || now - from < kWatch; turn = (turn + 1) % kAhead, now = Clock::now()) {
    kernels::check(cudaEventSynchronize(ends[turn]), "work that draws power");
    if (batches > 0) {
      ++batches;
    } else if (now - begin >= kSettle) {
      from = now, joules = bench.sensor()->joules(), batches = 1;
      bench.read_clock(0, bench.compute());
    }
    for (int i = 0; i < batch; ++i) work(bench.compute());
    if (!work) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    kernels::check(cudaEventRecord(ends[turn], bench.compute()), "an event");
  }
  bench.read_clock(1, bench.compute());
  const double drawn = bench.sensor()->joules() - joules,
               lasted = std::chrono::duration<double>(Clock::now() - from).count();
  kernels::check(cudaStreamSynchronize(bench.compute()), "work that draws power");
  for (cudaEvent_t end : ends) cudaEventDestroy(end);
  return {drawn / lasted, bench.clock_between(0, 1),
          lasted / static_cast<double>(std::max<int64_t>(1, (batches - 1) * batch))};
}

}  // namespace

void power(Bench& bench) {
  if (!bench.sensor()) {
    if (bench.rank() == 0)
      bench.findings().unsupported.emplace_back("power and clock, which the driver does not tell");
    return;
  }
  bench.figure("power_limit_w", "enforced power limit of a GPU", {bench.sensor()->limit_watts()});
  bench.figure("largest_clock_hz",
               "the largest clock of the multiprocessors, which products and attention have in the tables",
               {bench.largest_clock()});
  const int64_t rows = 32768, hidden = 2048;
  const kernels::Matrix x = bench.matrix(rows, hidden), w = bench.matrix(1, hidden),
                        residual = bench.matrix(rows, hidden), y = bench.matrix(rows, hidden);
  constexpr int kTurns = 9;  // about as long as the product
  const Work product = dense_product(bench, 8192, 8192, 8192, false), memory = [=](cudaStream_t s) {
    kernels::rms_norm({x, w, residual, y, x, 1e-6F}, s);
  };
  const AttentionWork attention = attention_work(bench, attention_shape(128, 128, 96, 4096, 0));
  attention.forward(bench.compute());  // what backward starts from
  struct Kind {
    std::string_view name;
    const char* what;
    Work work;
  };
  const std::vector<Kind> kinds{
      {"idle", "nothing, the context being there", {}},
      {"matmul", "8192^3 products", product},
      {"grouped_matmul", "grouped products of 32 experts, (262144, 1536, 2048)",
       experts_product(bench, 32, 2048, 1536, 262144, false)},
      {"attention", "attention backward, 96 heads of 128, 4096 tokens", attention.backward},
      {"memory_bound", "RMSNorm of 32768 x 2048 with its residual", memory},
      {"mixed", "8192^3 products and nine such RMSNorms by turns", [=](cudaStream_t s) {
         product(s);
         for (int i = 0; i < kTurns; ++i) memory(s);
       }}};
  double of_memory = 0;
  std::vector<std::vector<double>> clocks;  // by kind of tensor work and GPU, over the median's; of process 0
  for (const Kind& kind : kinds) {
    if (!bench.more()) return;
    const double seconds =
        kind.work ? bench.agreed(bench.time(kind.work, bench.compute(), Runs::one_by_one)) : 0;
    const Drawn drawn = watch(bench, kind.work, seconds);
    bench.figure(fmt::format("{}_power_w", kind.name), fmt::format("drawn by {} alone", kind.what),
                 {drawn.watts});
    if (!kind.work) continue;
    bench.figure(fmt::format("{}_clock_hz", kind.name),
                 fmt::format("clock of the multiprocessors under {} alone", kind.what), {drawn.hertz});
    std::vector<double> all = bench.at_first({drawn.hertz});
    if (kind.name != "memory_bound" && !all.empty()) {
      const double middle = median(all);
      for (double& one : all) one /= middle;
      clocks.push_back(std::move(all));
    }
    if (kind.name == "memory_bound") of_memory = drawn.seconds;
    if (kind.name == "mixed")
      bench.figure("mixed_matmul_share", "of that time, the products' share",
                   {std::clamp(1 - kTurns * of_memory / drawn.seconds, 0.01, 0.99)});
  }
  bench.release();
  if (bench.rank() != 0 || clocks.empty()) return;
  FoundTable& table = bench.findings().tables["gpu_clock"];
  table.what = "clock under tensor work over that of the host's median GPU; (GPU, from 1) -> ratio";
  for (size_t gpu = 0; gpu < clocks.front().size(); ++gpu) {
    std::vector<double> seen;
    for (const std::vector<double>& of_kind : clocks) seen.push_back(of_kind[gpu]);
    table.points.emplace_back(std::vector{static_cast<double>(gpu + 1)}, reading_of(std::move(seen)));
  }
}

}  // namespace mop::calibrate
