// Machines drawn at random: whatever the engine allows, in small.
#pragma once
#include <random>

#include "sim/engine/tasks.h"

namespace mop::engine {

struct Draw {
  uint32_t nodes = 1;
  uint32_t classes = 1;         // rank classes; every node has ranks of each
  uint32_t ranks_of_class = 1;  // on a node, all alike
  uint32_t tasks = 30;
  uint32_t streams = 4;
  bool contention = true, launches = true, carried = true, meetings = true;
};

// The same machine twice. Folded, one rank stands for the alike ones of its node; unfolded, each is there.
// Every class has three communicators: its alike ranks of the node; those in its place on the other nodes;
// all ranks of all classes.
struct Pair {
  Machine folded, unfolded;
};

Pair draw(const Draw& what, std::mt19937& random);

}  // namespace mop::engine
