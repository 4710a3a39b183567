// Whole predictions: lowering, memory, the consecutive steps of the steady state and all checks. Kimi-K2 on
// h200. CPU time is of the thread that predicts, except for the sweep (two threads: processor time of the
// process).
#include <benchmark/benchmark.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <string>

#include "sim/predict/predict.h"
#include "sim/search/settings.h"
#include "sim/search/sweep.h"

namespace mop {
namespace {

using predict::Prediction;
using predict::Scenario;

constexpr int64_t kMillion = 1048576;

// Every setting is given, so that no planner runs.
Scenario kimi(int64_t nodes, const std::string& routing = "balanced",
              const std::string& plan =
                  "mop:ulysses=32,ep=8,vp=16,vp-scheme=tokens,mla-exchange=expanded,checkpoints=host,"
                  "optimizer=host,round-rows=32K") {
  static const model::ModelConfig config = model::read_config("kimi-k2");
  static const cluster::ClusterModel cluster = cluster::read_cluster("h200");
  Scenario s;
  s.model = config;
  s.cluster = cluster;
  s.nodes = nodes;
  s.workload.context = kMillion;
  s.workload.routing = plan::parse_routing(routing);
  s.plan = search::parse_plan(plan);
  if (s.plan.family == plan::Family::mop) s.plan.dense_shard = s.gpus();
  return s;
}

// The most memory that the process has had since reset_peak, in MiB (Linux).
void reset_peak() {
  std::ofstream("/proc/self/clear_refs") << "5";
}
double peak_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024;
  }
  return 0;
}

void measure(benchmark::State& state, const Scenario& scenario, bool unfold = false) {
  Prediction p;
  reset_peak();
  for (auto _ : state) p = predict::predict(scenario, {unfold, false});
  if (!p.step_time) state.SkipWithError("the plan does not fit");
  state.counters["classes"] = static_cast<double>(p.classes);
  state.counters["ops"] = static_cast<double>(p.operations);
  state.counters["ops_of_a_rank"] = static_cast<double>(p.program_operations);
  state.counters["peak_MiB"] = peak_mib();
}

void BM_Folded(benchmark::State& state) {
  measure(state, kimi(12));
}
BENCHMARK(BM_Folded)->Unit(benchmark::kMillisecond);

void BM_Zipf(benchmark::State& state) {
  measure(state, kimi(12, "zipf:1"));
}
BENCHMARK(BM_Zipf)->Unit(benchmark::kMillisecond);

// FSDP2 with the experts over all 96 GPUs: with imbalance no two ranks are alike.
void BM_Fsdp2WideZipf(benchmark::State& state) {
  Scenario s = kimi(12, "zipf:1", "fsdp2:tp=8,cp=4,ep=96,offload=on");
  s.workload.context = kMillion / 8;
  measure(state, s);
}
BENCHMARK(BM_Fsdp2WideZipf)->Unit(benchmark::kMillisecond);

void BM_Unfolded(benchmark::State& state) {
  measure(state, kimi(12), true);
}
BENCHMARK(BM_Unfolded)->Unit(benchmark::kMillisecond);

// The same degrees on more and more nodes: folded, then unfolded (time over ops).
void BM_Nodes(benchmark::State& state) {
  measure(state, kimi(state.range(0)));
}
BENCHMARK(BM_Nodes)->Arg(12)->Arg(32)->Arg(64)->Arg(128)->Arg(256)->Arg(512)->Unit(benchmark::kMillisecond);

void BM_UnfoldedNodes(benchmark::State& state) {
  measure(state, kimi(state.range(0)), true);
}
BENCHMARK(BM_UnfoldedNodes)->Arg(16)->Arg(32)->Arg(64)->Iterations(1)->Unit(benchmark::kMillisecond);

// Five contexts, ten node counts, four Ulysses and five expert degrees: 1,000 predictions on two threads.
void BM_Sweep1000(benchmark::State& state) {
  constexpr std::array<int64_t, 10> kNodes{8, 12, 16, 20, 24, 28, 32, 40, 48, 64};
  const auto question = [&](size_t i) {
    Scenario s = kimi(kNodes[i % 10]);
    s.workload.context = (kMillion / 16) << (i / 10 % 5);
    s.plan.sequence = int64_t{4} << (i / 50 % 4);
    s.plan.expert = int64_t{2} << (i / 200);
    return s;
  };
  size_t fit = 0, predicted = 0;
  reset_peak();
  for (auto _ : state) {
    fit = predicted = 0;
    const std::atomic<bool> stop = false;
    search::run(1000, 2, stop, question, [&](std::vector<search::Outcome>&& finished, size_t) {
      for (const search::Outcome& o : finished) {
        if (o.prediction) ++predicted, fit += o.prediction->fits;
      }
    });
  }
  state.counters["predicted"] = static_cast<double>(predicted);
  state.counters["fit"] = static_cast<double>(fit);
  state.counters["peak_MiB"] = peak_mib();
}
BENCHMARK(BM_Sweep1000)->Iterations(1)->MeasureProcessCPUTime()->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace mop
