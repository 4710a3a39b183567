// Walks a step program in issue order for one rank and enqueues it on a backend: for every dependency a wait,
// behind every operation that somebody waits for a record. It decides nothing: what overlaps, and what a rank
// computes, is the program's.
//
// Iterations of a repeat region count on from step to step: iteration i uses slot i mod slots of a buffer,
// and waits d iterations back reach into the step before. Everything is laid out at construction; a step
// allocates nothing.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "exec/interpreter/backend.h"
#include "exec/interpreter/memory.h"

namespace mop::interpreter {

// Of a step, regions' rounds included: what is kept for each operation has this much room.
inline size_t most_launches(const program::StepProgram& program) {
  return 4 * program.ops.size() + 4096;
}

class Interpreter {
 public:
  // program and backend outlive it; rank: in the whole run, from 0.
  // Errors: InternalError when the program cannot be run as it is: an operand reaches beyond its buffer, a
  // region without a plan, a dependency that points the wrong way. The message names operation and buffer.
  Interpreter(const program::StepProgram& program, const Memory& memory, Backend& backend, int64_t rank);

  // Issues one step. Deferred operations are left out where nothing is pending: in the first step, and in the
  // first one after a flush. All ranks call run and flush alike. Asynchronous but for the regions' rounds.
  void run(const Step& step);

  // Issues what the last step deferred and nothing else; nothing at all when nothing is pending.
  void flush(const Step& step);

  // End of the highest bytes that launched operations addressed so far, from the arena's start.
  int64_t highest_byte(program::Space space) const { return highest_[static_cast<size_t>(space)]; }

 private:
  enum class Act { all, not_deferred, deferred };

  struct Node {
    program::Stream stream;
    bool deferred;
    uint16_t event_slots;  // 0: nobody waits for it
    uint32_t region;
    uint32_t event;                 // the first of event_slots; iteration i records event + i mod event_slots
    uint32_t calls, call_variants;  // range of calls_: iteration i is calls + i mod call_variants
    uint32_t waits, wait_count;     // range of waits_
    std::array<int64_t, 2> highest;  // by space
  };
  struct Wait {
    program::OpId from;
    bool within;       // both in one region: the iteration `distance` back; else the source's last one,
    uint8_t distance;  // before the first of this step
    bool operator==(const Wait&) const = default;
  };

  void lay_out_events();
  void lay_out_calls(const Memory& memory);
  void issue(const Step& step, Act act);
  void issue_op(program::OpId id, int64_t round, Act act);

  const program::StepProgram& program_;
  Backend& backend_;
  int64_t rank_;
  std::vector<Node> nodes_;  // by operation
  std::vector<Wait> waits_;
  std::vector<Operand> operands_;
  std::vector<Call> calls_;
  std::vector<int64_t> iterations_;  // by region: issued so far
  Launch launch_;
  std::array<int64_t, 2> highest_{};
  bool any_deferred_ = false, pending_ = false;
};

}  // namespace mop::interpreter
