#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "exec/checkpoint/xxh64.h"

namespace mop::checkpoint {
namespace {

TEST(Xxh64, PublishedValues) {
  const auto of = [](const std::string& text) { return xxh64(std::as_bytes(std::span(text))); };
  EXPECT_EQ(of(""), 0xef46db3751d8e999);
  EXPECT_EQ(of("a"), 0xd24ec4f1a98c6e5b);
  EXPECT_EQ(of("abc"), 0x44bc2cf5ad770999);
}

// Of libxxhash 0.8.1, for bytes 3, 10, 17, ...: around every length at which the algorithm changes.
TEST(Xxh64, EqualsTheReferenceLibrary) {
  const std::vector<std::pair<size_t, uint64_t>> expected{
      {1, 0x1f25c8d0bc1f4bb6},   {3, 0x31d2363f52e564c9},  {4, 0x9bb64b7d66ee9fda},  {7, 0x9a7b149959ce60d8},
      {8, 0xdab99d95c6f90092},   {9, 0x170bb6bf975b4c02},  {31, 0xa2aa5f33cc4a6119}, {32, 0x23c3c17ef790fd97},
      {33, 0x50a7cfc7ba588784},  {63, 0x5e3e54b431c7493c}, {64, 0x0eb64b3ef6eeb01f}, {65, 0xa383b724b2bd12f1},
      {101, 0xbad4d3bf033bda4c}, {255, 0x39ae55a29989206f}};
  for (size_t shift = 0; shift < 8; ++shift)  // at any alignment
    for (const auto& [size, hash] : expected) {
      std::vector<std::byte> bytes(shift + size);
      for (size_t i = 0; i < size; ++i) bytes[shift + i] = static_cast<std::byte>(i * 7 + 3);
      EXPECT_EQ(xxh64(std::span(bytes).subspan(shift)), hash) << size;
    }
}

}  // namespace
}  // namespace mop::checkpoint
