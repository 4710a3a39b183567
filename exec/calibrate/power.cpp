// What the GPUs draw, and at which clock, while they do one kind of work: where the power limit holds the
// clock down, kernels are as fast as what runs before and behind them lets them be (sim/cost/power.h).
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <optional>
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

// The loop that keeps the power within the limit has settled within half a second.
constexpr auto kSettle = std::chrono::milliseconds(700), kWatch = std::chrono::milliseconds(800);
constexpr size_t kAhead = 2;             // rounds on the stream
constexpr double kRoundSeconds = 20e-3;  // longer than the driver takes to tell the power
constexpr double kBurstSeconds = 6e-3, kRestSeconds = 24e-3;
constexpr size_t kMarked = 5;  // rounds whose clocks are read
// By turns with memory-bound kernels, some milliseconds each as in a step: what those take, over what the
// other takes. The driver's loop sees turns of 12 and 5 ms one by one: the clock then is that of the mean of
// neither (H200, 2026-11-28).
constexpr double kFew = 0.4, kMany = 2;
constexpr int kMostTurns = 10;  // of a round

struct Part {
  const Work* work;
  int times;
};

struct Drawn {
  double watts = 0;
  struct OfPart {
    double hertz, share;  // the clock, and the share of the time
  };
  std::vector<OfPart> parts;
};

// While rounds of `parts`, `seconds` long, follow one another, or, with a rest, each some time after the end
// of the one before. As many on every rank, since parts may be collective.
Drawn watch(Bench& bench, const std::vector<Part>& parts, double seconds, double rest) {
  bench.peers().barrier();
  cudaStream_t const stream = bench.compute();
  const size_t marks = parts.size() + 1;
  std::vector<cudaEvent_t> events(kMarked * marks + kAhead);
  for (cudaEvent_t& event : events) kernels::check(cudaEventCreate(&event), "an event");
  const auto mark = [&](size_t index) {
    bench.read_clock(index, stream);
    kernels::check(cudaEventRecord(events[index], stream), "an event");
  };
  const auto round = [&](std::optional<size_t> marked) {
    for (size_t p = 0; p < parts.size(); ++p) {
      if (marked) mark(*marked * marks + p);
      for (int i = 0; i < parts[p].times; ++i) (*parts[p].work)(stream);
    }
    if (marked) mark(*marked * marks + parts.size());
  };
  const auto pause = [&] {
    if (rest <= 0) return;
    kernels::check(cudaStreamSynchronize(stream), "work that draws power");
    std::this_thread::sleep_for(std::chrono::duration<double>(rest));
  };
  Drawn drawn;
  const auto rounds_in = [&](std::chrono::duration<double> time) {
    return std::max<size_t>(3, static_cast<size_t>(time.count() / (seconds + rest)));
  };
  const size_t settle = rounds_in(kSettle), watched = rounds_in(kWatch);
  Clock::time_point from;
  for (size_t r = 0; r < settle + watched; ++r) {
    cudaEvent_t const end = events[kMarked * marks + r % kAhead];
    kernels::check(cudaEventSynchronize(end), "work that draws power");
    if (r == settle) from = Clock::now();
    if (r >= settle) drawn.watts += bench.sensor()->watts() / static_cast<double>(watched);
    round({});
    kernels::check(cudaEventRecord(end, stream), "an event");
    pause();
  }
  const double every =
      std::chrono::duration<double>(Clock::now() - from).count() / static_cast<double>(watched);
  for (size_t r = 0; r < kMarked; ++r) round(r), pause();
  kernels::check(cudaStreamSynchronize(stream), "work that draws power");
  for (size_t p = 0; p < parts.size(); ++p) {
    std::vector<double> hertz, shares;
    for (size_t r = 1; r < kMarked; ++r) {
      float all = 0, own = 0;
      const size_t first = r * marks;
      hertz.push_back(bench.clock_between(first + p, first + p + 1));
      kernels::check(cudaEventElapsedTime(&own, events[first + p], events[first + p + 1]), "an event");
      kernels::check(cudaEventElapsedTime(&all, events[first], events[first + parts.size()]), "an event");
      shares.push_back(rest > 0 ? own * 1e-3 / every : own / all);
    }
    drawn.parts.push_back({median(hertz), median(shares)});
  }
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  return drawn;
}

// In a row, or, with a rest, in bursts.
Drawn watch(Bench& bench, const Work& work, double seconds, double rest = 0) {
  const double once = bench.agreed(bench.time(work, bench.compute(), Runs::one_by_one));
  const int times = std::max(1, static_cast<int>(seconds / once + 0.5));
  return watch(bench, {{&work, times}}, times * once, rest);
}

