#include "exec/checkpoint/crc32c.h"

#include <array>
#include <bit>
#include <cstring>

namespace mop::checkpoint {
namespace {

static_assert(std::endian::native == std::endian::little,
              "eight bytes are taken as one little-endian number");

// tables[n][b]: what byte b becomes with n zero bytes after it; eight bytes then take eight look-ups
// ("slicing by 8", Kounavis and Berry, 2005).
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
    tables[0][b] = crc;
  }
  for (size_t n = 1; n < 8; ++n)
    for (size_t b = 0; b < 256; ++b)
      tables[n][b] = tables[n - 1][b] >> 8 ^ tables[0][tables[n - 1][b] & 0xff];
  return tables;
}();

}  // namespace

uint32_t crc32c(std::span<const std::byte> bytes) {
  uint32_t crc = 0xffffffff;
  const std::byte* at = bytes.data();
  size_t left = bytes.size();
  for (; left >= 8; left -= 8, at += 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    word ^= crc;
    crc = 0;
    for (size_t n = 0; n < 8; ++n) crc ^= kTables[7 - n][word >> 8 * n & 0xff];
  }
  for (; left > 0; --left, ++at) crc = crc >> 8 ^ kTables[0][(crc ^ std::to_integer<uint32_t>(*at)) & 0xff];
  return ~crc;
}

}  // namespace mop::checkpoint
