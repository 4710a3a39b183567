#include "sim/engine/simulation.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <utility>

#include "sim/base/error.h"

namespace mop::engine {
namespace {

constexpr int64_t kMostRanksOfNode = 4096;  // then every product in the solver fits its type

template <typename... Args>
void check(bool holds, fmt::format_string<Args...> text, Args&&... args) {
  if (!holds) throw InternalError(fmt::format(text, std::forward<Args>(args)...));
}

uint32_t set_of(int32_t step) {
  return static_cast<uint32_t>(step) % kSets;
}

}  // namespace

// ---- Setting up ----

Simulation::Simulation(const Machine& machine, const Options& options)
    : options_(options),
      ranks_(machine.ranks.size()),
      nodes_(machine.nodes),
      meetings_(machine.meeting_size.size()) {
  check(!machine.ranks.empty(), "the machine has no ranks");
  check(options.max_steps >= 1, "max_steps is {}, it must be at least 1", options.max_steps);
  graphs_.reserve(machine.graphs.size());
  for (size_t g = 0; g < machine.graphs.size(); ++g) graphs_.push_back(compile(machine.graphs[g], g));
  for (uint32_t r = 0; r < ranks_.size(); ++r) add_rank(machine, r);
  for (uint32_t r = 0; r < ranks_.size(); ++r) join_meetings(machine, r);
  for (size_t m = 0; m < meetings_.size(); ++m) {
    const size_t ranks = meetings_[m].slots.size();
    check(ranks == 0 || ranks == machine.meeting_size[m], "{} ranks use meeting point {}, which is for {}",
          ranks, m, machine.meeting_size[m]);
  }
  for (RankState& rank : ranks_) {
    for (uint32_t& m : rank.meeting) {
      if (m != kNone && meetings_[m].slots.size() == 1) m = kNone;
    }
  }
  heap_.resize(static_cast<uint32_t>(slots_.size()));
}

void Simulation::add_rank(const Machine& machine, uint32_t r) {
  const Rank& given = machine.ranks[r];
  check(given.graph < graphs_.size(), "rank {} runs task graph {} of {}", r, given.graph, graphs_.size());
  check(given.node < nodes_.size(), "rank {} is on node {} of {}", r, given.node, nodes_.size());
  check(given.multiplicity >= 1, "rank {} stands for no rank: multiplicity 0", r);
  RankState& rank = ranks_[r];
  const CompiledGraph& graph = graphs_[given.graph];
  rank.graph = &graph;
  rank.node = given.node;
  rank.multiplicity = given.multiplicity;
  rank.first_slot = static_cast<uint32_t>(slots_.size());

  NodeState& node = nodes_[given.node];
  node.ranks.push_back(r);
  int64_t on_node = 0;
  for (const uint32_t other : node.ranks) on_node += ranks_[other].multiplicity;
  check(on_node <= kMostRanksOfNode, "node {} has more than {} ranks", given.node, kMostRanksOfNode);

  for (uint32_t stream = 0; stream < graph.heads.size(); ++stream) {
    Slot slot;
    slot.rank = r;
    slot.task = graph.heads[stream];
    slot.stream = static_cast<uint8_t>(stream);
    slots_.push_back(slot);
  }

  const size_t segments = graph.segments.size();
  rank.waits_store.resize(kSets * graph.size);
  rank.opened_store.assign(kSets * segments, kNever);
  for (uint32_t set = 0; set < kSets; ++set) {
    const std::vector<uint8_t>& waits = set == 0 ? graph.first_waits : graph.waits;
    rank.left[set] = graph.size;
    rank.waits[set] = rank.waits_store.data() + set * graph.size;
    std::copy(waits.begin(), waits.end(), rank.waits[set]);
    rank.opened[set] = rank.opened_store.data() + set * segments;
  }
  begin_records(rank, 0);
  begin_records(rank, 1);
  open_segment(rank, 0, 0, 0);
}

void Simulation::join_meetings(const Machine& machine, uint32_t r) {
  const CompiledGraph& graph = *ranks_[r].graph;
  const std::vector<uint32_t>& given = machine.ranks[r].meeting;
  std::vector<uint32_t>& meeting = ranks_[r].meeting;
  meeting.assign(graph.comm_tasks.size(), kNone);
  for (size_t comm = 0; comm < meeting.size(); ++comm) {
    const uint32_t tasks = graph.comm_tasks[comm];
    if (tasks == 0) continue;
    check(comm < given.size(), "rank {} uses communicator {} but has meeting points for {}", r, comm,
          given.size());
    const uint32_t m = meeting[comm] = given[comm];
    check(m < meetings_.size(), "rank {}, communicator {}: meeting point {} of {}", r, comm, m,
          meetings_.size());
    Meeting& joined = meetings_[m];
    const uint32_t slot = ranks_[r].first_slot + graph.comm_stream[comm];
    check(joined.slots.empty() || slots_[joined.slots.back()].rank != r,
          "rank {} meets itself at meeting point {}", r, m);
    check(joined.slots.empty() || joined.tasks == tasks,
          "rank {} has {} tasks a step at meeting point {}, rank {} has {}", r, tasks, m,
          joined.slots.empty() ? 0 : slots_[joined.slots.front()].rank, joined.tasks);
    joined.tasks = tasks;
    joined.slots.push_back(slot);
  }
}

// ---- Time ----

void Simulation::run() {
  for (uint32_t r = 0; r < ranks_.size(); ++r) consider_all(ranks_[r], {r, Cause::kLaunched});
  for (;;) {
    while (!instant_.empty() && !stopped_) {
      const uint32_t s = instant_.back();
      instant_.pop_back();
      finish_work(s);
    }
    if (stopped_) return;
    if (heap_.empty() || heap_.top().time != now_) {
      // All that happens now has happened.
      solve_dirty();
      if (heap_.empty()) deadlock();
      now_ = heap_.top().time;
      ensure(now_ < kNever, "some task makes progress while tasks are running");
    }
    const uint32_t s = heap_.top().slot;
    Slot& slot = slots_[s];
    if (slot.state == State::running) {
      finish_work(s);
    } else {
      slot.state = State::idle;
      consider(s, {slot.rank, slot.task | Cause::kLaunched});
    }
    // Unless the slot has found something to do until later.
    if (heap_.top().time == now_ && heap_.top().slot == s) heap_.pop();
  }
}

void Simulation::consider(uint32_t s, Cause cause) {
  Slot& slot = slots_[s];
  if (slot.state != State::idle) return;
  const RankState& rank = ranks_[slot.rank];
  if (slot.step > rank.done + 1 || slot.step > options_.max_steps) return;
  if (rank.waits[slot.set][slot.task] != 0) return;
  const CompiledTask& task = rank.graph->tasks[slot.task];
  const Time launched = rank.opened[slot.set][task.segment] + task.launch;
  if (launched > now_) {
    if (launched >= kNever) return;  // considered again when the segment opens
    slot.state = State::launching;
    heap_.set(s, launched);
    return;
  }

  slot.meeting = task.comm == kNoComm ? kNone : rank.meeting[task.comm];
  if (slot.meeting == kNone) {
    start(s, cause);
    return;
  }
  Meeting& meeting = meetings_[slot.meeting];
  slot.state = State::arrived;
  if (++meeting.arrived < meeting.slots.size()) return;
  meeting.arrived = 0;
  meeting.working = static_cast<uint32_t>(meeting.slots.size());
  for (const uint32_t other : meeting.slots) start(other, cause);
}

void Simulation::start(uint32_t s, Cause cause) {
  Slot& slot = slots_[s];
  RankState& rank = ranks_[slot.rank];
  const CompiledTask& task = rank.graph->tasks[slot.task];
  ++started_;
  Record& record = rank.records[slot.set][slot.task];
  record.start = now_;
  record.without_room = 0;
  record.room_of = kNone;
  record.cause = cause;
  if (task.computation || task.communication) {
    tally(rank);
    rank.computing += task.computation;
    rank.communicating += task.communication;
  }
  slot.demand = &rank.graph->demands[task.demand];
  slot.state = State::running;
  if (slot.demand->duration == 0) {
    instant_.push_back(s);
    return;
  }
  slot.remaining = slot.demand->duration * kFull;
  if (slot.demand->takes_room) rank.taking |= 1u << slot.stream;
  slot.room_of = slot.demand->needs_room ? earlier(rank, slot) : 0;
  if (slot.room_of == 0) return admit(s);
  rank.without |= 1u << slot.stream;
  heap_.set(s, kNever);
}

void Simulation::finish_work(uint32_t s) {
  Slot& slot = slots_[s];
  if (slot.behind > 0) return go_on(s);
  if (slot.demand->duration > 0) {
    RankState& rank = ranks_[slot.rank];
    release(slot);
    if (slot.demand->takes_room) rank.taking &= ~(1u << slot.stream), let_in(rank, slot);
  }
  if (slot.meeting == kNone) {
    complete(s);
    return;
  }
  Meeting& meeting = meetings_[slot.meeting];
  slot.state = State::holding;
  if (--meeting.working > 0) return;
  for (const uint32_t other : meeting.slots) complete(other);
}

void Simulation::complete(uint32_t s) {
  Slot& slot = slots_[s];
  RankState& rank = ranks_[slot.rank];
  const CompiledGraph& graph = *rank.graph;
  const CompiledTask& task = graph.tasks[slot.task];
  const Cause cause{slot.rank, slot.task};
  const uint32_t set = slot.set;
  const int32_t step = slot.step;
  ++completed_;
  rank.records[set][slot.task].end = now_;
  if (task.computation || task.communication) {
    tally(rank);
    rank.computing -= task.computation;
    rank.communicating -= task.communication;
  }

  slot.state = State::idle;
  slot.task = task.next;
  if (slot.task == kNone) {
    slot.task = graph.heads[slot.stream];
    ++slot.step;
    slot.set = static_cast<uint8_t>(set_of(slot.step));
  }

  const Successor* const end = graph.successors.data() + (&task)[1].first_successor;
  for (const Successor* next = graph.successors.data() + task.first_successor; next < end; ++next) {
    const uint32_t next_set = set_of(step + static_cast<int32_t>(next->steps()));
    if (--rank.waits[next_set][next->task()] > 0) continue;
    const uint32_t waiting = rank.first_slot + next->stream();
    if (slots_[waiting].task == next->task() && slots_[waiting].set == next_set) consider(waiting, cause);
  }
  if (task.blocks_launch) {
    open_segment(rank, step, task.segment + 1, now_);
    consider_all(rank, cause);
  } else {
    consider(s, cause);
  }
  if (--rank.left[set] == 0) end_step(rank, cause);
}

void Simulation::consider_all(const RankState& rank, Cause cause) {
  const auto streams = static_cast<uint32_t>(rank.graph->heads.size());
  for (uint32_t stream = 0; stream < streams; ++stream) consider(rank.first_slot + stream, cause);
}

// Launches go on from one step into the next, so opening the last segment of a step opens the first of the
// next one, as far as there is state for that step.
void Simulation::open_segment(RankState& rank, int32_t step, uint32_t segment, Time base) {
  const std::vector<Segment>& segments = rank.graph->segments;
  rank.opened[set_of(step)][segment] = base;
  while (segment + 1 == segments.size() && step + 1 < rank.done + static_cast<int32_t>(kSets)) {
    base += segments[segment].length;
    segment = 0;
    rank.opened[set_of(++step)][0] = base;
  }
}

void Simulation::end_step(RankState& rank, Cause cause) {
  const CompiledGraph& graph = *rank.graph;
  const int32_t step = rank.done++, recycled = step + static_cast<int32_t>(kSets);
  const uint32_t set = set_of(step), before = set_of(recycled - 1);
  const size_t segments = graph.segments.size();
  rank.left[set] = graph.size;
  std::copy(graph.waits.begin(), graph.waits.end(), rank.waits[set]);
  std::fill_n(rank.opened[set], segments, kNever);
  if (rank.opened[before][segments - 1] < kNever) {
    open_segment(rank, recycled - 1, static_cast<uint32_t>(segments - 1), rank.opened[before][segments - 1]);
  }
  if (++finishers_[static_cast<size_t>(step)] == ranks_.size()) end_step_everywhere(step, cause);
  if (stopped_) return;
  begin_records(rank, step + 2);
  consider_all(rank, cause);
}

void Simulation::end_step_everywhere(int32_t step, Cause cause) {
  step_end_.push_back(now_);
  last_ = cause;
  if (step > 0) {
    const size_t n = step_end_.size();
    const Time time = now_ - step_end_[n - 2], previous = step_end_[n - 2] - (n > 2 ? step_end_[n - 3] : 0);
    const auto difference = static_cast<double>(std::abs(time - previous));
    steady_ = difference <= options_.tolerance * static_cast<double>(std::max(time, previous));
  }
  account_all();
  stopped_ = steady_ || step + 1 >= options_.max_steps;
  if (stopped_) return;
  for (NodeState& node : nodes_) node.used = {};
  for (RankState& rank : ranks_) {
    rank.used = {};
    rank.compute_busy = rank.exposed_communication = 0;
    rank.spare.push_back(std::move(rank.history.front()));
    rank.history.pop_front();
  }
}

void Simulation::begin_records(RankState& rank, int32_t step) {
  if (finishers_.size() <= static_cast<size_t>(step)) finishers_.resize(static_cast<size_t>(step) + 1);
  if (rank.spare.empty()) {
    rank.history.push_back(std::make_unique_for_overwrite<Record[]>(rank.graph->size));
  } else {
    rank.history.push_back(std::move(rank.spare.back()));
    rank.spare.pop_back();
  }
  rank.records[set_of(step)] = rank.history.back().get();
}

// ---- Room ----

// What starts at the same time leaves room: which of the two is considered first must not matter.
uint32_t Simulation::earlier(const RankState& rank, const Slot& slot) {
  uint32_t streams = 0;
  for (uint32_t taking = rank.taking & ~rank.without & ~(1u << slot.stream); taking; taking &= taking - 1) {
    const auto stream = static_cast<uint32_t>(std::countr_zero(taking));
    const Slot& other = slots_[rank.first_slot + stream];
    if (rank.records[other.set][other.task].start < now_ && stop_behind_kernel(rank.first_slot + stream))
      streams |= 1u << stream;
  }
  return streams;
}

bool Simulation::stop_behind_kernel(uint32_t s) {
  Slot& slot = slots_[s];
  if (slot.behind > 0) return true;
  account(slot);
  const int64_t all = slot.demand->duration * kFull,
                kernel = std::max<int64_t>(1, all / slot.demand->kernels), done = all - slot.remaining,
                ended = done / kernel;
  if (done == ended * kernel) return false;
  if (ended + 1 >= slot.demand->kernels) return true;  // the last one
  const int64_t left = (ended + 1) * kernel - done;
  slot.behind = slot.remaining - left;
  slot.remaining = left;
  expect_end(s);
  return true;
}

// The next kernel, beside those that have waited for the end of this one.
void Simulation::go_on(uint32_t s) {
  Slot& slot = slots_[s];
  account(slot);
  slot.remaining += std::exchange(slot.behind, 0);
  expect_end(s);
  let_in(ranks_[slot.rank], slot);
}

void Simulation::admit(uint32_t s) {
  Slot& slot = slots_[s];
  slot.since = now_;
  slot.rate = kFull;  // until the batch of this time stamp is solved
  acquire(slot);
  heap_.set(s, now_ + slot.demand->duration);
}

void Simulation::let_in(RankState& rank, const Slot& slot) {
  const uint32_t bit = 1u << slot.stream;
  for (uint32_t without = rank.without; without; without &= without - 1) {
    const auto stream = static_cast<uint32_t>(std::countr_zero(without));
    Slot& other = slots_[rank.first_slot + stream];
    if ((other.room_of &= ~bit) != 0) continue;
    rank.without &= ~(1u << stream);
    Record& record = rank.records[other.set][other.task];
    record.without_room = now_ - record.start;
    if (other.step == slot.step) record.room_of = slot.task;
    admit(rank.first_slot + stream);
  }
}

// ---- Resources ----

void Simulation::acquire(Slot& slot) {
  RankState& rank = ranks_[slot.rank];
  NodeState& node = nodes_[rank.node];
  const CompiledDemand& demand = *slot.demand;
  for (uint32_t u = 0; u < demand.uses; ++u) {
    const auto resource = static_cast<uint32_t>(demand.use[u].resource);
    if (resource < kFirstNodeResource) {
      rank.load[resource] += demand.use[u].share;
      rank.over |= static_cast<uint32_t>(rank.load[resource] > kFull) << resource;
    } else {
      node.load[resource] += demand.use[u].share * rank.multiplicity;
      node.over |= static_cast<uint32_t>(node.load[resource] > kFull) << resource;
    }
  }
  rank.running |= 1u << slot.stream;
  mark_dirty(rank, demand.mask);
}

void Simulation::release(Slot& slot) {
  account(slot);
  RankState& rank = ranks_[slot.rank];
  NodeState& node = nodes_[rank.node];
  const CompiledDemand& demand = *slot.demand;
  mark_dirty(rank, demand.mask);
  rank.running &= ~(1u << slot.stream);
  for (uint32_t u = 0; u < demand.uses; ++u) {
    const auto resource = static_cast<uint32_t>(demand.use[u].resource);
    if (resource < kFirstNodeResource) {
      rank.load[resource] -= demand.use[u].share;
      rank.over &= ~(static_cast<uint32_t>(rank.load[resource] <= kFull) << resource);
    } else {
      node.load[resource] -= demand.use[u].share * rank.multiplicity;
      node.over &= ~(static_cast<uint32_t>(node.load[resource] <= kFull) << resource);
    }
  }
}

// A task that uses no overloaded resource runs at full speed and slows nobody down. Otherwise its rank is to
// be solved again, or its node when a resource of the node is overloaded.
void Simulation::mark_dirty(RankState& rank, uint32_t mask) {
  NodeState& node = nodes_[rank.node];
  if (mask & node.over && !node.dirty) {
    node.dirty = true;
    dirty_nodes_.push_back(rank.node);
  }
  if (mask & rank.over && !rank.dirty) {
    rank.dirty = true;
    dirty_ranks_.push_back(static_cast<uint32_t>(&rank - ranks_.data()));
  }
}

void Simulation::solve_dirty() {
  // An overloaded resource of the node couples its ranks; else each stands alone.
  for (const uint32_t r : dirty_ranks_) {
    NodeState& node = nodes_[ranks_[r].node];
    if (node.over && !node.dirty) {
      node.dirty = true;
      dirty_nodes_.push_back(ranks_[r].node);
    }
  }
  for (const uint32_t n : dirty_nodes_) solve(nodes_[n].ranks.data(), nodes_[n].ranks.size(), nodes_[n]);
  for (const uint32_t r : dirty_ranks_) {
    if (!nodes_[ranks_[r].node].dirty) solve(&r, 1, nodes_[ranks_[r].node]);
    ranks_[r].dirty = false;
  }
  for (const uint32_t n : dirty_nodes_) nodes_[n].dirty = false;
  dirty_ranks_.clear();
  dirty_nodes_.clear();
}

// Only overloaded resources can saturate, so only they and the tasks that use them go to the solver.
void Simulation::solve(const uint32_t* ranks, size_t count, const NodeState& node) {
  std::array<uint32_t, kResources> index;
  sharing_.clear();
  sharers_.clear();
  for (uint32_t over = node.over; over; over &= over - 1) {
    index[static_cast<uint32_t>(std::countr_zero(over))] = sharing_.add_resource();
  }
  for (size_t i = 0; i < count; ++i) {
    const RankState& rank = ranks_[ranks[i]];
    const uint32_t all_over = rank.over | node.over;
    for (uint32_t over = rank.over; over; over &= over - 1) {
      index[static_cast<uint32_t>(std::countr_zero(over))] = sharing_.add_resource();
    }
    for (uint32_t running = rank.running; running; running &= running - 1) {
      const uint32_t s = rank.first_slot + static_cast<uint32_t>(std::countr_zero(running));
      const CompiledDemand& demand = *slots_[s].demand;
      if ((demand.mask & all_over) == 0) {
        set_rate(s, kFull);
        continue;
      }
      sharing_.add_flow(demand.weight);
      sharers_.push_back(s);
      for (uint32_t u = 0; u < demand.uses; ++u) {
        const auto resource = static_cast<uint32_t>(demand.use[u].resource);
        if ((all_over >> resource & 1) == 0) continue;
        const int64_t times = resource < kFirstNodeResource ? 1 : rank.multiplicity;
        sharing_.add_use(index[resource], demand.use[u].share * times);
      }
    }
  }
  if (sharers_.empty()) return;
  sharing_.solve();
  for (uint32_t i = 0; i < sharers_.size(); ++i) set_rate(sharers_[i], sharing_.rate(i));
}

void Simulation::set_rate(uint32_t s, uint32_t rate) {
  Slot& slot = slots_[s];
  if (slot.rate == rate) return;
  account(slot);
  slot.rate = rate;
  expect_end(s);
}

void Simulation::expect_end(uint32_t s) {
  const Slot& slot = slots_[s];
  // Rounded down, a rate can be 0. Whoever saturates the resource then moves, and the rate is found anew when
  // it ends.
  heap_.set(s, slot.rate == 0 ? kNever : now_ + (slot.remaining + slot.rate - 1) / slot.rate);
}

// ---- Sums ----

void Simulation::account(Slot& slot) {
  const int64_t work = std::min(slot.remaining, (now_ - slot.since) * slot.rate);
  slot.since = now_;
  slot.remaining -= work;
  RankState& rank = ranks_[slot.rank];
  NodeState& node = nodes_[rank.node];
  for (uint32_t u = 0; u < slot.demand->uses; ++u) {
    const Use& use = slot.demand->use[u];
    const auto resource = static_cast<uint32_t>(use.resource);
    if (resource < kFirstNodeResource) {
      rank.used[resource] += static_cast<__int128>(work) * use.share;
    } else {
      node.used[resource] += static_cast<__int128>(work) * (use.share * rank.multiplicity);
    }
  }
}

void Simulation::tally(RankState& rank) {
  const Time elapsed = now_ - rank.tallied;
  rank.tallied = now_;
  if (rank.computing) {
    rank.compute_busy += elapsed;
  } else if (rank.communicating) {
    rank.exposed_communication += elapsed;
  }
}

void Simulation::account_all() {
  for (RankState& rank : ranks_) {
    tally(rank);
    for (uint32_t running = rank.running; running; running &= running - 1) {
      account(slots_[rank.first_slot + static_cast<uint32_t>(std::countr_zero(running))]);
    }
  }
}

}  // namespace mop::engine
