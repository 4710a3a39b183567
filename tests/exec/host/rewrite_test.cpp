#include "exec/host/rewrite.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace mop::host {
namespace {

TEST(Rewrite, LeavesAnyBitsAsTheyAre) {
  std::mt19937_64 random(3);
  for (const int threads : {1, 3, 8}) {
    Workers workers(std::vector<int>(static_cast<size_t>(threads), -1));
    for (const int64_t bytes : {0, 1, 191, 192, 193, 100'000, 3'333'333}) {
      std::vector<std::byte> memory(static_cast<size_t>(bytes) + 2);
      for (std::byte& b : memory) b = static_cast<std::byte>(random());
      const std::vector<std::byte> before = memory;
      rewrite(memory.data() + 1, bytes, workers);
      EXPECT_TRUE(memory == before) << bytes << " bytes, " << threads << " threads";
    }
  }
}

}  // namespace
}  // namespace mop::host
