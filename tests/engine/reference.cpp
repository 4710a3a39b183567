#include "tests/engine/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

namespace mop::engine {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = 1e-6;  // ns

// One task of one step of one rank.
struct Instance {
  size_t task;
  int step;
  double remaining = 0, start = kInfinity, work_end = kInfinity, end = kInfinity, without_room = 0;
  bool arrived = false;
  // Instances of its rank of which no more work than this must be left before it gets room.
  std::vector<std::pair<size_t, double>> room_of;
  std::vector<std::pair<size_t, size_t>>
      meets;  // (rank, instance) of all that meet; just itself without a communicator
};

struct Flow {
  const Demand* demand;
  size_t rank;
  double rate = 0;
  bool frozen = false;
};

struct Slow {
  const Machine& machine;
  int steps;  // and one more, which overlaps the last
  std::vector<std::vector<Instance>> ranks;
  double now = 0;

  const TaskGraph& graph(size_t r) const { return machine.graphs[machine.ranks[r].graph]; }
  size_t tasks(size_t r) const { return graph(r).tasks.size(); }

  std::vector<double> launch_ends(size_t r) const {
    std::vector<double> ends;
    double cpu = 0;
    for (const Instance& i : ranks[r]) {
      const Task& task = graph(r).tasks[i.task];
      ends.push_back(cpu += task.launch_ns);
      if (task.blocks_launch) cpu = i.end;
    }
    return ends;
  }

  bool ready(size_t r, size_t n, const std::vector<double>& launched) const {
    const std::vector<Instance>& all = ranks[r];
    const Instance& i = all[n];
    if (launched[n] > now + kEpsilon) return false;
    for (size_t before = 0; before < n; ++before) {
      const bool same_stream = graph(r).tasks[all[before].task].stream == graph(r).tasks[i.task].stream;
      if ((same_stream || all[before].step <= i.step - 2) && all[before].end == kInfinity) return false;
    }
    for (const Edge& edge : graph(r).edges) {
      if (edge.to != i.task || i.step < edge.steps) continue;
      if (all[static_cast<size_t>(i.step - edge.steps) * tasks(r) + edge.from].end == kInfinity) return false;
    }
    return true;
  }

  std::vector<std::pair<size_t, size_t>> participants(size_t r, size_t n) const {
    const uint16_t comm = graph(r).tasks[ranks[r][n].task].comm;
    if (comm == kNoComm) return {{r, n}};
    const uint32_t point = machine.ranks[r].meeting[comm];
    size_t turn = 0;
    for (size_t i = 0; i < n; ++i) turn += graph(r).tasks[ranks[r][i].task].comm == comm;
    std::vector<std::pair<size_t, size_t>> all;
    for (size_t other = 0; other < ranks.size(); ++other) {
      size_t count = 0;
      for (size_t i = 0; i < ranks[other].size(); ++i) {
        const uint16_t c = graph(other).tasks[ranks[other][i].task].comm;
        if (c == kNoComm || machine.ranks[other].meeting[c] != point) continue;
        if (count++ == turn) all.push_back({other, i});
      }
    }
    return all;
  }

  bool running(const Instance& i) const { return i.start < kInfinity && i.work_end == kInfinity; }
  const Demand& demand(size_t r, const Instance& i) const {
    return graph(r).demands[graph(r).tasks[i.task].demand];
  }
  bool has_room(size_t r, const Instance& i) const {
    return std::all_of(i.room_of.begin(), i.room_of.end(), [&](const auto& of) {
      const Instance& other = ranks[r][of.first];
      return other.work_end < kInfinity || (of.second > 0 && other.remaining <= of.second + kEpsilon);
    });
  }
  void start(size_t r, Instance& i) {
    i.start = now;
    if (!demand(r, i).needs_room || i.remaining == 0) return;
    for (size_t other = 0; other < ranks[r].size(); ++other) {
      const Instance& before = ranks[r][other];
      if (!running(before) || before.start >= now - kEpsilon || !demand(r, before).takes_room) continue;
      const auto all = double(demand(r, before).duration), kernel = all / demand(r, before).kernels;
      const double ended = std::ceil((all - before.remaining) / kernel - kEpsilon / kernel);
      i.room_of.emplace_back(other, std::max(0.0, all - ended * kernel));
    }
  }

