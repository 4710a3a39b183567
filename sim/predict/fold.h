// Which ranks behave alike. Ranks start alike when they run the same program on the same loads; ranks that
// share collectives or a node with differing others are told apart until nothing changes (the coarsest
// equitable partition), so that simulating one rank of each class gives exactly what simulating all of them
// would.
#pragma once
#include <cstdint>
#include <vector>

#include "sim/program/program.h"

namespace mop::predict {

struct RankClass {
  int64_t rank = 0;   // its lowest member
  uint32_t kind = 0;  // as given by the caller
  int64_t members = 0;
  uint32_t node = 0;              // kind of node that it is on
  uint32_t per_node = 1;          // members on such a node
  std::vector<uint32_t> meeting;  // by communicator: which meeting point
};

struct Fold {
  std::vector<RankClass> classes;
  std::vector<uint32_t> meeting_size;  // classes that meet
  uint32_t nodes = 0;                  // kinds of node
};

// kinds: (ranks) what each rank runs. groups: the communicators. unfold: every rank is a class of its own.
Fold fold(const std::vector<uint32_t>& kinds, const std::vector<program::Group>& groups,
          int64_t gpus_per_node, bool unfold);

}  // namespace mop::predict
