// How many events a second the engine processes: a task's start and its completion are one event each.
#include <benchmark/benchmark.h>

#include <random>

#include "sim/engine/engine.h"

namespace mop::engine {
namespace {

uint32_t below(std::mt19937& random, uint32_t bound) {
  return static_cast<uint32_t>(random() % bound);
}

Task on(uint32_t stream, uint32_t demand) {
  Task task;
  task.stream = static_cast<uint8_t>(stream);
  task.demand = demand;
  task.launch_ns = 3;
  return task;
}

// One stream, one after another.
TaskGraph chain(uint32_t tasks) {
  TaskGraph graph;
  for (uint32_t t = 0; t < tasks; ++t) {
    Demand demand;
    demand.duration = 1000 + t % 7;
    demand.add(Resource::sm, kFull);
    graph.demands.push_back(demand);
    graph.tasks.push_back(on(0, t));
  }
  return graph;
}

// Like a training step: layer after layer, each task after two of other streams; `crowd` is how much of a
// link each transfer wants, in percent.
TaskGraph layered(uint32_t tasks, uint32_t crowd, bool meetings) {
  std::mt19937 random(1);
  TaskGraph graph;
  for (uint32_t d = 0; d < 512; ++d) {
    Demand demand;
    demand.duration = 2000 + below(random, 20000);
    demand.weight = 1 + below(random, 4);
    const uint32_t stream = d % 8;
    if (stream == 0) demand.add(Resource::sm, kFull * 9 / 10);
    if (stream > 0 && stream < 4) {
      demand.add(Resource::nvlink_out, static_cast<uint32_t>(kFull * crowd / 100));
      demand.add(Resource::nvlink_in, static_cast<uint32_t>(kFull * crowd / 100));
    }
    if (stream >= 4) {
      demand.add(Resource::pcie_down, static_cast<uint32_t>(kFull * crowd / 100));
      demand.add(Resource::dram, static_cast<uint32_t>(kFull * crowd / 1600));
    }
    graph.demands.push_back(demand);
  }
  for (uint32_t t = 0; t < tasks; ++t) {
    const uint32_t stream = t % 8;
    Task task = on(stream, 8 * below(random, 64) + stream);
    task.communication = stream > 0 && stream < 4;
    if (meetings && stream == 1) task.comm = 0;
    graph.tasks.push_back(task);
    for (int e = 0; e < 2; ++e) {
      if (t > 24) graph.edges.push_back({t - 1 - below(random, 16), t, 0});
    }
  }
  return graph;
}

// `ranks` that all run `graph`, eight a node, communicator 0 among the ranks of a node.
Machine machine_of(TaskGraph graph, uint32_t ranks) {
  Machine machine;
  machine.graphs.push_back(std::move(graph));
  machine.nodes = (ranks + 7) / 8;
  machine.meeting_size.resize(machine.nodes);
  for (uint32_t r = 0; r < ranks; ++r) {
    machine.ranks.push_back({.graph = 0, .node = r / 8, .multiplicity = 1, .meeting = {r / 8}});
    ++machine.meeting_size[r / 8];
  }
  return machine;
}

void measure(benchmark::State& state, const Machine& machine, int steps) {
  uint64_t events = 0, tasks = 0;
  for (auto _ : state) {
    const Report report = run(machine, {.max_steps = steps, .tolerance = -1});
    events += report.events;
    tasks += report.tasks;
  }
  state.counters["events/s"] = benchmark::Counter(static_cast<double>(events), benchmark::Counter::kIsRate);
  state.counters["tasks/s"] = benchmark::Counter(static_cast<double>(tasks), benchmark::Counter::kIsRate);
}

void BM_Chain(benchmark::State& state) {
  measure(state, machine_of(chain(12000), 1), 3);
}
BENCHMARK(BM_Chain)->Unit(benchmark::kMillisecond);

// Arguments: tasks a step, percent of a link that a transfer wants.
void BM_Layered(benchmark::State& state) {
  const auto tasks = static_cast<uint32_t>(state.range(0)), crowd = static_cast<uint32_t>(state.range(1));
  measure(state, machine_of(layered(tasks, crowd, false), 1), 3);
}
BENCHMARK(BM_Layered)
    ->Args({12000, 20})
    ->Args({12000, 60})
    ->Args({12000, 100})
    ->Unit(benchmark::kMillisecond);

// Arguments: ranks, percent. Every rank has 12,000 tasks a step and meets its node's others at one in eight.
void BM_Unfolded(benchmark::State& state) {
  const auto ranks = static_cast<uint32_t>(state.range(0)), crowd = static_cast<uint32_t>(state.range(1));
  measure(state, machine_of(layered(12000, crowd, true), ranks), 3);
}
BENCHMARK(BM_Unfolded)->Args({8, 20})->Args({96, 20})->Args({96, 100})->Unit(benchmark::kMillisecond);

// What preparing a run costs: one step of a program is compiled and run.
void BM_OneStep(benchmark::State& state) {
  measure(state, machine_of(layered(12000, 20, false), 1), 1);
}
BENCHMARK(BM_OneStep)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace mop::engine
