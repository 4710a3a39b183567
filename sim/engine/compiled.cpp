#include "sim/engine/compiled.h"

#include <fmt/format.h>

#include <algorithm>

#include "sim/base/error.h"

namespace mop::engine {
namespace {

constexpr Time kLongest = Time{1} << 42;  // 73 minutes: work in ns x kFull must fit 63 bits

template <typename... Args>
void check(bool holds, size_t graph, fmt::format_string<Args...> text, Args&&... args) {
  if (holds) return;
  throw InternalError(
      fmt::format("task graph {}: {}", graph, fmt::format(text, std::forward<Args>(args)...)));
}

CompiledDemand compile(const Demand& demand, size_t graph, size_t index) {
  check(demand.duration >= 0 && demand.duration <= kLongest, graph, "demand {} lasts {} ns, not 0 to 2^42",
        index, demand.duration);
  check(demand.weight >= 1 && demand.weight <= kFull, graph, "demand {} has weight {}, not 1 to 2^20", index,
        demand.weight);
  check(demand.uses <= demand.use.size(), graph, "demand {} has {} uses, at most 8 fit", index, demand.uses);
  check(demand.kernels >= 1, graph, "demand {} has no kernel", index);
  CompiledDemand compiled{demand.duration,   demand.weight,  0, 0, demand.takes_room,
                          demand.needs_room, demand.kernels, {}};
  for (size_t u = 0; u < demand.uses; ++u) {
    const Use& use = demand.use[u];
    const auto resource = static_cast<int>(use.resource);
    check(resource < kResources, graph, "demand {} uses resource {} of {}", index, resource, kResources);
    check(use.share <= kFull, graph, "demand {} uses {} / 2^20 of {}: more than all of it", index, use.share,
          name(use.resource));
    check((compiled.mask >> resource & 1) == 0, graph, "demand {} names {} twice", index, name(use.resource));
    if (use.share == 0) continue;
    compiled.mask = static_cast<uint16_t>(compiled.mask | 1 << resource);
    compiled.use[compiled.uses++] = use;
  }
  return compiled;
}

struct Incoming {
  uint32_t from;
  uint8_t steps;
};

// The edges of `graph` by the task that they lead to: those of task t are at [first[t], first[t + 1]).
struct IncomingEdges {
  std::vector<uint32_t> first;
  std::vector<Incoming> edges;
};

IncomingEdges incoming_edges(const TaskGraph& graph, size_t index) {
  const size_t size = graph.tasks.size();
  IncomingEdges in{std::vector<uint32_t>(size + 1), std::vector<Incoming>(graph.edges.size())};
  for (const Edge& edge : graph.edges) {
    check(edge.from < size && edge.to < size, index, "edge {} -> {} leaves the {} tasks", edge.from, edge.to,
          size);
    check(edge.steps <= 1, index, "edge {} -> {} spans {} steps, at most 1 is possible", edge.from, edge.to,
          edge.steps);
    check(edge.steps == 1 || edge.from < edge.to, index, "edge {} -> {} goes backwards: a cycle", edge.from,
          edge.to);
    ++in.first[edge.to + 1];
  }
  for (size_t t = 0; t < size; ++t) in.first[t + 1] += in.first[t];
  std::vector<uint32_t> next(in.first.begin(), in.first.end() - 1);
  for (const Edge& edge : graph.edges) in.edges[next[edge.to]++] = {edge.from, edge.steps};
  return in;
}

struct Kept {
  uint32_t from, to;
  bool next_step;
};

// The edges that are not implied. `done[t * streams + s]` counts from one the last task of stream s that has
// certainly completed when task t starts; what a stream waits for carried edges only ever grows along the
// stream.
std::vector<Kept> needed_edges(const TaskGraph& graph, const CompiledGraph& compiled, size_t index) {
  const size_t size = graph.tasks.size(), streams = compiled.heads.size();
  const IncomingEdges in = incoming_edges(graph, index);
  std::vector<Kept> kept;
  kept.reserve(graph.edges.size());
  std::vector<uint32_t> done(size * streams), carried_done(streams * streams);
  std::vector<uint32_t> last(streams, kNone);  // by stream: its latest task so far
  std::array<uint32_t, kMaxStreams> same, carried;

  for (uint32_t to = 0; to < size; ++to) {
    const size_t stream = compiled.tasks[to].stream;
    uint32_t* known = &done[to * streams];
    if (last[stream] != kNone) {
      std::copy_n(&done[last[stream] * streams], streams, known);
      known[stream] = last[stream] + 1;
    }
    last[stream] = to;
    if (in.first[to] == in.first[to + 1]) continue;

    same.fill(0);
    carried.fill(0);
    for (uint32_t e = in.first[to]; e < in.first[to + 1]; ++e) {
      uint32_t& latest = (in.edges[e].steps ? carried : same)[compiled.tasks[in.edges[e].from].stream];
      latest = std::max(latest, in.edges[e].from + 1);
    }
    same[stream] = carried[stream] = 0;  // a stream is in order by itself

    // Latest first: what an edge implies, it implies of earlier tasks.
    std::array<uint32_t, kMaxStreams> order;
    uint32_t count = 0;
    for (uint32_t s = 0; s < streams; ++s) {
      if (same[s] > 0) order[count++] = s;
    }
    std::sort(order.begin(), order.begin() + count,
              [&](uint32_t a, uint32_t b) { return same[a] > same[b]; });
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t s = order[i], from = same[s] - 1;
      if (known[s] > from) continue;
      kept.push_back({from, to, false});
      for (size_t other = 0; other < streams; ++other) {
        known[other] = std::max(known[other], done[from * streams + other]);
      }
      known[s] = from + 1;
    }
    for (uint32_t s = 0; s < streams; ++s) {
      uint32_t& waited = carried_done[stream * streams + s];
      if (carried[s] <= waited) continue;
      waited = carried[s];
      if (known[s] == 0)
        kept.push_back({carried[s] - 1, to, true});  // else all of the previous step is done there
    }
  }
  return kept;
}

}  // namespace

