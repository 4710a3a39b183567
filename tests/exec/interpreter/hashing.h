// Operations that compute hashes of everything they see, in two ways: as kernels for the CPU backend, and in
// issue order on one thread, every buffer in memory of its own. Wherever the two agree, every operation saw
// the values that it should.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "exec/cpu/backend.h"
#include "exec/interpreter/interpreter.h"

namespace mop::test {

using Digests = std::vector<uint64_t>;  // by operation: of all that its executions saw, in their order

// Rounds of a region for one step: the same on all ranks of its group. 1 to 4.
int64_t rounds_of(const program::StepProgram& program, program::OpId plan, int64_t rank, int64_t step);

class HashKernels {
 public:
  // jitter: operations take a random while.
  HashKernels(const std::vector<const program::StepProgram*>& programs, bool jitter);

  // Called ahead of every operation: a place to fail.
  std::function<void(int rank, const interpreter::Launch& launch)> interrupt;

  cpu::Kernels kernels();
  const Digests& digests(int rank) const { return digests_[static_cast<size_t>(rank)]; }
  void clear();

 private:
  void execute(int rank, const interpreter::Launch& launch, cpu::Meeting* meeting);
  std::vector<const program::StepProgram*> programs_;
  bool jitter_;
  std::vector<Digests> digests_;
};

// The same, one operation after the other.
class Reference {
 public:
  Reference(const program::StepProgram& program, int ranks);
  void run(int64_t step);
  void flush(int64_t step);

  const Digests& digests(int rank) const { return state_[static_cast<size_t>(rank)].digests; }
  const std::vector<std::byte>& buffer(int rank, program::BufferId id) const {
    return state_[static_cast<size_t>(rank)].buffers[id];
  }

 private:
  struct State {
    std::vector<std::vector<std::byte>> buffers;
    std::vector<int64_t> iterations;  // by region
    Digests digests;
  };
  void issue(int64_t step, bool flush);
  void execute(program::OpId id, int64_t round, int64_t step, const std::vector<int64_t>& ranks);

  const program::StepProgram& program_;
  std::vector<State> state_;
  bool pending_ = false;
};

// All that running programs takes: arenas, kernels, a world and an interpreter a rank.
struct Machine {
  struct Options {
    int64_t guard = 0;
    bool finite = false;  // checks
    bool jitter = true;
    size_t commands = 64, trace_spans = 0;
  };
  Machine(const program::StepProgram& program, int ranks, const Options& options);

  // A step on every rank; waits for it.
  void step(int64_t number);
  interpreter::Step settings(int64_t number) const;
  std::byte* data(int rank, program::BufferId id) const;

  const program::StepProgram& program;
  interpreter::MemoryPlan plan;
  HashKernels kernels;
  std::vector<interpreter::HostBytes> arenas;  // two a rank
  std::vector<interpreter::Memory> memories;
  std::vector<std::unique_ptr<interpreter::Checks>> checks;
  std::unique_ptr<cpu::World> world;
  std::vector<std::unique_ptr<interpreter::Interpreter>> interpreters;
};

}  // namespace mop::test
