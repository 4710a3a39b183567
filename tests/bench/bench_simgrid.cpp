// The same flows over the same links through SimGrid (s4u, with latencies and corrections off: plain max-min
// fairness) and through the engine. Prints what each takes, and fails when a flow's completion differs by
// more than 2 %.
//
// The patterns are kept short: where many flows meet, who shares with whom depends on the last nanosecond,
// and in runs four times as long making every flow 1 ns longer moves single completions by 2 % in either
// simulator.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <random>
#include <simgrid/s4u.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "sim/engine/engine.h"

namespace mop::engine {
namespace {

namespace sg = simgrid::s4u;

// Bytes per ns. Powers of two, so that shares and weights are exact.
constexpr Resource kNic = Resource::nic_out, kOther = Resource::nic_in, kRoot = Resource::root_up,
                   kDram = Resource::dram;
int64_t bandwidth(Resource resource) {
  return resource == kNic ? 8 : resource == kOther ? 4 : resource == kRoot ? 16 : 32;
}
constexpr int64_t kFastest = 32;

struct Flow {
  int stream;
  int64_t bytes;
  std::vector<Resource> links;
  std::vector<uint32_t> after;  // flows of the same rank, besides the one before on the stream
};

struct Pattern {
  std::string name;
  uint32_t nodes = 1;
  std::vector<std::vector<Flow>> ranks;  // spread evenly over the nodes
  size_t flows() const {
    size_t sum = 0;
    for (const auto& rank : ranks) sum += rank.size();
    return sum;
  }
  uint32_t node_of(size_t rank) const { return static_cast<uint32_t>(rank * nodes / ranks.size()); }
};

struct Outcome {
  double seconds = 0;                    // of this thread's processor: others may be busy on the machine
  std::vector<std::vector<double>> end;  // ns, by rank and flow
};

double processor_seconds() {
  return double(std::clock()) / CLOCKS_PER_SEC;
}

// ---- The engine ----

int64_t alone(const Flow& flow) {
  int64_t rate = kFastest;
  for (const Resource link : flow.links) rate = std::min(rate, bandwidth(link));
  return rate;
}

Outcome with_engine(const Pattern& pattern) {
  Machine machine;
  machine.nodes = pattern.nodes;
  machine.meeting_size = {static_cast<uint32_t>(pattern.ranks.size())};
  for (size_t r = 0; r < pattern.ranks.size(); ++r) {
    TaskGraph graph;
    for (const Flow& flow : pattern.ranks[r]) {
      const int64_t rate = alone(flow);
      Demand demand;
      demand.duration = flow.bytes / rate;
      demand.weight = static_cast<uint32_t>(kFastest / rate);
      for (const Resource link : flow.links)
        demand.add(link, static_cast<uint32_t>(kFull * rate / bandwidth(link)));
      Task task;
      task.demand = static_cast<uint32_t>(graph.demands.size());
      task.stream = static_cast<uint8_t>(flow.stream);
      for (const uint32_t from : flow.after) graph.edges.push_back({from, task.demand, 0});
      graph.demands.push_back(demand);
      graph.tasks.push_back(task);
    }
    // All ranks meet at the end, and the next step waits for that: only this step's flows are on the links.
    const auto last = static_cast<uint32_t>(graph.tasks.size());
    for (uint32_t t = 0; t < last; ++t) {
      graph.edges.push_back({t, last, 0});
      graph.edges.push_back({last, t, 1});
    }
    Task end;
    end.demand = last;
    end.stream = kMaxStreams - 1;
    end.comm = 0;
    graph.demands.push_back({});
    graph.tasks.push_back(end);
    machine.graphs.push_back(std::move(graph));
    machine.ranks.push_back(
        {.graph = static_cast<uint32_t>(r), .node = pattern.node_of(r), .multiplicity = 1, .meeting = {0}});
  }
  const double start = processor_seconds();
  const Report report = run(machine, {.max_steps = 1});
  Outcome outcome{processor_seconds() - start, {}};
  for (const RankReport& rank : report.ranks) {
    outcome.end.emplace_back();
    for (size_t t = 0; t + 1 < rank.spans.size(); ++t)
      outcome.end.back().push_back(double(rank.spans[t].end));
  }
  return outcome;
}

// ---- SimGrid ----

// A pair of hosts for each rank and set of links; a flow is a message between them. A stream is an actor that
// sends one after another; for each dependency it takes a semaphore that another actor releases. (As a graph
// of activities with successors, which SimGrid also offers, the same takes it ten times as long.) Only
// Engine::run is timed, not the making of the platform and the actors.
Outcome with_simgrid(const Pattern& pattern) {
  int argc = 2;
  char name[] = "bench_simgrid", quiet[] = "--log=root.thres:warning";
  char* argv[] = {name, quiet, nullptr};
  sg::Engine engine(&argc, argv);
  sg::Engine::set_config("network/model:CM02");
  sg::Engine::set_config("network/bandwidth-factor:1");
  sg::Engine::set_config("network/latency-factor:0");
  sg::Engine::set_config("network/weight-S:0");
  sg::Engine::set_config("network/TCP-gamma:0");
  sg::Engine::set_config("network/crosstraffic:0");

  sg::NetZone* zone = sg::create_full_zone("machine");
  std::map<std::string, sg::Link*> links;
  std::map<std::string, std::pair<sg::Host*, sg::Host*>> hosts;
  const auto link_of = [&](size_t rank, Resource resource) {
    const bool shared = static_cast<int>(resource) >= kFirstNodeResource;
    const std::string at =
        std::string(shared ? "node" : "rank") + std::to_string(shared ? pattern.node_of(rank) : rank);
    sg::Link*& link = links[at + mop::engine::name(resource)];
    if (link == nullptr) {
      link = zone->create_link(at + mop::engine::name(resource), 1e9 * double(bandwidth(resource)))
                 ->set_latency(0)
                 ->seal();
    }
    return link;
  };
  const auto hosts_of = [&](size_t rank, const Flow& flow) {
    std::string key = std::to_string(rank);
    for (const Resource link : flow.links) key += std::string("-") + mop::engine::name(link);
    auto& [from, to] = hosts[key];
    if (from == nullptr) {
      from = zone->create_host(key + "-from", 1e9)->seal();
      to = zone->create_host(key + "-to", 1e9)->seal();
      std::vector<sg::LinkInRoute> route;
      for (const Resource link : flow.links) route.emplace_back(link_of(rank, link));
      zone->add_route(from->get_netpoint(), to->get_netpoint(), nullptr, nullptr, route, false);
    }
    return std::pair{from, to};
  };

  using Route = std::pair<sg::Host*, sg::Host*>;
  std::vector<std::vector<Route>> routes(pattern.ranks.size());
  for (size_t r = 0; r < pattern.ranks.size(); ++r) {
    for (const Flow& flow : pattern.ranks[r]) routes[r].push_back(hosts_of(r, flow));
  }
  zone->seal();

  Outcome outcome;
  for (const auto& rank : pattern.ranks) outcome.end.emplace_back(rank.size());
  std::vector<std::vector<sg::SemaphorePtr>> ready(pattern.ranks.size());        // of flows with dependencies
  std::vector<std::vector<std::vector<uint32_t>>> before(pattern.ranks.size());  // by flow: who waits for it
  for (size_t r = 0; r < pattern.ranks.size(); ++r) {
    const std::vector<Flow>& flows = pattern.ranks[r];
    ready[r].resize(flows.size());
    before[r].resize(flows.size());
    for (uint32_t f = 0; f < flows.size(); ++f) {
      if (!flows[f].after.empty()) ready[r][f] = sg::Semaphore::create(0);
      for (const uint32_t from : flows[f].after) before[r][from].push_back(f);
    }
    for (int stream = 0; stream < kMaxStreams; ++stream) {
      if (std::none_of(flows.begin(), flows.end(), [&](const Flow& f) { return f.stream == stream; }))
        continue;
      sg::Actor::create(std::to_string(r), routes[r][0].first, [&, r, stream] {
        for (size_t f = 0; f < flows.size(); ++f) {
          if (flows[f].stream != stream) continue;
          for (size_t e = 0; e < flows[f].after.size(); ++e) ready[r][f]->acquire();
          sg::Comm::sendto(routes[r][f].first, routes[r][f].second, static_cast<uint64_t>(flows[f].bytes));
          outcome.end[r][f] = sg::Engine::get_clock() * 1e9;
          for (const uint32_t next : before[r][f]) ready[r][next]->release();
        }
      });
    }
  }
  const double start = processor_seconds();
  engine.run();
  outcome.seconds = processor_seconds() - start;
  return outcome;
}

// SimGrid knows one simulation a process, so each runs in a child that writes its outcome into a pipe.
Outcome in_child(const Pattern& pattern) {
  std::fflush(nullptr);
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("no pipe");
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("no child process");
  if (child == 0) {
    close(ends[0]);
    FILE* out = fdopen(ends[1], "w");
    const Outcome outcome = with_simgrid(pattern);
    std::fprintf(out, "%.9f\n", outcome.seconds);
    for (const auto& rank : outcome.end) {
      for (const double end : rank) std::fprintf(out, "%.6f\n", end);
    }
    std::fclose(out);
    _exit(0);
  }
  close(ends[1]);
  FILE* in = fdopen(ends[0], "r");
  Outcome outcome;
  bool complete = std::fscanf(in, "%lf", &outcome.seconds) == 1;
  for (const auto& rank : pattern.ranks) {
    outcome.end.emplace_back();
    for (size_t f = 0; f < rank.size(); ++f) {
      double end = 0;
      complete = complete && std::fscanf(in, "%lf", &end) == 1;
      outcome.end.back().push_back(end);
    }
  }
  std::fclose(in);
  int status = 0;
  waitpid(child, &status, 0);
  if (!complete || status != 0) throw std::runtime_error("SimGrid failed on pattern " + pattern.name);
  return outcome;
}

// ---- The patterns ----

std::vector<Pattern> patterns() {
  std::mt19937 random(3);
  const auto bytes = [&] { return 32 * (1000 + static_cast<int64_t>(random() % 100000)); };
  std::vector<Pattern> all;
  const auto add = [&](const char* name, uint32_t nodes, uint32_t ranks) -> Pattern& {
    all.push_back({name, nodes, std::vector<std::vector<Flow>>(ranks)});
    return all.back();
  };
  for (auto& rank : add("independent", 8, 64).ranks) {
    for (uint32_t f = 0; f < 200; ++f) rank.push_back({0, bytes(), {kNic}, {}});
  }
  for (auto& rank : add("one bottleneck", 1, 64).ranks) {
    for (uint32_t f = 0; f < 100; ++f) rank.push_back({0, bytes(), {kRoot}, {}});
  }
  for (auto& rank : add("NIC and node", 8, 64).ranks) {
    for (uint32_t f = 0; f < 200; ++f) rank.push_back({int(f % 2), bytes(), {kNic, kRoot}, {}});
  }
  for (auto& rank : add("random links", 8, 64).ranks) {
    for (uint32_t f = 0; f < 200; ++f) {
      std::vector<Resource> links;
      const auto set = 1 + random() % 15;
      for (const auto& [bit, link] : {std::pair{1u, kNic}, {2u, kOther}, {4u, kRoot}, {8u, kDram}}) {
        if (set & bit) links.push_back(link);
      }
      rank.push_back({int(f % 4), bytes(), links, {}});
    }
  }
  for (auto& rank : add("dependencies", 8, 64).ranks) {
    for (uint32_t f = 0; f < 200; ++f) {
      Flow flow{int(random() % 6), bytes(), {f % 2 ? kNic : kOther}, {}};
      if (f % 3 == 0) flow.links.push_back(kRoot);
      for (uint32_t e = 0; e < 2 && f > 0; ++e) {
        const auto from = static_cast<uint32_t>(f - 1 - random() % std::min(f, 12u));
        if (std::find(flow.after.begin(), flow.after.end(), from) == flow.after.end())
          flow.after.push_back(from);
      }
      rank.push_back(flow);
    }
  }
  return all;
}

// The largest relative one between two completion times of a flow; also when they are not numbers.
double difference(const Outcome& a, const Outcome& b) {
  double worst = 0;
  for (size_t r = 0; r < a.end.size(); ++r) {
    for (size_t f = 0; f < a.end[r].size(); ++f) {
      const double differs = std::abs(a.end[r][f] / b.end[r][f] - 1);
      if (!(differs <= worst)) worst = differs;
    }
  }
  return worst;
}

int compare() {
  constexpr double kTolerance = 0.02;
  constexpr int kRuns = 3;  // the best counts, on both sides
  bool agree = true;
  std::printf("%-16s %8s %16s %16s %8s %14s\n", "pattern", "flows", "engine flows/s", "SimGrid flows/s",
              "ratio", "worst differs");
  for (const Pattern& pattern : patterns()) {
    Outcome ours = with_engine(pattern), theirs = in_child(pattern);
    const double worst = difference(ours, theirs);
    for (int i = 1; i < kRuns; ++i) {
      ours.seconds = std::min(ours.seconds, with_engine(pattern).seconds);
      theirs.seconds = std::min(theirs.seconds, in_child(pattern).seconds);
    }
    if (!(worst <= kTolerance)) agree = false;
    const auto flows = static_cast<double>(pattern.flows());
    std::printf("%-16s %8zu %16.0f %16.0f %8.1f %12.4f %%\n", pattern.name.c_str(), pattern.flows(),
                flows / ours.seconds, flows / theirs.seconds, theirs.seconds / ours.seconds, 100 * worst);
  }
  if (!agree) std::printf("FAILED: completion times differ by more than 2 %%\n");
  return agree ? 0 : 1;
}

}  // namespace
}  // namespace mop::engine

int main() {
  return mop::engine::compare();
}