// By turns with `other`, which takes `ratio` times as long. Of two parts.
Drawn by_turns(Bench& bench, const Work& work, const Work& other, double ratio) {
  const double once = bench.agreed(bench.time(work, bench.compute(), Runs::one_by_one)),
               beside = bench.agreed(bench.time(other, bench.compute(), Runs::one_by_one));
  const int each = std::max(1, static_cast<int>(kRoundSeconds / kMostTurns / (once * (1 + ratio)) + 0.5)),
            times = std::max(1, static_cast<int>(ratio * each * once / beside + 0.5));
  const double turn = each * once + times * beside;
  const int turns = std::clamp(static_cast<int>(std::ceil(kRoundSeconds / turn)), 1, kMostTurns);
  std::vector<Part> parts;
  for (int i = 0; i < turns; ++i) parts.insert(parts.end(), {{&work, each}, {&other, times}});
  const Drawn all = watch(bench, parts, turns * turn, 0);
  Drawn two{all.watts, {{0, 0}, {0, 0}}};
  for (size_t p = 0; p < parts.size(); ++p) {
    two.parts[p % 2].hertz += all.parts[p].hertz * all.parts[p].share;
    two.parts[p % 2].share += all.parts[p].share;
  }
  for (Drawn::OfPart& part : two.parts) part.hertz /= part.share;
  return two;
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
  const Work memory = [=](cudaStream_t s) { kernels::rms_norm({x, w, residual, y, x, 1e-6F}, s); };
  // The shapes of a step: what products draw differs by a tenth from one to another.
  const std::array dense{dense_product(bench, 32768, 5120, 2048, false),
                         dense_product(bench, 32768, 2048, 2048, false)};
  const std::array deep{dense_product(bench, 8192, 8192, 8192, false),
                        dense_product(bench, 32768, 5760, 2880, false),
                        dense_product(bench, 2048, 4096, 32768, true)};
  const std::array experts{experts_product(bench, 128, 2048, 1536, 65536),
                           experts_product(bench, 128, 768, 2048, 65536),
                           experts_product(bench, 32, 2048, 1536, 65536, OfExperts::gradient)};
  const AttentionWork wide = attention_work(bench, attention_shape(128, 128, 32, 16384, 0)),
                      narrow = attention_work(bench, attention_shape(64, 64, 64, 16384, 0));
  const auto in_turn = [](const auto& works) -> Work {
    return [works](cudaStream_t s) {
      for (const Work& work : works) work(s);
    };
  };
  const Work deep_products = in_turn(deep);
  struct Kind {
    std::string_view name;
    const char* what;
    Work work;
  };
  const std::vector<Kind> kinds{
      {"matmul", "products of (32768, 5120, 2048) and (32768, 2048, 2048)", in_turn(dense)},
      {"deep_matmul", "products of 8192^3, (32768, 5760, 2880) and (2048, 4096, 32768)", deep_products},
      {"grouped_matmul", "products of 128 experts of 512 rows, and weight gradients of 32 of 2048",
       in_turn(experts)},
      {"attention_forward", "forward attention, 32 heads of 128, 16384 tokens", wide.forward},
      {"attention_backward", "backward attention, 32 heads of 128, 16384 tokens", wide.backward},
      {"narrow_attention_forward", "forward attention, 64 heads of 64, 16384 tokens", narrow.forward},
      {"narrow_attention_backward", "backward attention, 64 heads of 64, 16384 tokens", narrow.backward}};
  const auto figures = [&](const std::string& name, const std::string& what, const Drawn& drawn) {
    bench.figure(name + "_power_w", "drawn by " + what, {drawn.watts});
    bench.figure(name + "_clock_hz", "clock of the multiprocessors under " + what, {drawn.parts[0].hertz});
  };
  const double idle = watch(bench, std::vector<Part>(), 0, kRoundSeconds).watts;
  bench.figure("idle_power_w", "drawn by nothing, the context being there", {idle});
  const double of_memory = watch(bench, memory, kRoundSeconds).watts;
  bench.figure("memory_bound_power_w", "drawn by RMSNorm of 32768 x 2048 with its residual in a row",
               {of_memory});
  if (bench.ranks() > 1) {
    const Work gather = by_copy_engines(bench, Collective::all_gather, bench.ranks(), int64_t{1} << 30);
    bench.figure("link_power_w", "drawn by all-gathers of 1 GiB by copy engines in a row",
                 {watch(bench, gather, kRoundSeconds).watts});
  }
  std::vector<std::vector<double>> clocks;  // by kind of tensor work and GPU, over the median's; of process 0
  for (const Kind& kind : kinds) {
    const std::string name(kind.name), what = kind.what;
    const Drawn alone = watch(bench, kind.work, kRoundSeconds);
    figures(name, what + " in a row", alone);
    bench.figure(
        name + "_burst_clock_hz",
        "clock of the multiprocessors under " + what + ", a fifth of the time and nothing in the rest",
        {watch(bench, kind.work, kBurstSeconds, kRestSeconds).parts[0].hertz});
    Drawn among = by_turns(bench, kind.work, memory, kMany);
    among.watts = of_memory + (among.watts - of_memory) / among.parts[0].share;
    figures(name + "_among", what + ", a third of the time, by turns with such RMSNorms", among);
    std::vector<double> all = bench.at_first({alone.parts[0].hertz});
    if (all.empty()) continue;
    const double middle = median(all);
    for (double& one : all) one /= middle;
    clocks.push_back(std::move(all));
  }
  // Products as deep_matmul has them, since what those draw is taken off.
  const Drawn mixed = by_turns(bench, deep_products, memory, kFew);
  const std::string mixture = "the deep products and such RMSNorms by turns";
  bench.figure("mixed_power_w", "drawn by " + mixture, {mixed.watts});
  bench.figure("mixed_matmul_share", "of the time of " + mixture + ", the products'", {mixed.parts[0].share});
  bench.figure("mixed_matmul_clock_hz", "clock of the products of " + mixture, {mixed.parts[0].hertz});
  bench.figure("mixed_memory_bound_clock_hz", "clock of the RMSNorms of " + mixture, {mixed.parts[1].hertz});
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
