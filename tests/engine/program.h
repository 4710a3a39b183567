// Programs written by hand, for tests: one line a task.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "sim/engine/engine.h"

namespace mop::engine {

inline constexpr uint32_t kHalf = kFull / 2;
inline constexpr uint32_t kAll = kFull;

struct Program {
  TaskGraph graph;

  // A task on `stream` after `after`; returns its index.
  uint32_t task(int stream, Time duration, std::initializer_list<uint32_t> after = {},
                std::initializer_list<Use> uses = {}, uint32_t weight = 1) {
    Demand demand;
    demand.duration = duration;
    demand.weight = weight;
    for (const Use& use : uses) demand.add(use.resource, use.share);
    const auto index = static_cast<uint32_t>(graph.tasks.size());
    Task task;
    task.demand = static_cast<uint32_t>(graph.demands.size());
    task.stream = static_cast<uint8_t>(stream);
    graph.demands.push_back(demand);
    graph.tasks.push_back(task);
    for (const uint32_t from : after) graph.edges.push_back({from, index, 0});
    return index;
  }

  uint32_t meet(uint16_t comm, int stream, Time duration, std::initializer_list<uint32_t> after = {},
                std::initializer_list<Use> uses = {}) {
    const uint32_t index = task(stream, duration, after, uses);
    graph.tasks[index].comm = comm;
    graph.tasks[index].communication = true;
    return index;
  }

  Task& operator[](uint32_t index) { return graph.tasks[index]; }

  // `to` of the next step waits for `from`.
  void carry(uint32_t from, uint32_t to) { graph.edges.push_back({from, to, 1}); }

  // No task of the next step starts before the last task of this one has completed: steps do not overlap.
  void barrier() {
    const auto last = static_cast<uint32_t>(graph.tasks.size() - 1);
    for (uint32_t t = 0; t < last; ++t) carry(last, t);
    for (uint32_t t = 0; t < last; ++t) {
      if (graph.tasks[t].stream != graph.tasks[last].stream) graph.edges.push_back({t, last, 0});
    }
  }
};

// Every rank on node 0 and with a program of its own; communicator c of each is meeting point c of all that
// use it.
inline Machine machine_of(std::initializer_list<Program> programs) {
  Machine machine;
  machine.nodes = 1;
  for (const Program& program : programs) {
    Rank rank;
    rank.graph = static_cast<uint32_t>(machine.graphs.size());
    std::vector<bool> met;
    for (const Task& task : program.graph.tasks) {
      if (task.comm == kNoComm) continue;
      const size_t comms = task.comm + size_t{1};
      while (rank.meeting.size() < comms) rank.meeting.push_back(static_cast<uint32_t>(rank.meeting.size()));
      if (machine.meeting_size.size() < comms) machine.meeting_size.resize(comms);
      if (met.size() < comms) met.resize(comms);
      if (!met[task.comm]) ++machine.meeting_size[task.comm];
      met[task.comm] = true;
    }
    machine.graphs.push_back(program.graph);
    machine.ranks.push_back(rank);
  }
  return machine;
}

// Exactly so many steps, steady or not.
inline Report run_steps(const Machine& machine, int steps) {
  return run(machine, {.max_steps = steps, .tolerance = -1});
}

}  // namespace mop::engine
