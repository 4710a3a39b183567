// One operation as a backend gets it: operands resolved to addresses. What it computes: sim/program/ops.h.
#pragma once
#include <cstddef>
#include <span>

#include "sim/program/program.h"

namespace mop::interpreter {

// A null pointer is a missing optional operand. `data` is where the view starts: View::offset, rank_stride
// and the round's slot are already added.
struct Operand {
  std::byte* data = nullptr;
  program::View view;
  explicit operator bool() const { return data != nullptr; }
};

struct Call {
  program::OpId id = 0;
  const program::Op* op = nullptr;
  std::span<const Operand> in, out;  // in the order of ops.h
  int index = 0, size = 1;           // of this rank in the operation's group
  int64_t round = 0;                 // in a repeat region: of this step, over all passes
};

}  // namespace mop::interpreter
