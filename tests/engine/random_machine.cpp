#include "tests/engine/random_machine.h"

#include <algorithm>

namespace mop::engine {
namespace {

constexpr uint16_t kNode = 0, kAcross = 1, kEveryone = 2;

uint32_t below(std::mt19937& random, uint32_t bound) {
  return static_cast<uint32_t>(random() % bound);
}

Demand draw_demand(bool contention, std::mt19937& random) {
  Demand demand;
  const uint32_t kind = below(random, 10);
  demand.duration = kind == 0 ? 0 : kind < 8 ? 200 + below(random, 5000) : 20000 + below(random, 50000);
  demand.weight = below(random, 2) ? 1 : 1 + below(random, 40);
  if (!contention) {
    // Times are exact without contention. With it they are rounded, and what of two comes first decides who
    // waits.
    const uint32_t room = below(random, 4);  // or neither
    demand.takes_room = room < 2;
    demand.needs_room = room == 1 || room == 2;
    if (demand.takes_room) demand.kernels = static_cast<uint16_t>(1 + below(random, 4));
    demand.duration = demand.duration / demand.kernels * demand.kernels;  // whole times of each
    return demand;
  }
  const uint32_t uses = below(random, 4);
  std::array<uint32_t, kResources> order;
  for (uint32_t r = 0; r < kResources; ++r) order[r] = r;
  // Few different resources, so that they are contended for.
  std::swap(order[3], order[static_cast<size_t>(Resource::dram)]);
  std::shuffle(order.begin(), order.begin() + 5, random);
  for (uint32_t u = 0; u < uses; ++u) {
    const bool node = order[u] >= static_cast<uint32_t>(kFirstNodeResource);
    const auto most = static_cast<uint32_t>(kFull) / (node ? 1 + below(random, 8) : 1);
    demand.add(static_cast<Resource>(order[u]), below(random, 4) ? most / 3 + below(random, most / 2) : most);
  }
  return demand;
}

// The classes share the order and number of tasks on kEveryone; all else may differ.
TaskGraph draw_graph(const Draw& what, uint32_t everyone, std::mt19937& random) {
  TaskGraph graph;
  const uint32_t comm_streams = std::min(3u, what.streams - 1);
  const auto stream_of = [&](uint16_t comm) {
    return static_cast<uint8_t>(what.streams - 1 - comm % comm_streams);
  };
  std::vector<uint16_t> comms(what.tasks, kNoComm);
  if (what.meetings) {
    for (uint16_t& comm : comms) {
      if (below(random, 6) == 0) comm = static_cast<uint16_t>(below(random, 2));
    }
    for (uint32_t i = 0; i < everyone; ++i) comms[(i + 1) * what.tasks / (everyone + 1)] = kEveryone;
  }
  for (uint32_t t = 0; t < what.tasks; ++t) {
    Task task;
    task.demand = t;
    task.comm = comms[t];
    task.stream =
        task.comm == kNoComm ? static_cast<uint8_t>(below(random, what.streams)) : stream_of(task.comm);
    task.communication = task.comm != kNoComm || below(random, 8) == 0;
    if (what.launches) {
      task.launch_ns = below(random, 3) ? below(random, 300) : below(random, 3000);
      task.blocks_launch = below(random, 12) == 0;
    }
    graph.tasks.push_back(task);
    graph.demands.push_back(draw_demand(what.contention, random));
    for (uint32_t e = below(random, 4); e > 0 && t > 0; --e) {
      const uint32_t back = 1 + below(random, std::min(t, 12u));
      graph.edges.push_back({t - back, t, 0});
    }
  }
  for (uint32_t e = what.carried ? below(random, 8) : 0; e > 0; --e) {
    graph.edges.push_back({below(random, what.tasks), below(random, what.tasks), 1});
  }
  std::shuffle(graph.edges.begin(), graph.edges.end(), random);
  return graph;
}

}  // namespace

Pair draw(const Draw& what, std::mt19937& random) {
  Pair pair;
  const uint32_t everyone = 1 + below(random, 4), alike = what.ranks_of_class;
  for (uint32_t c = 0; c < what.classes; ++c)
    pair.folded.graphs.push_back(draw_graph(what, everyone, random));
  pair.unfolded.graphs = pair.folded.graphs;
  // A class that has no task on a communicator leaves its meeting points empty, which is allowed.
  for (const bool fold : {true, false}) {
    Machine& machine = fold ? pair.folded : pair.unfolded;
    machine.nodes = what.nodes;
    const uint32_t copies = fold ? 1 : alike;
    machine.meeting_size.push_back(what.nodes * what.classes * copies);
    const auto meeting = [&](uint32_t size) {
      machine.meeting_size.push_back(size);
      return static_cast<uint32_t>(machine.meeting_size.size() - 1);
    };
    std::vector<uint32_t> across;
    for (uint32_t i = 0; i < what.classes * copies; ++i) across.push_back(meeting(what.nodes));
    for (uint32_t node = 0; node < what.nodes; ++node) {
      for (uint32_t c = 0; c < what.classes; ++c) {
        const uint32_t within = meeting(copies);
        for (uint32_t i = 0; i < copies; ++i) {
          machine.ranks.push_back({.graph = c,
                                   .node = node,
                                   .multiplicity = fold ? alike : 1,
                                   .meeting = {within, across[c * copies + i], 0}});
        }
      }
    }
  }
  return pair;
}

}  // namespace mop::engine
