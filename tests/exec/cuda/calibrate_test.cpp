// mop calibrate on GPUs: what it writes is a cluster with everything that it was asked to measure.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "tests/cli/process.h"
#include "tests/kernels/device_array.h"

namespace mop::cuda::testing {
namespace {

using nlohmann::json;

int gpus() {
  int count = 0;
  return kernels::no_gpu().empty() && cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

json calibrated(int n, const std::string& only) {
  const test::Folder folder;
  const test::Ended ended = folder.mop(
      {"calibrate", "--gpus", std::to_string(n), "--only", only, "--out", "mine.json", "--format", "json"});
  EXPECT_EQ(ended.status, 0) << ended.err;
  if (ended.status != 0) return {};
  EXPECT_EQ(json::parse(ended.out).at("gpus"), n);
  EXPECT_EQ(folder.mop({"show", "cluster", "--cluster", "./mine.json"}).status, 0);
  return json::parse(folder.read("mine.json"));
}

void expect_measured(const json& cluster, const std::vector<std::string>& figures,
                     const std::vector<std::string>& tables) {
  for (const std::string& name : figures) {
    ASSERT_TRUE(cluster.at("figures").contains(name)) << name;
    EXPECT_EQ(cluster["figures"][name].at("source"), "measured") << name;
    EXPECT_TRUE(cluster["figures"][name].contains("spread")) << name;
  }
  for (const std::string& name : tables) {
    ASSERT_TRUE(cluster.at("tables").contains(name)) << name;
    EXPECT_GE(cluster["tables"][name].at("points").size(), 1U) << name;
  }
}

TEST(CalibrateOnGpus, One) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  expect_measured(calibrated(1, "memory,launch,adam,copies,kernels"),
                  {"native_context_bytes", "native_library_bytes", "native_launch_ns", "native_kernel_ns",
                   "pcie_up_bw", "pcie_both_bw", "pcie_down_share", "root_down_share", "copy_latency_ns",
                   "adam_beside_copies", "copies_beside_adam"},
                  {"native_rms_norm", "native_unpermute", "native_adam_low", "native_cross_entropy_bwd",
                   "host_copies_up"});
}

TEST(CalibrateOnGpus, Two) {
  if (gpus() < 2) GTEST_SKIP() << fmt::format("2 GPUs are needed, {} are here", gpus());
  expect_measured(calibrated(2, "memory,collectives,copy-engines,interference,network"),
                  {"native_communicator_bytes", "native_communicator_p2p_bytes", "native_peer_memory_bytes",
                   "native_all_gather_matmul_slowdown", "copy_engine_all_gather_matmul_slowdown",
                   "copy_engine_all_gather_slowdown", "host_copies_memory_bound_slowdown"},
                  {"native_all_gather", "native_all_to_all", "copy_engine_all_gather",
                   "copy_engine_reduce_scatter", "emulated_network_all_gather"});
}

TEST(CalibrateOnGpus, TooFewAreSaid) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  const test::Folder folder;
  const int more = gpus() + 1;
  const test::Ended ended =
      folder.mop({"calibrate", "--gpus", std::to_string(more), "--only", "launch", "--out", "mine.json"});
  EXPECT_EQ(ended.status, 2);
  EXPECT_THAT(ended.err,
              ::testing::HasSubstr(fmt::format("--gpus is {}, and this host has {}", more, more - 1)));
}

}  // namespace
}  // namespace mop::cuda::testing
