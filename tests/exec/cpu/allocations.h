// Heap allocations of this thread, counted where every allocation ends up: malloc and its kin.
#pragma once
#include <cstdint>

namespace mop::cpu {

int64_t allocations_so_far();

}  // namespace mop::cpu
