#include "exec/checkpoint/xxh64.h"

#include <array>
#include <bit>
#include <cstring>

namespace mop::checkpoint {
namespace {

static_assert(std::endian::native == std::endian::little, "words are little-endian");

constexpr uint64_t k1 = 0x9e3779b185ebca87, k2 = 0xc2b2ae3d27d4eb4f, k3 = 0x165667b19e3779f9,
                   k4 = 0x85ebca77c2b2ae63, k5 = 0x27d4eb2f165667c5;

template <typename Word>
uint64_t load(const std::byte* from) {
  Word word;
  std::memcpy(&word, from, sizeof(Word));
  return word;
}

uint64_t round(uint64_t lane, uint64_t word) {
  return std::rotl(lane + word * k2, 31) * k1;
}

}  // namespace

uint64_t xxh64(std::span<const std::byte> bytes) {
  const std::byte* at = bytes.data();
  size_t left = bytes.size();
  uint64_t hash = k5;
  if (left >= 32) {
    std::array<uint64_t, 4> lanes{k1 + k2, k2, 0, 0 - k1};
    for (; left >= 32; left -= 32)
      for (uint64_t& lane : lanes) {
        lane = round(lane, load<uint64_t>(at));
        at += 8;
      }
    hash =
        std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) + std::rotl(lanes[3], 18);
    for (const uint64_t lane : lanes) hash = (hash ^ round(0, lane)) * k1 + k4;
  }
  hash += bytes.size();
  for (; left >= 8; left -= 8, at += 8) hash = std::rotl(hash ^ round(0, load<uint64_t>(at)), 27) * k1 + k4;
  for (; left >= 4; left -= 4, at += 4) hash = std::rotl(hash ^ load<uint32_t>(at) * k1, 23) * k2 + k3;
  for (; left > 0; --left, ++at) hash = std::rotl(hash ^ load<uint8_t>(at) * k5, 11) * k1;
  hash = (hash ^ hash >> 33) * k2;
  hash = (hash ^ hash >> 29) * k3;
  return hash ^ hash >> 32;
}

}  // namespace mop::checkpoint
