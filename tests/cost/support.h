// Helpers of the cost tests: operations by hand, priced on shipped clusters.
#pragma once
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "sim/cluster/cluster.h"
#include "sim/cost/cost.h"
#include "sim/engine/engine.h"

namespace mop::cost::testing {

using engine::Demand;
using engine::Resource;
using program::Axis;
using program::Group;
using program::OpKind;
using program::Shape;
using program::Stream;

inline program::Op make_op(OpKind kind, Stream stream = Stream::compute) {
  program::Op op{};
  op.kind = kind;
  op.stream = stream;
  op.phase = program::Phase::forward;
  op.component = program::Component::other;
  op.layer = 0;
  op.group = program::is_collective(kind) ? uint16_t{0} : program::kNoGroup;
  op.kernels = 1;
  return op;
}

// A shipped cluster with the figures and tables that every one has.
inline cluster::ClusterModel plain(const std::string& name) {
  cluster::ClusterModel c = cluster::read_cluster(name);
  for (const std::string& figure : cluster::optional_figures()) c.figures.erase(figure);
  for (const std::string& table : cluster::optional_tables()) c.tables.erase(table);
  return c;
}

struct Machine {
  cluster::ClusterModel cluster;
  plan::Plan plan;
  int64_t gpus;
  std::unique_ptr<CostModel> cost;

  explicit Machine(const std::string& name, const std::string& plan_text = "mop", int64_t ranks = 0,
                   Calibration calibration = Calibration::measured)
      : Machine(plain(name), plan_text, ranks, calibration) {}
  explicit Machine(cluster::ClusterModel model, const std::string& plan_text = "mop", int64_t ranks = 0,
                   Calibration calibration = Calibration::measured)
      : cluster(std::move(model)),
        plan(plan::parse_plan(plan_text)),
        gpus(ranks > 0 ? ranks : cluster.gpus_per_node()),
        cost(make_cost_model(calibration, cluster, plan, gpus, cluster.gpus_per_node())) {}
  Machine(const Machine&) = delete;

  Price price(const program::Op& op, const Shape& shape, const Group* group = nullptr) const {
    return cost->price(op, shape, group);
  }
  Price price(OpKind kind, const Shape& shape) const { return price(make_op(kind), shape); }
  Price collective(OpKind kind, int64_t bytes, const Group& group, int64_t received = -1) const {
    return price(make_op(kind, Stream::gather), {{bytes, received < 0 ? bytes : received}}, &group);
  }
  double seconds(OpKind kind, const Shape& shape) const {
    return 1e-9 * static_cast<double>(price(kind, shape).demand.duration);
  }
};

inline double seconds(const Price& p) {
  return 1e-9 * static_cast<double>(p.turns * (p.demand.duration + p.after.duration));
}

inline double share(const Demand& d, Resource r) {
  for (int i = 0; i < d.uses; ++i)
    if (d.use[static_cast<size_t>(i)].resource == r)
      return static_cast<double>(d.use[static_cast<size_t>(i)].share) / static_cast<double>(engine::kFull);
  return 0;
}

}  // namespace mop::cost::testing
