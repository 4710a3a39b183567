// Random step programs that use everything the interpreter knows: streams, repeat regions with buffers of two
// slots, deferred operations, collectives over several groups, views of parts of buffers, two spaces.
#pragma once
#include <cstdint>
#include <random>

#include "sim/program/program.h"

namespace mop::test {

using Random = std::mt19937_64;

inline int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// For `ranks` ranks. Elements are i32. Groups that regions use are the same as those of their plan_routing.
program::StepProgram random_program(Random& random, int ranks);

}  // namespace mop::test
