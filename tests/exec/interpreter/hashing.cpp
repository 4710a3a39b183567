#include "tests/exec/interpreter/hashing.h"

#include <chrono>
#include <cstring>
#include <thread>

namespace mop::test {

using namespace program;
using interpreter::Call;
using interpreter::Launch;
using interpreter::Operand;

namespace {

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
  return hash ^ (hash >> 29);
}

template <typename Visit>
void for_each(const Operand& operand, Visit visit) {
  const View& v = operand.view;
  for (int64_t matrix = 0; matrix < v.count; ++matrix)
    for (int64_t row = 0; row < v.rows; ++row)
      for (int64_t col = 0; col < v.cols; ++col)
        visit(operand.data + 4 * (matrix * v.stride + row * v.ld + col));
}

uint64_t hash_of(std::span<const Operand> operands, uint64_t hash) {
  for (const Operand& operand : operands)
    for_each(operand, [&](const std::byte* at) {
      uint32_t value;
      std::memcpy(&value, at, 4);
      hash = mix(hash, value);
    });
  return hash;
}

// What one rank's call brings: its own inputs, and what it adds to.
uint64_t seen_by(const Call& call, uint64_t hash) {
  hash = hash_of(call.in, hash);
  return call.op->does.accumulate ? hash_of(call.out, hash) : hash;
}

uint64_t seed_of(OpId id, int64_t round, int64_t step) {
  return mix(mix(mix(17, id), static_cast<uint64_t>(round)), static_cast<uint64_t>(step));
}

void write(const Call& call, uint64_t hash, int64_t rounds) {
  uint32_t n = 0;
  for (const Operand& operand : call.out)
    for_each(operand, [&](std::byte* at) {
      auto value = static_cast<uint32_t>(mix(mix(hash, n++), static_cast<uint64_t>(call.index)));
      if (rounds > 0 && n == 1) value = static_cast<uint32_t>(rounds);
      std::memcpy(at, &value, 4);
    });
}

int64_t rounds_asked_for(const StepProgram& program, const Call& call, int64_t rank, int64_t step) {
  return call.op->kind == OpKind::plan_routing ? rounds_of(program, call.id, rank, step) : 0;
}

void dawdle() {
  thread_local uint64_t state = std::hash<std::thread::id>{}(std::this_thread::get_id()) | 1;
  state = mix(state, 1) + 1;
  if (state % 8 < 3) std::this_thread::yield();
  if (state % 16 == 5) std::this_thread::sleep_for(std::chrono::microseconds(state % 97));
}

}  // namespace

int64_t rounds_of(const StepProgram& program, OpId plan, int64_t rank, int64_t step) {
  const Group& group = program.groups[program.ops[plan].group];
  const int64_t base = rank - rank / group.stride % group.size * group.stride;
  return 1 + static_cast<int64_t>(mix(seed_of(plan, 0, step), static_cast<uint64_t>(base)) % 4);
}

HashKernels::HashKernels(const std::vector<const StepProgram*>& programs, bool jitter)
    : programs_(programs), jitter_(jitter) {
  for (const StepProgram* program : programs) digests_.emplace_back(program->ops.size(), 0);
}

void HashKernels::clear() {
  for (Digests& digests : digests_) std::ranges::fill(digests, 0);
}

cpu::Kernels HashKernels::kernels() {
  return {[this](int rank, Stream, const Launch& launch) { execute(rank, launch, nullptr); },
          [this](int rank, Stream, const Launch& launch, cpu::Meeting& meeting) {
            execute(rank, launch, &meeting);
          },
          [](const Call& plan) {
            int32_t rounds;
            std::memcpy(&rounds, plan.out[0].data, 4);
            return static_cast<int64_t>(rounds);
          }};
}

void HashKernels::execute(int rank, const Launch& launch, cpu::Meeting* meeting) {
  if (interrupt) interrupt(rank, launch);
  if (jitter_) dawdle();
  const Call& call = launch.call;
  uint64_t hash = seed_of(call.id, call.round, launch.step.number);
  if (meeting == nullptr) {
    hash = seen_by(call, hash);
  } else {
    for (const Call* const other : meeting->calls()) hash = seen_by(*other, hash);
    if (jitter_) dawdle();
    meeting->barrier();
  }
  const auto r = static_cast<size_t>(rank);
  write(call, hash, rounds_asked_for(*programs_[r], call, rank, launch.step.number));
  uint64_t& digest = digests_[r][call.id];
  digest = mix(digest, hash);
}

Reference::Reference(const StepProgram& program, int ranks) : program_(program) {
  for (int r = 0; r < ranks; ++r) {
    State& state = state_.emplace_back();
    for (const Buffer& buffer : program.buffers)
      state.buffers.emplace_back(static_cast<size_t>(buffer.bytes));
    state.iterations.resize(program.regions.size());
    state.digests.resize(program.ops.size());
  }
}

void Reference::run(int64_t step) {
  issue(step, false);
  pending_ = true;
}

