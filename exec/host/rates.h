// How fast this host's memory is while a run is on it.
#pragma once

namespace mop::host {

// Of one rank while all ranks of the host do the same, bytes/s. 0: the plan has nothing to measure it with.
struct Rates {
  double both_ways = 0;  // what its GPU's copies move, up and down together
  double adam = 0;       // what the CPU reads and writes of states that it updates
};

}  // namespace mop::host
