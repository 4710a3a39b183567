#include "exec/cuda/staging.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "tests/kernels/device_array.h"

namespace mop::cuda {
namespace {

TEST(Staging, BytesGoUpAndComeDownUnchanged) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  constexpr int64_t kMiB = 1 << 20;
  std::mt19937_64 random(3);
  Staging staging;
  // Around the chunks' borders, and several times as much.
  for (const int64_t bytes :
       {int64_t{0}, int64_t{1}, int64_t{4097}, 16 * kMiB - 1, 16 * kMiB, 16 * kMiB + 1, 80 * kMiB + 12345}) {
    std::vector<std::byte> from(static_cast<size_t>(bytes)), to(from.size(), std::byte{7});
    for (std::byte& b : from) b = static_cast<std::byte>(random());
    const DeviceBytes first = device_bytes(bytes, "a test"), second = device_bytes(bytes, "a test");
    staging.copy(first.get(), from.data(), bytes);
    staging.copy(second.get(), first.get(), bytes);
    staging.copy(to.data(), second.get(), bytes);
    EXPECT_TRUE(from == to) << bytes << " bytes";
    const PinnedBytes pinned = pinned_bytes(bytes, "a test");
    staging.copy(pinned.get(), from.data(), bytes);
    EXPECT_TRUE(std::equal(from.begin(), from.end(), pinned.get())) << bytes << " bytes";
  }
}

}  // namespace
}  // namespace mop::cuda
