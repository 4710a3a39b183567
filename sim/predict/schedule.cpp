#include "sim/predict/schedule.h"

#include <algorithm>
#include <unordered_map>

#include "sim/base/error.h"

namespace mop::predict {

using program::Op;
using program::OpId;
using program::Routed;
using program::Shape;

namespace {

int64_t scaled(int64_t capacity, int64_t part, int64_t whole) {
  return whole == 0 ? 0
                    : static_cast<int64_t>(static_cast<double>(capacity) * static_cast<double>(part) /
                                           static_cast<double>(whole));
}

// What a price depends on.
struct Key {
  uint64_t what = 0;  // kind, phase, component, communicator, kernels, exchange, transpose, accumulate
  uint32_t shape = 0;
  program::ExpertLoad rows;  // of one round
  bool operator==(const Key&) const = default;
};
struct Hash {
  size_t operator()(const Key& k) const {
    uint64_t h = k.what * 0x9e3779b97f4a7c15ULL + k.shape;
    for (const int64_t v : {k.rows.computed, k.rows.sent, k.rows.moved_within, k.rows.moved_across,
                            k.rows.experts, k.rows.rounds, k.rows.spilled_in * 1024 + k.rows.spilled_out})
      h = (h ^ static_cast<uint64_t>(v)) * 0xff51afd7ed558ccdULL, h ^= h >> 29;
    return static_cast<size_t>(h);
  }
};

double seconds_of(const engine::Demand& demand) {
  return 1e-9 * static_cast<double>(demand.duration);
}

// For which it would keep all of a resource busy.
double seconds_of(const engine::Demand& demand, engine::Resource resource) {
  double share = 0;
  for (int use = 0; use < demand.uses; ++use)
    if (demand.use[static_cast<size_t>(use)].resource == resource)
      share += static_cast<double>(demand.use[static_cast<size_t>(use)].share) / engine::kFull;
  return share * seconds_of(demand);
}

// Rounds add to the gradients of weights that the first one has written.
Op op_of_round(Op op, int64_t round) {
  if (op.routed == Routed::compute && op.does.transpose_a && round > 0) op.does.accumulate = true;
  return op;
}

}  // namespace

Shape routed_shape(const program::StepProgram& program, const Op& op, const program::ExpertLoad& load,
                   int64_t round) {
  Shape shape = program.shape(op);
  if (op.routed == Routed::no) return shape;
  if (op.routed == Routed::spill) {
    // The shape is that of one expert's slot times the slots; what moves is what was borrowed and lent, once:
    // in the first or in the last round.
    if (round != (op.does.last_round ? load.rounds - 1 : 0)) return {};
    const int64_t slots = program.spill_slots;
    const bool back = op.does.exchange == program::Exchange::spill_gradients;
    const int64_t out = back ? load.spilled_in : load.spilled_out,
                  in = back ? load.spilled_out : load.spilled_in;
    shape.v[2] = std::max(shape.v[0], shape.v[1]) / slots * load.spilled_across;
    shape.v[0] = shape.v[0] / slots * out;
    shape.v[1] = shape.v[1] / slots * in;
    return shape;
  }
  const int64_t capacity = program.round_rows;
  const int64_t computed = rows_of_round(load.computed, round, load.rounds),
                sent = rows_of_round(load.sent, round, load.rounds);
  switch (op.routed) {
    case Routed::compute:
      if (op.kind == program::OpKind::grouped_gemm) {
        // Gradients are written of every expert that the rank has, of those without rows as zeros.
        const bool writes = op.does.transpose_a && !op.does.accumulate;
        shape.v[4] = writes ? shape.v[3] + load.spilled_in : load.touched;
        shape.v[0] = computed;
        shape.v[3] = std::max<int64_t>(1, load.experts);
      } else {
        for (int i = 0; i < 3; ++i) shape.v[i] = scaled(shape.v[i], computed, capacity);
      }
      break;
    case Routed::source:
      for (int i = 0; i < 3; ++i) shape.v[i] = scaled(shape.v[i], sent, capacity);
      break;
    case Routed::dispatch:
    case Routed::combine: {
      const bool out = op.routed == Routed::dispatch;
      const int64_t bytes = shape.v[0];  // of as many rows as a round may have
      const auto of = [&](int64_t rows) { return scaled(bytes, rows, capacity); };
      shape.v[0] = of(out ? sent : computed);
      shape.v[1] = of(out ? computed : sent);
      shape.v[2] = of(rows_of_round(load.moved_within, round, load.rounds));
      shape.v[3] = of(rows_of_round(load.moved_across, round, load.rounds));
      break;
    }
    default:
      break;
  }
  return shape;
}

Schedule make_schedule(const program::StepProgram& program, const std::vector<program::ExpertLoad>& loads,
                       const cost::CostModel& cost) {
  Schedule schedule;
  engine::TaskGraph& graph = schedule.graph;
  // Task of round i: first + i * stride. Outside of rounds an operation may have several: the last is first +
  // stride.
  std::vector<uint32_t> first(program.ops.size()), stride(program.ops.size());
  std::vector<int64_t> rounds_of(program.regions.size(), 1);
  for (size_t r = 1; r < program.regions.size(); ++r)
    rounds_of[r] = std::max<int64_t>(1, loads[static_cast<size_t>(program.regions[r].layer)].rounds);
  size_t total = 0;
  for (const Op& op : program.ops) total += static_cast<size_t>(rounds_of[op.region]);
  graph.tasks.reserve(total);
  schedule.op_of_task.reserve(total);

  struct Known {
    uint32_t demand;
    bool followed;  // by the demand behind it
    uint32_t launch_ns;
    int turns;
    bool outside;
    double flops, bytes;
    cost::Draws draws;
    double streams;
  };
  std::unordered_map<Key, Known, Hash> known;
  std::vector<bool> flagged(program.ops.size(), false);

  const auto beside = [&](cost::Work& work, uint32_t demand, int times) {
    work.hbm += times * seconds_of(graph.demands[demand], engine::Resource::hbm);
    work.links += times * seconds_of(graph.demands[demand], engine::Resource::nvlink_out);
  };
  const auto add = [&](OpId id, int64_t round) {
    const Op op = op_of_round(program.ops[id], round);
    const bool routed = op.routed != Routed::no;
    const program::ExpertLoad* load = routed ? &loads[static_cast<size_t>(op.layer)] : nullptr;
    Key key{static_cast<uint64_t>(op.kind) | static_cast<uint64_t>(op.phase) << 8 |
                static_cast<uint64_t>(op.component) << 12 | static_cast<uint64_t>(op.group) << 16 |
                static_cast<uint64_t>(op.kernels) << 32 | static_cast<uint64_t>(op.routed) << 48 |
                static_cast<uint64_t>(op.stream) << 52 | static_cast<uint64_t>(op.layer >= 0) << 56 |
                static_cast<uint64_t>(op.does.exchange) << 57 |
                static_cast<uint64_t>(op.does.transpose_a) << 62 |
                static_cast<uint64_t>(op.does.accumulate) << 63,
            op.shape,
            {}};
    if (routed) {
      key.rows = *load;
      key.rows.computed = rows_of_round(load->computed, round, load->rounds);
      key.rows.sent = rows_of_round(load->sent, round, load->rounds);
      key.rows.moved_within = rows_of_round(load->moved_within, round, load->rounds);
      key.rows.moved_across = rows_of_round(load->moved_across, round, load->rounds);
      if (op.routed == Routed::spill) key.rows.rounds = load->rounds - round;
    }
    auto found = known.find(key);
    if (found == known.end()) {
      const Shape shape = routed ? routed_shape(program, op, *load, round) : program.shape(op);
      const bool nothing_spilled = op.routed == Routed::spill && shape.v[0] == 0 && shape.v[1] == 0;
      const cost::Price price =
          nothing_spilled
              ? cost::Price{}  // every rank knows from the plan, and skips it
              : cost.price(op, shape, program::is_collective(op.kind) ? &program.groups[op.group] : nullptr);
      ensure(price.demand.duration >= 0, "an operation takes time forwards");
      ensure(op.region == 0 || (price.turns == 1 && price.after.duration == 0),
             "what is in rounds has one task in each");
      const auto demand = static_cast<uint32_t>(graph.demands.size());
      graph.demands.push_back(price.demand);
      const bool followed = price.after.duration > 0;
      if (followed) graph.demands.push_back(price.after);
      found = known
                  .emplace(key, Known{demand, followed, static_cast<uint32_t>(price.launch_ns), price.turns,
                                      price.outside, program::flops(op.kind, shape),
                                      program::hbm_bytes(op.kind, shape), price.draws, price.streams})
                  .first;
    }
    const Known& k = found->second;
    schedule.flops += k.flops;
    if (op.stream == program::Stream::compute) schedule.hbm_bytes += k.bytes;
    if (k.outside && !flagged[id]) flagged[id] = true, schedule.outside.push_back(id);
    engine::Task task;
    cost::Work& work = schedule.work[cost::stage_of(op.phase)];
    if (op.stream == program::Stream::compute) {
      work.seconds[static_cast<size_t>(k.draws)] += seconds_of(graph.demands[k.demand]);
      work.hbm += k.streams;
    } else {
      beside(work, k.demand, k.turns);
      if (k.followed) beside(work, k.demand + 1, k.turns);
    }
    task.demand = k.demand;
    task.launch_ns = k.launch_ns;
    task.comm = program::is_collective(op.kind) ? op.group : engine::kNoComm;
    task.stream = static_cast<uint8_t>(op.stream);
    task.blocks_launch = op.blocking;
    task.communication = op.stream != program::Stream::compute && op.stream != program::Stream::host;
    for (int turn = 0; turn < k.turns; ++turn) {
      graph.tasks.push_back(task);
      schedule.op_of_task.push_back(id);
      if (!k.followed) continue;
      engine::Task own = task;
      own.demand = k.demand + 1;
      own.comm = engine::kNoComm;
      own.launch_ns = 0;
      graph.tasks.push_back(own);
      schedule.op_of_task.push_back(id);
    }
  };

  for (OpId id = 0; id < program.ops.size();) {
    const Op& op = program.ops[id];
    if (op.region == 0) {
      first[id] = static_cast<uint32_t>(graph.tasks.size());
      add(id, 0);
      stride[id] = static_cast<uint32_t>(graph.tasks.size()) - 1 - first[id];
      ++id;
      continue;
    }
    const program::Region& region = program.regions[op.region];
    for (OpId body = region.first; body < region.last; ++body) {
      first[body] = static_cast<uint32_t>(graph.tasks.size()) + (body - region.first);
      stride[body] = region.last - region.first;
    }
    for (int64_t round = 0; round < rounds_of[op.region]; ++round)
      for (OpId body = region.first; body < region.last; ++body) add(body, round);
    id = region.last;
  }

  graph.edges.reserve(program.dependencies.size() * 2);
  for (const program::Dependency& d : program.dependencies) {
    const uint32_t from_region = program.ops[d.from].region, to_region = program.ops[d.to].region;
    if (from_region != 0 && from_region == to_region) {
      for (int64_t round = d.distance; round < rounds_of[to_region]; ++round)
        graph.edges.push_back({first[d.from] + static_cast<uint32_t>(round - d.distance) * stride[d.from],
                               first[d.to] + static_cast<uint32_t>(round) * stride[d.to], 0});
      continue;
    }
    // From outside: after the last round of the one, before the first of the other (streams keep the order
    // within).
    const auto steps = from_region == 0 ? 1 : static_cast<uint32_t>(rounds_of[from_region] - 1);
    graph.edges.push_back({first[d.from] + steps * stride[d.from], first[d.to], d.distance});
  }
  return schedule;
}

}  // namespace mop::predict