  // Raises the level in small exact strides: to the next bound or the next saturation.
  void share(std::vector<Flow>& flows) const {
    const size_t nodes = machine.nodes, count = ranks.size();
    const auto index = [&](const Flow& flow, const Use& use) {
      const auto r = static_cast<size_t>(use.resource);
      return r < kFirstNodeResource ? flow.rank * kResources + r
                                    : (count + machine.ranks[flow.rank].node) * kResources + r;
    };
    const auto amount = [&](const Flow& flow, const Use& use) {
      const bool node = static_cast<int>(use.resource) >= kFirstNodeResource;
      return double(use.share) / double(kFull) * (node ? machine.ranks[flow.rank].multiplicity : 1);
    };
    double level = 0;
    for (;;) {
      std::vector<double> used((count + nodes) * kResources), slope((count + nodes) * kResources);
      double next = kInfinity;
      for (const Flow& flow : flows) {
        if (!flow.frozen) next = std::min(next, 1.0 / flow.demand->weight);
        for (size_t u = 0; u < flow.demand->uses; ++u) {
          const Use& use = flow.demand->use[u];
          if (flow.frozen) used[index(flow, use)] += amount(flow, use) * flow.rate;
          if (!flow.frozen) slope[index(flow, use)] += amount(flow, use) * flow.demand->weight;
        }
      }
      for (size_t r = 0; r < used.size(); ++r) {
        if (slope[r] > 0) next = std::min(next, std::max(level, (1 - used[r]) / slope[r]));
      }
      if (next == kInfinity) return;
      level = next;
      for (Flow& flow : flows) {
        if (flow.frozen) continue;
        bool stop = level * flow.demand->weight >= 1 - 1e-12;
        for (size_t u = 0; u < flow.demand->uses; ++u) {
          const size_t r = index(flow, flow.demand->use[u]);
          stop |= flow.demand->use[u].share > 0 && used[r] + slope[r] * level >= 1 - 1e-12;
        }
        if (!stop) continue;
        flow.rate = std::min(1.0, level * flow.demand->weight);
        flow.frozen = true;
      }
    }
  }

  // Starts and completes all that can at this time.
  void settle() {
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t r = 0; r < ranks.size(); ++r) {
        const std::vector<double> launched = launch_ends(r);
        for (size_t n = 0; n < ranks[r].size(); ++n) {
          Instance& i = ranks[r][n];
          if (i.end < kInfinity) continue;
          if (running(i) && i.remaining <= kEpsilon && has_room(r, i)) {
            i.work_end = now;
            changed = true;
          }
          if (i.start == kInfinity && !i.arrived && ready(r, n, launched)) i.arrived = changed = true;
          const auto& all = i.meets;
          const auto every = [&](auto holds) {
            return std::all_of(all.begin(), all.end(),
                               [&](auto p) { return holds(ranks[p.first][p.second]); });
          };
          if (i.start == kInfinity && every([](const Instance& p) { return p.arrived; })) {
            for (const auto& [other, at] : all) start(other, ranks[other][at]);
            changed = true;
          }
          if (i.end == kInfinity && every([](const Instance& p) { return p.work_end < kInfinity; })) {
            for (const auto& [other, at] : all) ranks[other][at].end = now;
            changed = true;
          }
        }
      }
    }
  }

  double step_end(int step) const {
    double end = 0;
    for (const auto& rank : ranks) {
      for (const Instance& i : rank) {
        if (i.step <= step) end = std::max(end, i.end);
      }
    }
    return end;
  }

  void run() {
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (int step = 0; step <= steps; ++step) {
        for (size_t t = 0; t < tasks(r); ++t) {
          Instance i;
          i.task = t;
          i.step = step;
          i.remaining = double(demand(r, i).duration);
          ranks[r].push_back(i);
        }
      }
    }
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (size_t n = 0; n < ranks[r].size(); ++n) ranks[r][n].meets = participants(r, n);
    }
    for (;;) {
      settle();
      if (step_end(steps - 1) < kInfinity) return;
      std::vector<Flow> flows;
      std::vector<Instance*> owners;
      double next = kInfinity;
      for (size_t r = 0; r < ranks.size(); ++r) {
        for (const double end : launch_ends(r)) {
          if (end > now + kEpsilon) next = std::min(next, end);
        }
        for (Instance& i : ranks[r]) {
          if (!running(i) || !has_room(r, i)) continue;
          flows.push_back({&graph(r).demands[graph(r).tasks[i.task].demand], r});
          owners.push_back(&i);
        }
      }
      share(flows);
      for (size_t f = 0; f < flows.size(); ++f) {
        next = std::min(next, now + owners[f]->remaining / flows[f].rate);
        for (const Instance& i : ranks[flows[f].rank])  // those that wait for the end of one of its kernels
          for (const auto& [other, left] : i.room_of)
            if (running(i) && &ranks[flows[f].rank][other] == owners[f] &&
                owners[f]->remaining > left + kEpsilon)
              next = std::min(next, now + (owners[f]->remaining - left) / flows[f].rate);
      }
      if (next == kInfinity) throw std::runtime_error("the reference is stuck");
      for (size_t r = 0; r < ranks.size(); ++r)
        for (Instance& i : ranks[r])
          if (running(i) && !has_room(r, i)) i.without_room += next - now;
      for (size_t f = 0; f < flows.size(); ++f) owners[f]->remaining -= (next - now) * flows[f].rate;
      now = next;
    }
  }
};

}  // namespace

ReferenceResult simulate_slowly(const Machine& machine, int steps) {
  Slow slow{machine, steps, std::vector<std::vector<Instance>>(machine.ranks.size())};
  slow.run();
  ReferenceResult result;
  for (int step = 0; step < steps; ++step) result.step_end.push_back(slow.step_end(step));
  for (const auto& rank : slow.ranks) {
    result.start.emplace_back();
    result.end.emplace_back();
    result.busy.emplace_back();
    for (const Instance& i : rank) {
      if (i.step != steps - 1) continue;
      result.start.back().push_back(i.start);
      result.end.back().push_back(i.end);
      result.busy.back().push_back(i.end - i.start - i.without_room);
    }
  }
  return result;
}

}  // namespace mop::engine
