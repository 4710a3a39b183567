// What a finished simulation has to say: the last step's spans, sums and critical path, or why it stands
// still.
#include <fmt/format.h>

#include "sim/base/error.h"
#include "sim/engine/simulation.h"

namespace mop::engine {

Report Simulation::report() {
  Report report;
  report.step_end = step_end_;
  report.step_time = step_end_.back() - (step_end_.size() > 1 ? step_end_[step_end_.size() - 2] : 0);
  report.steady = steady_;
  report.events = started_ + completed_;
  report.tasks = completed_;
  report.ranks.reserve(ranks_.size());
  for (const RankState& rank : ranks_) {
    RankReport& out = report.ranks.emplace_back();
    out.exposed_communication = rank.exposed_communication;
    out.compute_busy = rank.compute_busy;
    out.spans.resize(rank.graph->size);
    const Record* const records = rank.history.front().get();
    for (uint32_t t = 0; t < rank.graph->size; ++t) {
      const Record& record = records[t];
      out.spans[t] = {record.start, record.end, record.end - record.start - record.without_room};
    }
    const __int128 capacity = static_cast<__int128>(report.step_time) * kFull;
    for (int r = 0; r < kResources; ++r) {
      const size_t resource = static_cast<size_t>(r);
      const Used& used = r < kFirstNodeResource ? rank.used : nodes_[rank.node].used;
      out.used[resource] = used[resource] / kFull;
      ensure(out.used[resource] <= capacity, "no resource is used beyond its capacity");
    }
  }
  report.critical_path = critical_path();
  return report;
}

// From the completion that ended the step back to the step's beginning, always to the cause of what started
// last, or to what had the room that it waited for. All of the path lies in the last step's own tasks, for
// whatever belongs to an earlier step ended before the window.
std::vector<Stretch> Simulation::critical_path() const {
  std::vector<Stretch> path;
  const Time begin = step_end_.size() > 1 ? step_end_[step_end_.size() - 2] : 0;
  Time now = step_end_.back();
  const auto add = [&](uint32_t rank, uint32_t task, Time start) {
    start = std::max(start, begin);
    if (start < now) path.push_back({rank, task, start, now});
    now = start;
  };
  Cause at = last_;
  while (now > begin) {
    const RankState& rank = ranks_[at.rank];
    const Record* const records = rank.history.front().get();
    if (at.task & Cause::kLaunched) {
      const uint32_t task = at.task & ~Cause::kLaunched;
      const uint32_t opener = rank.graph->segments[rank.graph->tasks[task].segment].opener;
      add(at.rank, kLaunch, opener == kNone ? begin : records[opener].end);
      at.task = opener;
    } else {
      const Record& record = records[at.task];
      ensure(record.start <= now && now <= record.end, "who gives a start or room is at work until then");
      if (record.room_of != kNone && record.start + record.without_room < now) {
        add(at.rank, at.task, record.start + record.without_room);
        at.task = record.room_of;
      } else {
        add(at.rank, at.task, record.start);
        at = record.cause;
      }
    }
  }
  return path;
}

std::string Simulation::describe(const Slot& slot) const {
  const RankState& rank = ranks_[slot.rank];
  const CompiledTask& task = rank.graph->tasks[slot.task];
  std::string why;
  const uint32_t waits = rank.waits[slot.set][slot.task];
  if (slot.state == State::arrived) {
    const Meeting& meeting = meetings_[slot.meeting];
    why = fmt::format("for {} of {} ranks at meeting point {}", meeting.slots.size() - meeting.arrived,
                      meeting.slots.size(), slot.meeting);
  } else if (slot.step > rank.done + 1 || slot.step > options_.max_steps) {
    why = fmt::format("for step {} to end", slot.step - 2);
  } else if (waits > 0) {
    why = fmt::format("for {} other task{}", waits, waits > 1 ? "s" : "");
  } else {
    why = fmt::format("to be launched after task {}", rank.graph->segments[task.segment].opener);
  }
  return fmt::format("rank {} stream {} task {} of step {} waits {}", slot.rank,
                     rank.graph->stream_names[slot.stream], slot.task, slot.step, why);
}

void Simulation::deadlock() const {
  constexpr int kNamed = 8;
  std::string message = fmt::format("deadlock at {} ns after {} tasks:", now_, completed_);
  // Those at a meeting say most: somebody did not come.
  int named = 0;
  for (const bool meets : {true, false}) {
    for (const Slot& slot : slots_) {
      if ((slot.state == State::arrived) != meets) continue;
      if (named++ < kNamed) message += "\n  " + describe(slot);
    }
  }
  if (named > kNamed) message += fmt::format("\n  and {} more", named - kNamed);
  throw InternalError(message);
}

Report run(const Machine& machine, const Options& options) {
  Simulation simulation(machine, options);
  simulation.run();
  return simulation.report();
}

}  // namespace mop::engine
