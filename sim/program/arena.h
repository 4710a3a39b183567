// Static memory planning: every buffer of one space gets an offset in one arena. Two buffers share bytes only
// when every use of the one has completed before the first use of the other may start, in this step and
// across to the next one, as the program's dependencies and streams guarantee it: no allocator, no
// synchronisation of its own.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "sim/program/program.h"

namespace mop::program {

inline constexpr int64_t kAlignment = 512;  // bytes; PyTorch's allocator rounds alike
inline constexpr int64_t kNotHere = -1;

struct Arena {
  int64_t bytes = 0;       // size of the arena
  int64_t live_bytes = 0;  // most bytes of live buffers at any operation, in issue order
  OpId live_peak = 0;      // there
  int64_t held_bytes =
      0;  // the same, counting what is free but not yet known to be by the streams that open buffers
  std::array<int64_t, kHolds> live_by_holds{};  // of the live bytes at that operation
  std::vector<int64_t> offset;                  // by buffer; kNotHere: of another space or never used
};

struct Arenas {
  Arena hbm, host;
};
// Of one space each, in bytes.
struct Capacities {
  int64_t hbm, host;
};

// Without packing: live and held bytes only; arena bytes are then the held bytes and offsets are missing.
Arenas plan_arenas(const StepProgram& program, bool pack = true);
// Packed where a space's live bytes are within `most`. Else no packing makes it fit, and arena bytes are the
// live bytes.
Arenas plan_arenas(const StepProgram& program, const Capacities& most);

// "HBM needs 150 GiB, has 139.8 GiB: 10.2 GiB too much (largest buffers: ...)": of those of the space that
// live at its peak.
std::string shortfall(const std::string& what, int64_t need, int64_t have, const StepProgram& program,
                      const Arena& arena, Space space);

// What the planner knows of order: does every use of `before` complete before the first use of `after`
// starts, within a step (steps_later 0) or in the next one (1)? For tests.
bool ordered(const StepProgram& program, BufferId before, BufferId after, int steps_later);

}  // namespace mop::program
