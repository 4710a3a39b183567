// CostModel: how long one operation takes on one cluster, and what it asks of the machine meanwhile.
#pragma once
#include <memory>
#include <string>

#include "sim/cluster/cluster.h"
#include "sim/cost/power.h"
#include "sim/engine/tasks.h"
#include "sim/plan/plan.h"
#include "sim/program/program.h"

namespace mop::cost {

// measured: tables and figures of the cluster file. paper: the few constants fitted to the MoP paper's own
// table (mop.md section 7); it reproduces those rows and predicts nothing. Never mixed.
enum class Calibration : uint8_t { measured, paper };
const char* name(Calibration calibration);
Calibration parse_calibration(const std::string& text);  // UserError with the nearest name

struct Price {
  engine::Demand demand;
  engine::Time launch_ns = 0;  // CPU time to launch it
  bool outside = false;        // beyond the shapes that were measured
  Draws draws = Draws::memory;
  double streams = 0;  // seconds for which it would keep all of HBM busy, beyond what its kind does anyway
  // Of an exchange, what each rank does with what it has received; both come by turns, so many times.
  engine::Demand after{};
  int turns = 1;
};

// Where the ranks of a communicator are. Groups that do not align with the nodes differ among themselves;
// this is the one that touches most nodes, since the others meet it sooner or later.
struct Placement {
  int64_t ranks = 1, nodes = 1;
  double local() const {
    return static_cast<double>(ranks) / static_cast<double>(nodes);
  }  // mean ranks on a node
};
Placement place(const program::Group& group, int64_t gpus_per_node, int64_t gpus);

// Bytes that a rank's links move each way: NVLink, and its NIC or its part of the node's.
struct LinkBytes {
  double nvlink = 0, nic = 0;
};
// For `bytes` of the full buffer that pass every rank once. NCCL's rings go through all ranks of a node
// before the next node, and each enters it at another GPU: (n - 1) / n of the buffer leave a node, shared by
// its NICs. Two nodes could do with half of that (the other node's half of the buffer); NCCL does not
// (reports/validation-h200x4.md, two emulated nodes).
LinkBytes in_a_ring(const Placement& at, double bytes);
// For `bytes` that each rank has for all ranks alike, itself included.
LinkBytes among_all(const Placement& at, double bytes);

class CostModel {
 public:
  virtual ~CostModel() = default;
  // shape: the operation's, scaled to the rows at hand when it is routed. group: null for local work.
  virtual Price price(const program::Op& op, const program::Shape& shape,
                      const program::Group* group) const = 0;
};

// gpus_per_node: that are used. clocks: of the multiprocessors, where the cluster's tables are as of the
// largest.
std::unique_ptr<CostModel> make_cost_model(Calibration calibration, const cluster::ClusterModel& cluster,
                                           const plan::Plan& plan, int64_t gpus, int64_t gpus_per_node,
                                           const StepClocks& clocks = {});

}  // namespace mop::cost
