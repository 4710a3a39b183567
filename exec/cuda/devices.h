// The GPUs of this host, as this process sees them.
#pragma once

namespace mop::cuda {

// How many there are; at least one. Before any other call of CUDA: it also asks for a queue of the hardware for each stream,
// as one that waits for another GPU must hold up no other. Errors: UserError without a GPU, which ends in what to do instead.
int count_devices(const char* instead);

}  // namespace mop::cuda
