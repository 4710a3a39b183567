// Reads and writes of memory that change nothing, to see how fast it is.
#pragma once
#include <cstddef>
#include <cstdint>

#include "exec/host/workers.h"

namespace mop::host {

// Reads every byte and writes it back as it was, in three streams, as AdamW goes through master, m and v:
// what others write meanwhile is lost. Less than 192 bytes at the end are left out.
void rewrite(std::byte* memory, int64_t bytes, Workers& workers);

}  // namespace mop::host
