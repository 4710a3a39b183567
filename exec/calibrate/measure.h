// The benchmarks of one set of processes, a GPU each.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "exec/calibrate/findings.h"
#include "exec/launch/peers.h"
#include "exec/launch/place.h"

namespace mop::calibrate {

// Collective. names: of families; those of the other set are passed over. before: called with each that
// begins, and how many are done of how many. Returns what all found, at process 0. Ends all processes where
// one fails.
Findings measure(const launch::Place& place, launch::Peers& peers, const std::vector<std::string>& names,
                 bool emulated, const std::function<void(size_t done, size_t total)>& before);

// Where a rank stands for a GPU of another host: the environment that makes NCCL take the halves of `ranks`
// for two hosts.
std::vector<std::pair<std::string, std::string>> emulated_host(int rank, int ranks);

}  // namespace mop::calibrate