CompiledGraph compile(const TaskGraph& graph, size_t index) {
  CompiledGraph compiled;
  const size_t size = graph.tasks.size();
  check(size > 0, index, "it has no tasks");
  check(size < Successor::kMaxTasks, index, "{} tasks are too many", size);
  compiled.size = static_cast<uint32_t>(size);
  compiled.demands.reserve(graph.demands.size());
  for (size_t d = 0; d < graph.demands.size(); ++d) {
    compiled.demands.push_back(compile(graph.demands[d], index, d));
  }

  // Streams, launches and communicators.
  std::array<uint32_t, kMaxStreams> dense, last;
  dense.fill(kNone);
  compiled.tasks.resize(size + 1);
  compiled.segments.push_back({kNone, 0});
  for (uint32_t t = 0; t < size; ++t) {
    const Task& task = graph.tasks[t];
    check(task.demand < graph.demands.size(), index, "task {} has demand {} of {}", t, task.demand,
          graph.demands.size());
    check(task.stream < kMaxStreams, index, "task {} is on stream {} of {}", t, task.stream, kMaxStreams);
    uint32_t& stream = dense[task.stream];
    if (stream == kNone) {
      stream = static_cast<uint32_t>(compiled.heads.size());
      compiled.heads.push_back(t);
      compiled.stream_names.push_back(task.stream);
    } else {
      compiled.tasks[last[stream]].next = t;
    }
    last[stream] = t;

    Segment& segment = compiled.segments.back();
    segment.length += task.launch_ns;
    compiled.tasks[t] = {.demand = task.demand,
                         .next = kNone,
                         .first_successor = 0,
                         .segment = static_cast<uint32_t>(compiled.segments.size() - 1),
                         .launch = segment.length,
                         .comm = task.comm,
                         .stream = static_cast<uint8_t>(stream),
                         .blocks_launch = task.blocks_launch,
                         .communication = task.communication,
                         .computation = task.stream == 0 && !task.communication};
    if (task.blocks_launch) compiled.segments.push_back({t, 0});

    if (task.comm == kNoComm) continue;
    if (task.comm >= compiled.comm_tasks.size()) {
      compiled.comm_tasks.resize(task.comm + size_t{1});
      compiled.comm_stream.resize(task.comm + size_t{1});
    }
    if (compiled.comm_tasks[task.comm]++ == 0) compiled.comm_stream[task.comm] = static_cast<uint8_t>(stream);
    check(compiled.comm_stream[task.comm] == stream, index,
          "task {} uses communicator {} from stream {}, earlier tasks from stream {}", t, task.comm,
          task.stream, compiled.stream_names[compiled.comm_stream[task.comm]]);
  }

  // Edges, by the task that they come from.
  const std::vector<Kept> edges = needed_edges(graph, compiled, index);
  compiled.waits.resize(size);
  compiled.first_waits.resize(size);
  for (const Kept& edge : edges) {
    ++compiled.tasks[edge.from + 1].first_successor;
    ++compiled.waits[edge.to];
    if (!edge.next_step) ++compiled.first_waits[edge.to];
  }
  for (size_t t = 0; t < size; ++t)
    compiled.tasks[t + 1].first_successor += compiled.tasks[t].first_successor;
  compiled.successors.resize(edges.size());
  std::vector<uint32_t> filled(size);
  for (const Kept& edge : edges) {
    compiled.successors[compiled.tasks[edge.from].first_successor + filled[edge.from]++] = {
        edge.to, compiled.tasks[edge.to].stream, edge.next_step};
  }
  return compiled;
}

}  // namespace mop::engine
