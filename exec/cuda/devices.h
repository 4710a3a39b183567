// The GPUs of this host, as this process sees them.
#pragma once

namespace mop::cuda {

// A queue of the hardware for each stream, as one that waits for another GPU must hold up no other: fewer, as
// other programs ask for in the same environment, would. Before any call of CUDA.
void ask_for_queues();

// How many there are; at least one. Errors: UserError without a GPU, which ends in what to do instead.
int count_devices(const char* instead);

// Makes it current on this thread, with its context. Errors: UserError when the GPU gives none, as other
// programs have all of it.
void use_device(int device);

}  // namespace mop::cuda