void Reference::flush(int64_t step) {
  if (pending_) issue(step, true);
  pending_ = false;
}

void Reference::issue(int64_t step, bool flush) {
  std::vector<int64_t> everyone;
  for (size_t r = 0; r < state_.size(); ++r) everyone.push_back(static_cast<int64_t>(r));
  const auto acts = [&](OpId id) {
    const bool deferred = program_.ops[id].does.deferred;
    return flush ? deferred : !deferred || pending_;
  };
  for (OpId id = 0; id < program_.ops.size();) {
    const uint32_t r = program_.ops[id].region;
    if (r == 0) {
      if (acts(id)) execute(id, 0, step, everyone);
      ++id;
      continue;
    }
    const Region& region = program_.regions[r];
    for (int64_t round = 0;; ++round) {
      std::vector<int64_t> here;
      for (const int64_t rank : everyone)
        if (round < (flush ? 1 : rounds_of(program_, region.plan, rank, step))) here.push_back(rank);
      if (here.empty()) break;
      for (OpId body = region.first; body < region.last; ++body)
        if (acts(body)) execute(body, round, step, here);
      for (const int64_t rank : here) ++state_[static_cast<size_t>(rank)].iterations[r];
    }
    id = region.last;
  }
}

void Reference::execute(OpId id, int64_t round, int64_t step, const std::vector<int64_t>& ranks) {
  const Op& op = program_.ops[id];
  struct One {
    int64_t rank, base;
    Call call;
    std::vector<Operand> in, out;
    uint64_t hash;
  };
  std::vector<One> all;
  for (const int64_t rank : ranks) {
    State& state = state_[static_cast<size_t>(rank)];
    One& one = all.emplace_back();
    one.rank = one.base = rank;
    one.call.id = id;
    one.call.op = &op;
    one.call.round = round;
    if (op.group != kNoGroup) {
      const Group& group = program_.groups[op.group];
      one.call.index = static_cast<int>(rank / group.stride % group.size);
      one.base = rank - one.call.index * group.stride;
    }
    for (uint32_t u = op.uses; u < op.uses + op.use_count; ++u) {
      const Use& use = program_.uses[u];
      const Buffer& buffer = program_.buffers[use.buffer];
      const int64_t slot = state.iterations[op.region] % buffer.slots;
      (use.write ? one.out : one.in)
          .push_back({state.buffers[use.buffer].data() + slot * (buffer.bytes / buffer.slots) +
                          use.view.offset + use.view.rank_stride * one.call.index,
                      use.view});
    }
  }
  for (One& one : all) one.call.in = one.in, one.call.out = one.out;
  for (One& one : all) {
    one.hash = seed_of(id, round, step);
    if (!is_collective(op.kind)) {
      one.hash = seen_by(one.call, one.hash);
      continue;
    }
    for (const One& other : all)  // by rank is by index
      if (other.base == one.base) one.hash = seen_by(other.call, one.hash);
  }
  for (One& one : all) {
    write(one.call, one.hash, rounds_asked_for(program_, one.call, one.rank, step));
    uint64_t& digest = state_[static_cast<size_t>(one.rank)].digests[id];
    digest = mix(digest, one.hash);
  }
}

Machine::Machine(const StepProgram& p, int ranks, const Options& options)
    : program(p),
      plan(interpreter::plan_memory(p, options.guard)),
      kernels(std::vector<const StepProgram*>(static_cast<size_t>(ranks), &p), options.jitter) {
  cpu::WorldOptions world_options{options.commands, options.trace_spans, {}};
  for (int r = 0; r < ranks; ++r) {
    std::byte* const hbm = arenas.emplace_back(plan.arenas.hbm.bytes).data();
    std::byte* const host = arenas.emplace_back(plan.arenas.host.bytes).data();
    memories.emplace_back(p, plan, hbm, host);
    if (options.guard == 0 && !options.finite) continue;
    checks.push_back(std::make_unique<interpreter::Checks>(p, memories.back(), r, options.finite));
    world_options.checks.push_back(checks.back().get());
  }
  world = std::make_unique<cpu::World>(std::vector<const StepProgram*>(static_cast<size_t>(ranks), &p),
                                       kernels.kernels(), world_options);
  for (int r = 0; r < ranks; ++r)
    interpreters.push_back(std::make_unique<interpreter::Interpreter>(p, memories[static_cast<size_t>(r)],
                                                                      world->backend(r), r));
}

interpreter::Step Machine::settings(int64_t number) const {
  interpreter::Step step;
  step.number = number;
  return step;
}

void Machine::step(int64_t number) {
  world->run([&](int rank) {
    interpreters[static_cast<size_t>(rank)]->run(settings(number));
    world->backend(rank).synchronize();
  });
}

std::byte* Machine::data(int rank, BufferId id) const {
  return memories[static_cast<size_t>(rank)].at(id, 0);
}

}  // namespace mop::test
