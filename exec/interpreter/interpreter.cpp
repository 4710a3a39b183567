#include "exec/interpreter/interpreter.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "sim/base/error.h"

namespace mop::interpreter {

using program::Dependency;
using program::kNoBuffer;
using program::Op;
using program::OpId;
using program::Region;
using program::Use;

Interpreter::Interpreter(const program::StepProgram& program, const Memory& memory, Backend& backend,
                         int64_t rank)
    : program_(program), backend_(backend), rank_(rank), iterations_(program.regions.size(), 0) {
  ensure(program.runnable, "a program that runs has operands with views");
  nodes_.reserve(program.ops.size());
  for (const Op& op : program.ops) {
    nodes_.push_back({op.stream, op.does.deferred, 0, op.region, 0, 0, 1, 0, 0, {}});
    any_deferred_ |= op.does.deferred;
  }
  lay_out_events();
  lay_out_calls(memory);
}

void Interpreter::lay_out_events() {
  const auto fail = [&](OpId id, const char* what) {
    throw InternalError(fmt::format("operation {} ({}): {}", id, program_.op_name(id), what));
  };
  const auto need = [&](OpId id, int slots) {
    nodes_[id].event_slots = std::max(nodes_[id].event_slots, static_cast<uint16_t>(slots));
  };
  std::vector<Dependency> sorted = program_.dependencies;
  std::ranges::stable_sort(sorted, {}, &Dependency::to);
  for (const Dependency& d : sorted) {
    const uint32_t region = nodes_[d.to].region;
    const bool within = region != 0 && nodes_[d.from].region == region;
    if (d.distance == 0 ? d.from >= d.to : !within && d.from <= d.to)
      fail(d.to, "waits for what is issued later");
    if (!within && d.distance > 1) fail(d.to, "waits for a step that is long over");
    Node& node = nodes_[d.to];
    if (node.wait_count == 0) node.waits = static_cast<uint32_t>(waits_.size());
    const Wait wait{d.from, within, d.distance};
    if (std::find(waits_.begin() + node.waits, waits_.end(), wait) != waits_.end()) continue;
    waits_.push_back(wait);
    ++node.wait_count;
    // A slot more than the distance: the record waited for is then the latest one of its event.
    need(d.from, within ? d.distance + 1 : 1);
  }
  for (size_t r = 1; r < program_.regions.size(); ++r) {
    const Region& region = program_.regions[r];
    if (region.plan >= region.first) fail(region.first, "its repeat region has no plan before it");
    if (nodes_[region.plan].region != 0 || nodes_[region.plan].deferred)
      fail(region.plan, "plans rounds, which is done once a step");
    for (const Use& use : program_.uses_of(program_.ops[region.plan]))
      if (use.write && program_.buffers[use.buffer].last < region.first)
        fail(region.plan, "its rounds are gone when the host asks for them");
    need(region.plan, 1);
  }
  uint32_t events = 0;
  for (Node& node : nodes_) {
    node.event = events;
    events += node.event_slots;
  }
  backend_.reserve(events);
}

void Interpreter::lay_out_calls(const Memory& memory) {
  size_t operands = 0, calls = 0;
  for (OpId id = 0; id < nodes_.size(); ++id) {
    const Op& op = program_.ops[id];
    Node& node = nodes_[id];
    for (const Use& use : program_.uses_of(op)) {
      const uint32_t slots = program_.buffers[use.buffer].slots;
      if (op.region == 0 && slots > 1)
        throw InternalError(fmt::format("{} uses '{}', which has a slot a round, outside of rounds",
                                        program_.op_name(id), program_.buffer_name(use.buffer)));
      node.call_variants = std::lcm(node.call_variants, slots);
    }
    node.calls = static_cast<uint32_t>(calls);
    calls += node.call_variants;
    operands += size_t{node.call_variants} * op.use_count;
  }
  calls_.reserve(calls);
  operands_.reserve(operands);  // calls_ points into it

  for (OpId id = 0; id < nodes_.size(); ++id) {
    const Op& op = program_.ops[id];
    Node& node = nodes_[id];
    Call call;
    call.id = id;
    call.op = &op;
    if (op.group != program::kNoGroup) {
      const program::Group& group = program_.groups[op.group];
      call.index = static_cast<int>(group.span().index(rank_));
      call.size = static_cast<int>(group.size);
    }
    for (uint32_t variant = 0; variant < node.call_variants; ++variant) {
      const auto add = [&](bool write) {
        const size_t first = operands_.size();
        for (const Use& use : program_.operands(op)) {
          if (use.write != write) continue;
          Operand& operand = operands_.emplace_back();
          operand.view = use.view;
          if (use.buffer == kNoBuffer) continue;
          const int64_t begin = use.view.offset + use.view.rank_stride * call.index,
                        end = begin + extent(use.view), bytes = memory.slot_bytes(use.buffer);
          if (begin < 0 || end > bytes)
            throw InternalError(fmt::format("operation {} ({}) {} bytes [{}, {}) of '{}', which has {}", id,
                                            program_.op_name(id), write ? "writes" : "reads", begin, end,
                                            program_.buffer_name(use.buffer), bytes));
          const program::Buffer& buffer = program_.buffers[use.buffer];
          operand.data = memory.at(use.buffer, variant % buffer.slots) + begin;
          int64_t& highest = node.highest[static_cast<size_t>(buffer.space)];
          highest = std::max(highest, operand.data - memory.base(buffer.space) + end - begin);
        }
        return std::span<const Operand>(operands_.data() + first, operands_.size() - first);
      };
      call.in = add(false);
      call.out = add(true);
      calls_.push_back(call);
    }
  }
}

void Interpreter::run(const Step& step) {
  issue(step, pending_ ? Act::all : Act::not_deferred);
  pending_ = any_deferred_;
}

void Interpreter::flush(const Step& step) {
  if (!pending_) return;
  issue(step, Act::deferred);
  pending_ = false;
}

void Interpreter::issue(const Step& step, Act act) {
  launch_.step = step;
  for (OpId id = 0; id < nodes_.size();) {
    const uint32_t r = nodes_[id].region;
    if (r == 0) {
      issue_op(id++, 0, act);
      continue;
    }
    // A flush knows no rounds: one that does nothing keeps the order that others wait for.
    const Region& region = program_.regions[r];
    const Node& plan = nodes_[region.plan];
    const int64_t rounds = act == Act::deferred ? 1 : backend_.rounds(plan.event, calls_[plan.calls]);
    ensure(rounds >= 1, "a region has a round");
    for (int64_t round = 0; round < rounds; ++round) {
      for (OpId body = region.first; body < region.last; ++body) issue_op(body, round, act);
      ++iterations_[r];
    }
    id = region.last;
  }
  ++iterations_[0];
  ++launch_.pass;
}

void Interpreter::issue_op(OpId id, int64_t round, Act act) {
  const Node& node = nodes_[id];
  const int64_t iteration = iterations_[node.region];
  for (uint32_t w = node.waits; w < node.waits + node.wait_count; ++w) {
    const Wait& wait = waits_[w];
    const Node& from = nodes_[wait.from];
    if (!wait.within && round > 0) continue;
    int64_t target = iteration - wait.distance;
    if (!wait.within) {
      // The last one issued: of a region outside of it, its count is complete; of the step itself, this
      // step's or the one before.
      target = from.region == 0 ? iterations_[0] - wait.distance : iterations_[from.region] - 1;
    }
    if (target < 0) continue;
    backend_.wait(node.stream, from.event + static_cast<uint32_t>(target % from.event_slots));
  }
  if (act == Act::all || node.deferred == (act == Act::deferred)) {
    launch_.call = calls_[node.calls + static_cast<size_t>(iteration % node.call_variants)];
    launch_.call.round = round;
    launch_.iteration = iteration;
    backend_.launch(node.stream, launch_);
    ++launch_.issue;
    for (size_t s = 0; s < highest_.size(); ++s) highest_[s] = std::max(highest_[s], node.highest[s]);
  }
  if (node.event_slots > 0)
    backend_.record(node.stream, node.event + static_cast<uint32_t>(iteration % node.event_slots));
}

}  // namespace mop::interpreter
