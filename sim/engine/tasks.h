// What the engine runs: for every rank class a graph of tasks on streams, and for every task a demand on the
// machine's resources. Nothing here knows of models or plans; sim/search turns a StepProgram and a CostModel
// into this. All arithmetic is on integers, so the same input gives the same bytes anywhere, folded or not.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace mop::engine {

using Time = int64_t;  // nanoseconds

// Resources of one GPU, then those that the GPUs of a node share.
enum class Resource : uint8_t {
  sm,
  crossbar,  // between multiprocessors, L2 and links: kernels and copy engines meet there
  hbm,
  nvlink_out,
  nvlink_in,
  pcie_up,
  pcie_down,
  pcie_both,
  nic_out,
  nic_in,
  root_up,
  root_down,
  root_both,  // the host side of all PCIe links: DMA reads of DRAM, writes, and their sum
  dram,
  cores,
};
inline constexpr int kResources = 15, kFirstNodeResource = 10;
const char* name(Resource resource);

inline constexpr int64_t kFull = 1 << 20;  // a share, or a rate, of one

struct Use {
  Resource resource;
  uint32_t share;  // of the resource's capacity, at full speed; kFull = all of it
};

// What one task asks for. Running alone it takes `duration`; when the shares on a resource add up to more
// than kFull, the tasks there slow down, weighted max-min fairly: task i progresses at rate min(1, level x
// weight). Room: a kernel whose blocks stay on every multiprocessor until it ends leaves none to what starts
// later; what needs room makes no progress until those have ended that had started before it. Of a task of
// several such kernels, `kernels` of equal work, until the one has ended that runs.
struct Demand {
  Time duration = 0;  // up to 2^42: 73 minutes
  uint32_t weight =
      1;  // 1 .. kFull: inversely proportional to the bytes/s drawn at full speed, so bytes are shared fairly
  uint8_t uses = 0;
  bool takes_room = false, needs_room = false;
  uint16_t kernels = 1;
  std::array<Use, 8> use{};
  void add(Resource resource, uint32_t share) { use[uses++] = {resource, share}; }
};

inline constexpr uint16_t kNoComm = 0xffff;
inline constexpr int kMaxStreams = 16;

struct Task {
  uint32_t demand = 0;      // index into TaskGraph::demands
  uint32_t launch_ns = 0;   // what the launching CPU thread spends on it; tasks are launched in index order
  uint16_t comm = kNoComm;  // communicator: the task starts when every rank of the group has arrived at it
  uint8_t stream = 0;       // first in, first out
  bool blocks_launch = false;  // the CPU thread launches nothing more until this task has completed
  bool communication = false;  // counts as communication when exposed; all else on stream 0 as computation
};

struct Edge {
  uint32_t from, to;  // `to` starts after `from` has completed
  uint8_t steps = 0;  // 0: of the same step; 1: `to` belongs to the next step
};

// One step of one rank class. Steps follow one another without a barrier: streams, launches and edges with
// steps = 1 carry over.
struct TaskGraph {
  std::vector<Task> tasks;
  std::vector<Edge> edges;  // any order; same-step edges must go from a lower to a higher index
  std::vector<Demand> demands;
};

// One simulated rank: a real one, or the representative of `multiplicity` alike ranks of its node.
struct Rank {
  uint32_t graph = 0;
  uint32_t node = 0;
  uint32_t multiplicity = 1;      // its uses of node resources count this often
  std::vector<uint32_t> meeting;  // by communicator: which meeting point
};

struct Machine {
  std::vector<TaskGraph> graphs;
  std::vector<Rank> ranks;
  std::vector<uint32_t> meeting_size;  // by meeting point: how many simulated ranks meet
  uint32_t nodes = 0;
};

}  // namespace mop::engine
