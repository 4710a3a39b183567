#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "exec/checkpoint/crc32c.h"

namespace mop::checkpoint {
namespace {

uint32_t of(const std::string& text) {
  return crc32c(std::as_bytes(std::span(text)));
}

// RFC 3720, appendix B.4, and the check value of the CRC catalogues.
TEST(Crc32c, PublishedValues) {
  EXPECT_EQ(of(""), 0);
  EXPECT_EQ(of("123456789"), 0xe3069283);
  EXPECT_EQ(of(std::string(32, '\0')), 0x8a9136aa);
  EXPECT_EQ(of(std::string(32, '\xff')), 0x62a8ab43);
  std::string bytes;
  for (char c = 0; c < 32; ++c) bytes += c;
  EXPECT_EQ(of(bytes), 0x46dd794e);
  std::ranges::reverse(bytes);
  EXPECT_EQ(of(bytes), 0x113fdb5c);
}

TEST(Crc32c, EqualsTheDefinitionBitByBit) {
  std::mt19937 random(1);
  std::vector<std::byte> bytes(200);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  for (size_t first = 0; first < 9; ++first)
    for (size_t size = 0; first + size <= bytes.size(); ++size) {
      const std::span part = std::span(bytes).subspan(first, size);
      uint32_t crc = 0xffffffff;
      for (const std::byte b : part)
        for (int bit = 0; bit < 8; ++bit) {
          const bool odd = (crc ^ (std::to_integer<uint32_t>(b) >> bit)) & 1;
          crc = crc >> 1 ^ (odd ? 0x82f63b78 : 0);
        }
      ASSERT_EQ(crc32c(part), ~crc) << first << " " << size;
    }
}

}  // namespace
}  // namespace mop::checkpoint
