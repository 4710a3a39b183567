// The state of one run of the engine. simulation.cpp sets it up and moves it through time; report.cpp reads
// it out.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "sim/engine/compiled.h"
#include "sim/engine/engine.h"
#include "sim/engine/heap.h"
#include "sim/engine/sharing.h"

namespace mop::engine {

inline constexpr Time kNever = Time{1} << 61;

// With s the first step that a rank has not completed: tasks of s and s + 1 may run, and what completes in s
// + 1 already counts for edges into s + 2. So a rank keeps the state of three steps, by step modulo three.
inline constexpr uint32_t kSets = 3;

// Why a task started when it did: `task` completed on `rank` or, with kLaunched set, its launch ended.
struct Cause {
  static constexpr uint32_t kLaunched = 1u << 31;
  uint32_t rank, task;
};

struct Record {
  Time start, end, without_room;
  Cause cause;
  uint32_t room_of;  // whose end, or that of a kernel of it, gave room; kNone: nobody's of the same step
};

enum class State : uint8_t {
  idle,       // its next task still waits for something
  launching,  // the end of its launch is all that the next task waits for: in the heap with that time
  arrived,    // the next task waits for the others at its meeting point
  running,    // in the heap with the time at which the work will be finished
  holding,    // its work is finished, that of others at the meeting is not
};

// One stream of one rank: its running task, or the next.
struct alignas(64) Slot {
  const CompiledDemand* demand = nullptr;
  int64_t remaining = 0;  // work in ns x kFull, as of `since`; where somebody waits for room, of this kernel
  int64_t behind = 0;     // then: of the kernels behind it
  Time since = 0;
  uint32_t rate = 0;
  uint32_t rank = 0;
  uint32_t task = 0;
  int32_t step = 0;
  uint32_t meeting = kNone;
  uint32_t room_of = 0;  // bit by stream of its rank: whose running task must end before this one gets room
  uint8_t set = 0;       // step % kSets
  uint8_t stream = 0;
  State state = State::idle;
};

using Used = std::array<__int128, kResources>;  // share x work in ns x kFull, since the last step ended

struct NodeState {
  std::array<int64_t, kResources> load{};  // by resource: full-speed shares x multiplicity of what runs
  uint32_t over = 0;                       // bit by resource: the load exceeds the capacity
  bool dirty = false;
  Used used{};
  std::vector<uint32_t> ranks;
};

struct RankState {
  const CompiledGraph* graph = nullptr;
  uint32_t first_slot = 0, node = 0;
  int64_t multiplicity = 1;

  int32_t done = 0;                      // steps completed
  std::array<uint32_t, kSets> left{};    // tasks that have not completed
  std::array<uint8_t*, kSets> waits{};   // by task: completions that it still waits for
  std::array<Time*, kSets> opened{};     // by segment: when its launches began; kNever: they have not
  std::array<Record*, kSets> records{};  // by task

  uint32_t running = 0;  // bit by stream: its task holds resources
  uint32_t taking = 0;   // likewise: and all the room
  uint32_t without = 0;  // likewise: its task has started, and waits for room
  uint32_t over = 0;     // as in the node, for the resources of its own
  bool dirty = false;
  std::array<int64_t, kResources> load{};
  Used used{};

  uint32_t computing = 0, communicating = 0;         // tasks running
  Time tallied = 0;                                  // the times below are complete up to here
  Time compute_busy = 0, exposed_communication = 0;  // since the last step ended

  std::vector<uint32_t> meeting;  // by communicator; kNone: it meets nobody else
  std::vector<uint8_t> waits_store;
  std::vector<Time> opened_store;
  std::deque<std::unique_ptr<Record[]>> history;  // by step, from the first that not all ranks have completed
  std::vector<std::unique_ptr<Record[]>> spare;
};

struct Meeting {
  std::vector<uint32_t> slots;
  uint32_t tasks = 0;  // a step
  uint32_t arrived = 0, working = 0;
};

class Simulation {
 public:
  Simulation(const Machine& machine, const Options& options);
  void run();
  Report report();

 private:
  void add_rank(const Machine& machine, uint32_t r);
  void join_meetings(const Machine& machine, uint32_t r);

  // What happens to a task, in this order.
  void consider(uint32_t s, Cause cause);  // starts the next task of an idle slot if nothing is missing
  void start(uint32_t s, Cause cause);
  void finish_work(uint32_t s);
  void complete(uint32_t s);

  void consider_all(const RankState& rank, Cause cause);
  void open_segment(RankState& rank, int32_t step, uint32_t segment, Time base);
  void end_step(RankState& rank, Cause cause);
  void end_step_everywhere(int32_t step, Cause cause);
  void begin_records(RankState& rank, int32_t step);

  // Who gets room. earlier: the streams of a rank whose running tasks leave none to what starts now, each
  // until the end of its kernel. let_in: those that wait for nobody but this slot.
  uint32_t earlier(const RankState& rank, const Slot& slot);
  bool stop_behind_kernel(uint32_t s);  // whether its kernel has not just ended
  void go_on(uint32_t s);
  void admit(uint32_t s);
  void let_in(RankState& rank, const Slot& slot);

  // Who holds which resources, and how fast that lets them run.
  void acquire(Slot& slot);
  void release(Slot& slot);
  void mark_dirty(RankState& rank, uint32_t mask);
  void solve_dirty();
  void solve(const uint32_t* ranks, size_t count, const NodeState& node);
  void set_rate(uint32_t s, uint32_t rate);
  void expect_end(uint32_t s);  // of what remains now, at its rate

  // Sums over the window of the last step.
  void account(Slot& slot);
  void tally(RankState& rank);
  void account_all();

  std::vector<Stretch> critical_path() const;
  [[noreturn]] void deadlock() const;
  std::string describe(const Slot& slot) const;

  const Options options_;
  std::vector<CompiledGraph> graphs_;
  std::vector<RankState> ranks_;
  std::vector<NodeState> nodes_;
  std::vector<Slot> slots_;
  std::vector<Meeting> meetings_;
  Heap heap_;

  Time now_ = 0;
  bool stopped_ = false, steady_ = false;
  Cause last_{};                     // the task that completed the last step
  std::vector<uint32_t> finishers_;  // by step: how many ranks have completed it
  std::vector<Time> step_end_;
  uint64_t started_ = 0, completed_ = 0;

  std::vector<uint32_t> instant_;  // slots that run a task without work
  std::vector<uint32_t> dirty_ranks_, dirty_nodes_;
  Sharing sharing_;
  std::vector<uint32_t> sharers_;  // by flow of sharing_: the slot
};

}  // namespace mop::engine
