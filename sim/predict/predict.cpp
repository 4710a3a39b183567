#include "sim/predict/predict.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cost/power.h"
#include "sim/predict/checks.h"
#include "sim/predict/estimate.h"
#include "sim/predict/loads.h"
#include "sim/program/landing.h"
#include "sim/program/lower.h"
#include "sim/program/meetings.h"
#include "sim/program/workspace.h"

namespace mop::predict {
namespace {

using program::Component;
using program::OpKind;
using program::Stream;

// What runs on a rank: its place in the expert group (when loads differ), the expert group (when draws
// differ), its place in the context group (when the ring is unbalanced), and its GPU (when clocks differ).
struct Kinds {
  std::vector<uint32_t> of_rank;
  struct Kind {
    int64_t expert = 0, group = 0, context = 0;
    double over_median = 1;  // its clock (cost::Power)
  };
  std::vector<Kind> kinds;
};

Kinds find_kinds(const Scenario& s, const plan::Layout& layout, const std::optional<cost::Power>& power) {
  const bool skewed = s.workload.routing.kind != plan::Routing::Kind::balanced && layout.expert.size > 1;
  const bool ring = s.plan.family == plan::Family::fsdp2 && s.plan.context > 1 && !s.plan.balanced_ring;
  Kinds result;
  std::map<std::pair<std::array<int64_t, 3>, double>, uint32_t> known;
  for (int64_t r = 0; r < layout.ranks; ++r) {
    const std::array<int64_t, 3> kind{
        skewed ? layout.expert.index(r) : 0,
        skewed && s.workload.routing.independent_groups ? layout.expert.group(r) : 0,
        ring ? layout.context.index(r) : 0};
    const double over_median = power ? power->over_median(r % s.used_per_node()) : 1;
    const auto [found, fresh] = known.try_emplace({kind, over_median}, static_cast<uint32_t>(known.size()));
    if (fresh) result.kinds.push_back({kind[0], kind[1], kind[2], over_median});
    result.of_rank.push_back(found->second);
  }
  return result;
}

// HBM beside the arena.
struct Constants {
  int64_t context = 0, libraries = 0, communicators = 0, landing = 0, peers = 0, workspaces = 0, rotary = 0;
  int64_t total() const {
    return context + libraries + communicators + landing + peers + workspaces + rotary;
  }
};

Constants constants(const Scenario& s, const program::StepProgram& program) {
  Constants c;
  const auto figure = [&](const char* name) {
    return s.plan.native() ? s.cluster.native(name) : s.cluster[name];
  };
  c.context = static_cast<int64_t>(figure("context_bytes"));
  c.libraries = static_cast<int64_t>(figure("library_bytes"));
  const auto whole = static_cast<int64_t>(figure("communicator_bytes"));
  if (!s.plan.native()) {  // PyTorch: a communicator a group
    std::vector<bool> pairwise(program.groups.size(), false);
    for (const program::Op& op : program.ops)
      if (program::is_pairwise(op.kind)) pairwise[op.group] = true;
    for (size_t g = 0; g < program.groups.size(); ++g) {
      const double peers = cost::place(program.groups[g], s.used_per_node(), s.gpus()).local() - 1;
      c.communicators +=
          whole + (pairwise[g] ? static_cast<int64_t>(peers * figure("communicator_p2p_bytes")) : 0);
    }
    return c;
  }
  const auto copied = [&](const program::Op& op) {
    return program::by_copy_engines(program, op) &&
           cost::place(program.groups[op.group], s.used_per_node(), s.gpus()).nodes == 1;
  };
  const auto measured = [&](const char* name) {
    const auto found = s.cluster.figures.find(name);
    return found == s.cluster.figures.end() ? int64_t{0} : static_cast<int64_t>(found->second.value);
  };
  const auto or_else = [](int64_t found, int64_t other) { return found > 0 ? found : other; };
  const int64_t idle = or_else(measured("native_idle_communicator_bytes"), whole);
  bool pairs = false;
  for (const program::Meeting& m : program::meetings(program, copied)) {
    const cost::Placement at =
        cost::place({program::Axis::world, m.span.size, m.span.stride}, s.used_per_node(), s.gpus());
    int64_t gathered = whole, pair = static_cast<int64_t>(figure("communicator_p2p_bytes"));
    if (at.nodes > 1) {  // one rank of each, or more
      gathered = or_else(
          measured(at.local() > 1 ? "native_network_communicator_bytes" : "native_network_pair_bytes"),
          whole);
      pair = or_else(measured("native_network_p2p_bytes"), pair);
    }
    // Of peers on the node; a ring's two neighbours take a send and a receive, as one peer does.
    const double peers = m.everyone ? at.local() - 1 : m.neighbours && at.local() > 1 ? 1 : 0;
    c.communicators += m.collective ? gathered : std::min(idle, gathered);
    c.communicators += static_cast<int64_t>(peers * static_cast<double>(pair));
    pairs |= peers > 0;
  }
  if (c.communicators > 0) c.communicators += measured("native_first_communicator_bytes");
  if (pairs) c.communicators += measured("native_first_p2p_bytes");
  c.workspaces = program::workspace_bytes(program, copied);
  c.rotary = program::kFp32 * s.workload.context * s.model.rotary_dim();  // sines and cosines of a half each
  for (const program::Op& op : program.ops)
    if (op.kind == OpKind::reduce_scatter && copied(op)) c.landing = program::kLandingBytes;
  // The executor maps the arenas of all GPUs of the node.
  c.peers = (s.used_per_node() - 1) * measured("native_peer_memory_bytes");
  return c;
}

// What lives in `arenas` such arenas, by what it holds; what they take beyond that is packing.
void list(std::vector<Named>& rows, const program::Arena& arena, int64_t arenas, int64_t bytes) {
  for (int h = 0; h < program::kHolds; ++h) {
    const int64_t held = arena.live_by_holds[static_cast<size_t>(h)] * arenas;
    bytes -= held;
    if (held > 0) rows.push_back({program::name(static_cast<program::Holds>(h)), static_cast<double>(held)});
  }
  if (bytes > 0) rows.push_back({kPacking, static_cast<double>(bytes)});
}

void memory(const Scenario& s, const Kinds& kinds, bool roughly, Details& d, Prediction& p) {
  const bool torch = !s.plan.native();
  const int64_t node = std::min(s.used_per_node(), s.gpus());
  p.hbm_capacity = static_cast<int64_t>(s.cluster["hbm_bytes"]);
  p.host_capacity = static_cast<int64_t>(s.cluster["host_bytes"]);
  // PyTorch's peak is its live bytes: only the worst rank's arena is packed. One program of ours serves all
  // kinds of rank.
  std::vector<program::Arena> hosts;
  for (size_t k = 0; k < d.programs.size(); ++k) {
    auto [hbm, host] = roughly && !torch
                           ? program::plan_arenas(d.programs[k], {p.hbm_capacity, p.host_capacity / node})
                           : program::plan_arenas(d.programs[k], !torch || d.programs.size() == 1);
    hosts.push_back(std::move(host));
    if (k == 0 || hbm.live_bytes > d.hbm.live_bytes) d.hbm = std::move(hbm), d.worst = k;
  }
  if (torch && d.programs.size() > 1) {
    auto [hbm, host] = program::plan_arenas(d.programs[d.worst]);
    d.hbm = std::move(hbm);
    hosts[d.worst] = std::move(host);
  }
  d.host = hosts[d.worst];
  const Constants c = constants(s, d.program(d.worst));
  p.hbm_allocated = d.hbm.live_bytes;
  p.hbm_arena = d.hbm.bytes;
  p.hbm_peak = (torch ? d.hbm.live_bytes : d.hbm.bytes) + c.total();
  list(p.memory, d.hbm, 1, p.hbm_peak - c.total());
  p.memory.push_back({"cuda_context", static_cast<double>(c.context)});
  p.memory.push_back({"libraries", static_cast<double>(c.libraries)});
  p.memory.push_back({"nccl_communicators", static_cast<double>(c.communicators)});
  const std::pair<const char*, int64_t> ours[]{{"landing_zone", c.landing},
                                               {"mapped_peers", c.peers},
                                               {"workspaces", c.workspaces},
                                               {"rotary_tables", c.rotary}};
  for (const auto& [name, bytes] : ours)
    if (bytes > 0) p.memory.push_back({name, static_cast<double>(bytes)});

  // Host memory: all ranks of the fullest node.
  for (int64_t first = 0; first < s.gpus(); first += node) {
    int64_t bytes = 0;
    for (int64_t r = first; r < first + node; ++r)
      bytes += hosts[torch ? kinds.of_rank[static_cast<size_t>(r)] : 0].bytes;
    p.host_peak = std::max(p.host_peak, bytes);
  }
  list(p.host_memory, d.host, node, p.host_peak);

  std::vector<std::string> reasons;
  if (p.hbm_peak > p.hbm_capacity)
    reasons.push_back(program::shortfall("HBM", p.hbm_peak, p.hbm_capacity, d.program(d.worst), d.hbm,
                                         program::Space::hbm));
  if (p.host_peak > p.host_capacity)
    reasons.push_back(program::shortfall("host memory", p.host_peak, p.host_capacity, d.program(d.worst),
                                         d.host, program::Space::host));
  p.fits = reasons.empty();
  p.why_not = fmt::format("{}", fmt::join(reasons, "; "));
}

double seconds(engine::Time ns) {
  return static_cast<double>(ns) * 1e-9;
}

void run(Details& d) {
  engine::Machine machine;
  for (Schedule& schedule : d.schedules) machine.graphs.push_back(std::move(schedule.graph));
  for (const RankClass& c : d.fold.classes) machine.ranks.push_back({c.kind, c.node, c.per_node, c.meeting});
  machine.meeting_size = d.fold.meeting_size;
  machine.nodes = d.fold.nodes;
  d.report = engine::run(machine, {8, 1e-6});
  for (size_t k = 0; k < d.schedules.size(); ++k) d.schedules[k].graph = std::move(machine.graphs[k]);
}

// Of the last step, for a class of alike ranks: from the end of one operation on the compute stream to that
// of the next belongs to the next one's stage, and what follows the last to the next step's forward.
std::array<double, cost::kStages> seconds_of_stages(const Details& d, size_t of_class) {
  const size_t kind = d.fold.classes[of_class].kind;
  const std::vector<program::Op>& ops = d.program(kind).ops;
  const std::vector<program::OpId>& op_of_task = d.schedules[kind].op_of_task;
  const std::vector<engine::Span>& spans = d.report.ranks[of_class].spans;
  const engine::Time end = d.report.step_end.back();
  engine::Time now = end - d.report.step_time;
  std::array<double, cost::kStages> lasts{};
  const auto until = [&](engine::Time then, size_t stage) {
    lasts[stage] += seconds(std::max<engine::Time>(0, then - now));
    now = std::max(now, then);
  };
  for (size_t task = 0; task < spans.size(); ++task)
    if (const program::Op& op = ops[op_of_task[task]]; op.stream == Stream::compute)
      until(spans[task].end, cost::stage_of(op.phase));
  until(end, cost::stage_of(program::Phase::forward));
  return lasts;
}

void simulate(const Scenario& s, const Kinds& kinds, const std::optional<cost::Power>& power,
              const std::vector<std::vector<program::ExpertLoad>>& loads, const PredictOptions& options,
              Details& d) {
  std::vector<cost::StepClocks> clocks(loads.size());  // by kind of rank
  const auto price = [&] {
    std::map<std::array<double, cost::kStages>, std::unique_ptr<cost::CostModel>> costs;  // by what is set
    d.schedules.clear();
    for (size_t k = 0; k < loads.size(); ++k) {
      std::unique_ptr<cost::CostModel>& cost = costs[{clocks[k][0].set, clocks[k][1].set}];
      if (!cost)
        cost =
            cost::make_cost_model(s.calibration, s.cluster, s.plan, s.gpus(), s.used_per_node(), clocks[k]);
      d.schedules.push_back(make_schedule(d.program(k), loads[k], *cost));
    }
  };
  d.fold =
      fold(kinds.of_rank, d.programs.front().groups, std::min(s.used_per_node(), s.gpus()), options.unfold);
  price();
  if (!power) return run(d);
  // A clock depends on how much of the stage is tensor work, and that on the clocks.
  constexpr double kBusy = 0.98, kSettled = 0.003;  // of a step, at first; of a clock
  constexpr int kTurns = 5;
  std::vector<cost::StepWork> work;
  for (const Schedule& schedule : d.schedules) work.push_back(schedule.work);
  // Seconds of the stages, waits included; of alike ranks, the first class's are all's.
  std::vector<std::array<double, cost::kStages>> lasts(loads.size());
  std::map<size_t, size_t> class_of;  // by kind
  for (size_t c = 0; c < d.fold.classes.size(); ++c) class_of.try_emplace(d.fold.classes[c].kind, c);
  const auto busy = [&](size_t k, size_t stage) { return work[k][stage].lasts(clocks[k][stage]); };
  for (int turn = 0; turn < kTurns; ++turn) {
    d.clock_settled = turn > 0;
    for (size_t k = 0; k < loads.size(); ++k) {
      cost::StepClocks next = clocks[k];
      for (size_t i = 0; i < cost::kStages; ++i) {
        const double stage = turn > 0 ? lasts[k][i] : busy(k, i) / kBusy;
        next[i] = power->clocks(work[k][i], stage, clocks[k][i], kinds.kinds[k].over_median);
        d.clock_settled = d.clock_settled && std::abs(next[i].set / clocks[k][i].set - 1) < kSettled;
      }
      clocks[k] = next;
    }
    if (d.clock_settled) break;
    price();
    run(d);
    for (const auto& [kind, of_class] : class_of) lasts[kind] = seconds_of_stages(d, of_class);
  }
  double slowest = 1;
  for (size_t k = 0; k < loads.size(); ++k) {
    double sum = 0, all = 0;  // by time
    for (size_t i = 0; i < cost::kStages; ++i) {
      sum += lasts[k][i] * power->mean_clock(work[k][i], lasts[k][i], clocks[k][i]);
      all += lasts[k][i];
    }
    slowest = std::min(slowest, sum / all);
  }
  d.clock = slowest * s.cluster["largest_clock_hz"];
}

// Where a kind of work happens, for bound_by.
const char* place_of(const program::Op& op, const program::StepProgram& program, const Scenario& s) {
  if (program::is_collective(op.kind))
    return cost::place(program.groups[op.group], s.used_per_node(), s.gpus()).nodes > 1 ? "network"
                                                                                        : "NVLink";
  if (op.stream == Stream::host) return "host CPU and DRAM";
  if (op.kind == OpKind::copy_h2d || op.kind == OpKind::copy_d2h) return "PCIe";
  return program::is_memory_bound(op.kind) ? "HBM bandwidth" : "tensor cores";
}

void explain(const Scenario& s, const Details& d, Prediction& p) {
  const engine::Report& r = d.report;
  p.steady = r.steady;
  p.operations = r.tasks;
  p.step_time = seconds(r.step_time);
  p.clock = d.clock;
  // Sums by component and kind, then by component and place, before any text is made.
  constexpr size_t kKinds = static_cast<size_t>(OpKind::next_batch) + 1;
  std::array<std::array<engine::Time, kKinds>, program::kComponents> by_kind{};
  std::array<std::map<const char*, engine::Time>, program::kComponents> by_place;
  engine::Time launch = 0;
  for (const engine::Stretch& stretch : r.critical_path) {
    const engine::Time t = stretch.end - stretch.start;
    if (stretch.task == engine::kLaunch) {
      launch += t;
      continue;
    }
    const uint32_t kind = d.fold.classes[stretch.rank].kind;
    const program::Op& op = d.program(kind).ops[d.schedules[kind].op_of_task[stretch.task]];
    by_kind[static_cast<size_t>(op.component)][static_cast<size_t>(op.kind)] += t;
    by_place[static_cast<size_t>(op.component)][place_of(op, d.program(kind), s)] += t;
  }
  std::vector<Named> bound;
  if (launch > 0) {
    p.time.push_back({"launch", seconds(launch)});
    p.time_by_kind.push_back({"launch", seconds(launch)});
    bound.push_back({"kernel launches", seconds(launch)});
  }
  for (size_t c = 0; c < program::kComponents; ++c) {
    const char* component = program::name(static_cast<Component>(c));
    engine::Time sum = 0;
    for (size_t k = 0; k < kKinds; ++k) {
      if (by_kind[c][k] == 0) continue;
      sum += by_kind[c][k];
      p.time_by_kind.push_back(
          {fmt::format("{} {}", component, program::name(static_cast<OpKind>(k))), seconds(by_kind[c][k])});
    }
    if (sum > 0) p.time.push_back({component, seconds(sum)});
    for (const auto& [where, t] : by_place[c])
      bound.push_back({fmt::format("{} on {}", component, where), seconds(t)});
  }
  const auto larger = [](const Named& a, const Named& b) {
    return a.value != b.value ? a.value > b.value : a.name < b.name;
  };
  std::sort(p.time.begin(), p.time.end(), larger);
  std::sort(p.time_by_kind.begin(), p.time_by_kind.end(), larger);
  std::sort(bound.begin(), bound.end(), larger);
  if (!bound.empty() && *p.step_time > 0)
    p.bound_by = fmt::format("{} ({:.0f} % of the step)", bound[0].name, 100 * bound[0].value / *p.step_time);
  for (int resource = 0; resource < engine::kResources; ++resource) {
    double most = 0;
    for (const engine::RankReport& rank : r.ranks)
      most = std::max(most, static_cast<double>(rank.used[static_cast<size_t>(resource)]) /
                                (static_cast<double>(std::max<engine::Time>(1, r.step_time)) *
                                 static_cast<double>(engine::kFull)));
    if (most > 0) p.busy.push_back({engine::name(static_cast<engine::Resource>(resource)), most});
  }
  for (const engine::RankReport& rank : r.ranks) {
    p.exposed_communication = std::max(p.exposed_communication, seconds(rank.exposed_communication));
    p.compute_busy = std::max(p.compute_busy, seconds(rank.compute_busy));
  }
  p.tokens_per_s_per_gpu =
      static_cast<double>(p.tokens_per_step) / *p.step_time / static_cast<double>(s.gpus());
  p.mfu = p.tokens_per_s_per_gpu * p.model_flops_per_token / s.cluster["peak_flops"];

  std::map<std::pair<Component, OpKind>, int> outside;
  for (size_t k = 0; k < d.schedules.size(); ++k)
    for (const program::OpId id : d.schedules[k].outside) {
      const program::Op& op = d.program(k).ops[id];
      ++outside[{op.component, op.kind}];
    }
  for (const auto& [what, count] : outside)
    p.warnings.push_back(fmt::format("{} {} ({} operations) is outside the calibrated range of {}",
                                     program::name(what.first), program::name(what.second), count,
                                     s.cluster.name));
  if (s.workload.precision == plan::Precision::fp32)
    p.warnings.push_back(
        "precision fp32: memory and bytes are those of fp32, but matrix products have bf16's speed here");
  // Seen in measured runs: reports/fsdp2.md.
  if (!s.plan.native() && static_cast<double>(p.hbm_peak) > 0.92 * static_cast<double>(p.hbm_capacity))
    p.warnings.push_back(
        "HBM is nearly full: PyTorch's allocator reserves 4-20 % more than it allocates, so this plan may "
        "still fail");
  if (!r.steady) p.warnings.push_back("step times had not become steady after 8 steps");
  if (!d.clock_settled)
    p.warnings.push_back(
        "the clocks had not settled: the step time may be off by what they still changed, some per mille");
}

}  // namespace

Prediction predict(const Scenario& s, const PredictOptions& options, Details* details) {
  const auto begin = std::chrono::steady_clock::now();
  validate(s);
  Details own;
  Details& d = details != nullptr ? *details : own;
  d = {};
  Prediction p;
  const plan::Layout layout = plan::layout(s.plan, s.gpus());
  const model::Parameters parameters = model::count_parameters(s.model);
  p.tokens_per_step = tokens_per_step(s);
  p.model_flops_per_token = model_flops(s).total();

  const std::optional<cost::Power> power = s.plan.native() && s.calibration == cost::Calibration::measured
                                               ? cost::Power::of(s.cluster)
                                               : std::nullopt;
  const Kinds kinds = find_kinds(s, layout, power);
  std::map<int64_t, std::vector<std::vector<program::ExpertLoad>>> loads_of_group;
  std::vector<std::vector<program::ExpertLoad>>& loads = d.loads;
  for (const Kinds::Kind& kind : kinds.kinds) {
    auto found = loads_of_group.find(kind.group);
    if (found == loads_of_group.end()) {
      double imbalance = 1;
      found = loads_of_group
                  .emplace(kind.group, expert_loads(s, layout, static_cast<int>(kind.group), &imbalance))
                  .first;
      p.imbalance = std::max(p.imbalance, imbalance);
    }
    loads.push_back(found->second[static_cast<size_t>(kind.expert)]);
    // Programs of our executor do not depend on the loads: one serves all kinds.
    if (!s.plan.native() || d.programs.empty())
      d.programs.push_back(
          program::lower({s.model, parameters, s.plan, layout, s.workload, kind.context, loads.back()}));
  }
  p.program_operations = d.programs.front().ops.size();
  memory(s, kinds, options.roughly_where_too_large, d, p);
  p.classes = kinds.kinds.size();
  if (p.fits && !options.only_memory) {
    simulate(s, kinds, power, loads, options, d);
    p.classes = d.fold.classes.size();
    explain(s, d, p);
    const double clock = d.clock ? *d.clock / s.cluster["largest_clock_hz"] : 1;
    p.estimate = s.calibration == cost::Calibration::measured ? estimate_step_time(s, clock) : 0;
    check(s, d, p);
  } else if (!p.fits) {
    p.bound_by = p.hbm_peak > p.hbm_capacity ? "HBM capacity" : "host memory capacity";
  }
  p.wall_time = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return p;
}

}  // namespace mop::predict
