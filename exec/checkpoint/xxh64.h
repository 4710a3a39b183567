// XXH64, seed 0: a checksum at the speed of memory, by the specification in xxHash's doc/xxhash_spec.md.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

namespace mop::checkpoint {

uint64_t xxh64(std::span<const std::byte> bytes);

}  // namespace mop::checkpoint
