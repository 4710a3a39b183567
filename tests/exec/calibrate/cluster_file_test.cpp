// What mop calibrate writes is a cluster: what was measured, and the base's rest with its own provenance.
#include "exec/calibrate/cluster_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/cluster/cluster.h"

namespace mop::calibrate {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

class ClusterFile : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("calibrate_test_" + std::to_string(getpid()) + "_" +
                                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    findings_.machine = "2 x NVIDIA H200 (139.8 GiB)";
    findings_.libraries = "driver 13.0, NCCL 2.28.9";
    findings_.figures["pcie_up_bw"] = {{5.25e10, 0.97, 1.02}, "pinned, up"};
    findings_.figures["native_communicator_p2p_bytes"] = {{0, 1, 1}, "a peer"};
    findings_.tables["native_matmul"] = {
        "products", {{{8192, 8192, 8192}, {7.5e14, 0.99, 1.01}}, {{512, 512, 512}, {1e13, 1, 1}}}};
    findings_.tables["copy_engine_all_gather"] = {"copies", {{{2, 1 << 30}, {3e11, 1, 1}}}};
    provenance_ = {"host1",
                   "6.1",
                   "a CPU, 64 cores",
                   "2026-11-27 04:00 UTC",
                   {"NCCL_NVLS_ENABLE=0"},
                   "mop calibrate --gpus 2",
                   2,
                   12.5};
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string text(const char* base) const {
    return cluster_file(cluster::cluster_file(base), findings_, provenance_);
  }

  fs::path folder_;
  Findings findings_;
  Provenance provenance_;
};

TEST_F(ClusterFile, HasWhatWasMeasuredAndTheRestOfTheBase) {
  const fs::path path = folder_ / "mine.json";
  write_cluster_file(path, text("h200x4"));
  const cluster::ClusterModel mine = cluster::read_cluster(path.string()),
                              base = cluster::read_cluster("h200x4");
  EXPECT_EQ(mine.name, "mine");
  EXPECT_EQ(mine["pcie_up_bw"], 5.25e10);
  const cluster::Figure& up = mine.figures.at("pcie_up_bw");
  EXPECT_EQ(up.source, cluster::Source::measured);
  for (const char* part :
       {"pinned, up", "mop calibrate", "2026-11-27 04:00 UTC", "2 x NVIDIA H200", "NCCL 2.28.9"})
    EXPECT_THAT(up.where, HasSubstr(part));
  ASSERT_TRUE(up.spread);
  EXPECT_EQ(up.spread->low, 0.97);
  EXPECT_EQ(up.spread->high, 1.02);
  EXPECT_EQ(mine["native_communicator_p2p_bytes"], 0);
  EXPECT_DOUBLE_EQ(mine.table("native_matmul").at({8192, 8192, 8192}).value, 7.5e14);
  ASSERT_EQ(mine.tables.at("native_matmul").spreads.size(), 2U);
  EXPECT_EQ(mine.tables.at("native_matmul").spreads[0].high, 1.01);
  EXPECT_DOUBLE_EQ(mine.table("copy_engine_all_gather").at({2, 1 << 30}).value, 3e11);
  for (const char* figure : cluster::kFigures)
    if (std::string(figure) != "pcie_up_bw") {
      EXPECT_EQ(mine[figure], base[figure]) << figure;
      EXPECT_EQ(mine.figures.at(figure).where, base.figures.at(figure).where) << figure;
      EXPECT_EQ(mine.figures.at(figure).source, base.figures.at(figure).source) << figure;
    }
  EXPECT_DOUBLE_EQ(mine.table("matmul").at({4096, 4096, 4096}).value,
                   base.table("matmul").at({4096, 4096, 4096}).value);
  EXPECT_EQ(mine.tables.at("torch_rope").where, base.tables.at("torch_rope").where);
}

TEST_F(ClusterFile, OfAVariantNeedsNoOtherFile) {
  const fs::path path = folder_ / "mine.json";
  write_cluster_file(path, text("h200-1tb"));
  const cluster::ClusterModel mine = cluster::read_cluster(path.string()),
                              base = cluster::read_cluster("h200-1tb");
  EXPECT_EQ(mine["host_bytes"], base["host_bytes"]);
  EXPECT_EQ(mine.gpus_per_node(), base.gpus_per_node());
  EXPECT_EQ(mine.figures.at("nic_bw").where, base.figures.at("nic_bw").where);
}

// Where power could not be measured, products are of a warm GPU, and nothing of the base's may say otherwise.
TEST_F(ClusterFile, ProductsAreOfOneClock) {
  const fs::path path = folder_ / "mine.json";
  ASSERT_TRUE(cluster::read_cluster("h200x4").figures.contains("largest_clock_hz"));
  write_cluster_file(path, text("h200x4"));
  const cluster::ClusterModel warm = cluster::read_cluster(path.string());
  EXPECT_FALSE(warm.figures.contains("largest_clock_hz"));
  EXPECT_TRUE(warm.tables.contains("native_matmul"));
  EXPECT_FALSE(warm.tables.contains("native_grouped_matmul"));
  EXPECT_TRUE(warm.tables.contains("native_rope"));
  findings_.figures["largest_clock_hz"] = {{1.9e9, 1, 1}, "largest"};
  write_cluster_file(path, text("h200x4"));
  const cluster::ClusterModel clocked = cluster::read_cluster(path.string());
  EXPECT_EQ(clocked["largest_clock_hz"], 1.9e9);
  EXPECT_TRUE(clocked.tables.contains("native_grouped_matmul"));
  findings_.tables.erase("native_matmul");
  findings_.figures.erase("largest_clock_hz");
  write_cluster_file(path, text("h200x4"));
  EXPECT_TRUE(cluster::read_cluster(path.string()).figures.contains("largest_clock_hz"));
}

TEST_F(ClusterFile, SaysWhereAndHow) {
  findings_.cut_short = {"attention"};
  const nlohmann::json json = nlohmann::json::parse(text("h200x4"));
  const auto& p = json.at("provenance");
  EXPECT_EQ(p.at("host"), "host1");
  EXPECT_EQ(p.at("cpu"), "a CPU, 64 cores");
  EXPECT_EQ(p.at("libraries"), "driver 13.0, NCCL 2.28.9");
  EXPECT_EQ(p.at("date"), "2026-11-27 04:00 UTC");
  EXPECT_EQ(p.at("command"), "mop calibrate --gpus 2");
  EXPECT_EQ(p.at("base"), "h200x4");
  EXPECT_EQ(p.at("environment").at(0), "NCCL_NVLS_ENABLE=0");
  EXPECT_EQ(p.at("cut_short").at(0), "attention");
  EXPECT_EQ(json.at("figures").at("pcie_up_bw").at("spread").at(1), 1.02);
}

TEST_F(ClusterFile, OfThisHostNamesIt) {
  const Provenance here = provenance_of_this_host();
  EXPECT_FALSE(here.host.empty());
  EXPECT_FALSE(here.kernel.empty());
  EXPECT_THAT(here.cpu, HasSubstr(" cores"));
  EXPECT_THAT(here.date, ::testing::MatchesRegex("20[0-9-]+ [0-9:]+ UTC"));
}

TEST_F(ClusterFile, AppearsWholeOrNotAtAll) {
  const fs::path path = folder_ / "mine.json";
  std::ofstream(path) << "before";
  findings_.figures["no_such_figure"] = {{1, 1, 1}, "x"};
  EXPECT_THROW(write_cluster_file(path, text("h200x4")), UserError);
  std::string content;
  std::getline(std::ifstream(path), content);
  EXPECT_EQ(content, "before");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1);
  EXPECT_THROW(write_cluster_file(folder_ / "none" / "mine.json", text("h200x4")), UserError);
}

}  // namespace
}  // namespace mop::calibrate
