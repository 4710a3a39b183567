#include "exec/host/memory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

namespace mop::host {
namespace {

namespace fs = std::filesystem;

// A file system of its own.
class Memory : public ::testing::Test {
 protected:
  Memory() { write("proc/meminfo", "MemTotal:  100 kB\nMemAvailable:   80 kB\nHugePages_Total:  0\n"); }
  ~Memory() override { fs::remove_all(root); }
  void write(const fs::path& path, const std::string& text) const {
    fs::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  }
  void limit(const fs::path& group, const std::string& most, int64_t now, int64_t files = 0) const {
    const fs::path at = fs::path("sys/fs/cgroup") / group;
    write(at / "memory.max", most + "\n");
    write(at / "memory.current", std::to_string(now) + "\n");
    write(at / "memory.stat", "anon 1\nactive_file 2\ninactive_file " + std::to_string(files) + "\nslab 3\n");
  }
  const fs::path root = fs::temp_directory_path() / ("mop_memory_" + std::to_string(getpid()));
};

TEST_F(Memory, WithoutLimitsIsWhatTheKernelSays) {
  EXPECT_EQ(total_memory(root), 100 * 1024);
  EXPECT_EQ(available_memory(root), 80 * 1024);
  write("proc/self/cgroup", "0::/job/step\n");
  limit("job/step", "max", 5000);
  limit("", "max", 7000);
  EXPECT_EQ(available_memory(root), 80 * 1024);
}

TEST_F(Memory, IsLeftOfTheTightestGroup) {
  write("proc/self/cgroup", "1:cpu:/elsewhere\n0::/job/step\n");
  limit("job/step", "60000", 10000);
  EXPECT_EQ(available_memory(root), 50000);
  limit("job", "30000", 12000, 2000);  // 2000 come back
  EXPECT_EQ(available_memory(root), 20000);
  limit("job", "30000", 31000);
  EXPECT_EQ(available_memory(root), 0);
}

TEST_F(Memory, OfAContainerIsAtItsRoot) {
  write("proc/self/cgroup", "0::/\n");
  limit("", "40000", 10000);
  EXPECT_EQ(available_memory(root), 30000);
}

TEST_F(Memory, IsZeroWhereNothingIsKnown) {
  fs::remove_all(root);
  EXPECT_EQ(available_memory(root), 0);
  EXPECT_FALSE(memory_grows(root));
}

TEST_F(Memory, OfAVirtualMachineMayGrow) {
  EXPECT_FALSE(memory_grows(root));
  write("sys/bus/virtio/drivers/virtio_balloon/uevent", "");
  EXPECT_FALSE(memory_grows(root));
  write("sys/bus/virtio/drivers/virtio_balloon/virtio3", "");
  EXPECT_TRUE(memory_grows(root));
}

TEST(ThisHost, HasMemory) {
  EXPECT_GT(available_memory(), 1 << 20);
}

}  // namespace
}  // namespace mop::host
