// A TaskGraph made compact and immutable for the engine; all ranks of a class share one. Compiling checks
// every index and drops the edges that other edges or the order of a stream already imply, so that a task
// waits at most once for each stream and its counter fits a byte.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sim/engine/tasks.h"

namespace mop::engine {

inline constexpr uint32_t kNone = 0xffffffff;

struct CompiledDemand {
  Time duration;
  uint32_t weight;
  uint16_t mask;  // bit by resource used
  uint8_t uses;
  bool takes_room, needs_room;
  uint16_t kernels;
  std::array<Use, 8> use;
};

struct CompiledTask {
  uint32_t demand;
  uint32_t next;             // on the stream; kNone after the last of the step
  uint32_t first_successor;  // the successors end where those of the next task begin
  uint32_t segment;          // of launches
  Time launch;               // when its launch ends, from the beginning of its segment
  uint16_t comm;
  uint8_t stream;  // dense: the streams that have no task are left out
  bool blocks_launch : 1;
  bool communication : 1;
  bool computation : 1;
};

// The task that may start when another completes, with its dense stream, in four bytes.
class Successor {
 public:
  static constexpr uint32_t kMaxTasks = 1u << 27;
  Successor() = default;
  Successor(uint32_t task, uint32_t stream, bool next_step) : bits_(task << 5 | stream << 1 | next_step) {}
  uint32_t task() const { return bits_ >> 5; }
  uint32_t stream() const { return bits_ >> 1 & 15; }
  uint32_t steps() const { return bits_ & 1; }

 private:
  uint32_t bits_ = 0;
};

// Launches that follow one another without a wait: up to and with a task that blocks, or the end of the step.
struct Segment {
  uint32_t opener;  // the blocking task whose completion begins it; kNone: it goes on from the previous step
  Time length;
};

struct CompiledGraph {
  uint32_t size = 0;                // tasks
  std::vector<CompiledTask> tasks;  // and one more, which closes the list of successors
  std::vector<Successor> successors;
  std::vector<CompiledDemand> demands;
  std::vector<uint8_t> waits, first_waits;  // by task: completions to wait for; in the very first step
  std::vector<uint32_t> heads;              // by dense stream: its first task
  std::vector<uint8_t> stream_names;        // by dense stream: the stream's number in the TaskGraph
  std::vector<Segment> segments;
  std::vector<uint32_t> comm_tasks;  // by communicator: tasks a step
  std::vector<uint8_t> comm_stream;  // by communicator: the dense stream that uses it
};

// Errors: InternalError for an index out of range, a same-step edge that goes backwards (a cycle), a
// communicator used from two streams, a share or weight outside its bounds. `index` names the graph in the
// message.
CompiledGraph compile(const TaskGraph& graph, size_t index);

}  // namespace mop::engine
