// Checks around every operation of a rank, for tests and for hunting errors: guard zones that nobody may
// write, and the first operation that made a number that is not finite. A backend calls before() and after()
// around each execution, from whatever thread runs it.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "exec/interpreter/backend.h"
#include "exec/interpreter/memory.h"

namespace mop::interpreter {

// The first output, in issue order, with a NaN or an infinity in it.
struct NotFinite {
  int64_t issue = 0;
  program::OpId op = 0;
  int64_t round = 0;
  std::string what;  // "rank 3: output 0 of operation 17 (L1 forward experts gemm), round 0, is not finite"
};

// Whether an output tells something by being finite, and who says so where it does not.
bool tells(const program::StepProgram& program, const Launch& launch, size_t output);
NotFinite not_finite(const program::StepProgram& program, int64_t rank, const Launch& launch, size_t output);

class Checks {
 public:
  // Guards are checked where the memory was planned with them; finite: outputs are scanned, too. Writes the
  // guards of persistent buffers.
  Checks(const program::StepProgram& program, const Memory& memory, int64_t rank, bool finite);

  // Writes the guards of the buffers that this operation is the first to use: earlier, the bytes are others'.
  void before(const Launch& launch);
  // Errors: InternalError that names operation and buffer when a guard of an operand's buffer is broken.
  void after(const Launch& launch);

  std::optional<NotFinite> first_not_finite() const;

 private:
  void scan(const Launch& launch);

  const program::StepProgram& program_;
  Memory memory_;
  int64_t rank_;
  bool finite_;
  std::vector<program::OpId> opener_;                // by buffer: its first user in issue order
  std::vector<size_t> first_slot_;                   // by buffer: where its slots are in guarded_
  std::unique_ptr<std::atomic<int64_t>[]> guarded_;  // by slot: the pass whose guards stand there; -1: none
  mutable std::mutex mutex_;
  std::optional<NotFinite> first_;
};

}  // namespace mop::interpreter
