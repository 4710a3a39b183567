// How connections between process 0 and each of the others come about: process 0 listens, the others knock
// and say who they are. Strangers are sent away.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "exec/launch/socket.h"

namespace mop::launch {

struct Party {
  int rank = 0, size = 1;
  uint64_t key = 0;  // of a run and a set of connections
};

// At process 0: connections by rank; none at [0] and for those that have not come by then. Errors: UserError
// when this process may not open more connections.
std::vector<Socket> admit(const Socket& door, const Party& party, Clock::time_point until);

// At another process: the connection to process 0, which has let it in. Tries again and again: process 0 may
// not be there yet, or another run, which goes, may be. Errors: UserError when that lasted until then, or
// when process 0 takes this process for one of another version or size, or a second one of its rank.
Socket knock(const std::function<std::vector<Address>()>& addresses, const Party& party,
             Clock::time_point until);

}  // namespace mop::launch
