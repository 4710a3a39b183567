// A run is predicted for what it found its host's memory to give.
#include "sim/validate/host_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/validate/support.h"

namespace mop::validate {
namespace {

using ::testing::HasSubstr;

cluster::ClusterModel of(double each, double both, double adam, double dram) {
  cluster::ClusterModel c = cluster::read_cluster("h200x4");
  c.figures["pcie_both_bw"].value = each;
  c.figures["root_both_bw"].value = both;
  c.figures["host_adam_rate_alone"].value = adam;
  c.figures["native_dram_bw"].value = dram;
  return c;
}

TEST(HostMemory, GoesThroughJson) {
  const HostMemory found{4, {120e9, 140e9}, {180e9}};
  const std::optional<HostMemory> back = host_memory_of(to_json(found));
  ASSERT_TRUE(back);
  EXPECT_EQ(back->gpus, 4);
  EXPECT_EQ(back->both_ways, found.both_ways);
  EXPECT_EQ(back->adam, found.adam);
  EXPECT_FALSE(host_memory_of("{}"));
  EXPECT_FALSE(host_memory_of(to_json(HostMemory{4, {}, {}})));
}

TEST(HostMemory, IsComparedWithWhatLimitsAsManyGpus) {
  const cluster::ClusterModel c = of(100e9, 160e9, 6e9, 200e9);
  // Two GPUs: the host is the limit of copies, 160, and of AdamW, 200 of 2 x 28 x 6.
  EXPECT_DOUBLE_EQ(factors({2, {120e9, 136e9}, {}}, c).copies, 0.8);
  EXPECT_DOUBLE_EQ(factors({2, {120e9, 136e9}, {}}, c).dram, 0.8) << "copies tell of it";
  EXPECT_DOUBLE_EQ(factors({2, {160e9}, {150e9}}, c).dram, 0.75);
  // One: its own link, and one process.
  EXPECT_DOUBLE_EQ(factors({1, {90e9}, {}}, c).copies, 0.9);
  EXPECT_DOUBLE_EQ(factors({1, {90e9}, {}}, c).dram, 1) << "a link tells nothing of the memory";
  EXPECT_DOUBLE_EQ(factors({1, {}, {84e9}}, c).dram, 0.5);
  EXPECT_DOUBLE_EQ(factors({1, {}, {84e9}}, c).copies, 1);
}

TEST(HostMemory, ScalesWhatLimits) {
  const cluster::ClusterModel before = of(100e9, 160e9, 6e9, 200e9);
  const auto ratio = [&](const HostMemory& found, const char* figure) {
    cluster::ClusterModel c = before;
    apply(found, c);
    return c.figures.at(figure).value / before.figures.at(figure).value;
  };
  const HostMemory two{2, {128e9}, {100e9}}, one{1, {90e9}, {}};
  for (const char* figure : {"root_up_bw", "root_down_bw", "root_both_bw"})
    EXPECT_DOUBLE_EQ(ratio(two, figure), 0.8) << figure;
  EXPECT_DOUBLE_EQ(ratio(two, "pcie_both_bw"), 1);
  EXPECT_DOUBLE_EQ(ratio(two, "native_dram_bw"), 0.5);
  EXPECT_DOUBLE_EQ(ratio(two, "host_adam_rate_alone"), 0.5);
  EXPECT_DOUBLE_EQ(ratio(one, "pcie_up_bw"), 0.9);
  EXPECT_DOUBLE_EQ(ratio(one, "native_dram_bw"), 1);
  EXPECT_DOUBLE_EQ(ratio({2, {160e9}, {200e9}}, "root_both_bw"), 1);
}

TEST(HostMemory, SaysWhatWasFoundAndCalibrated) {
  const cluster::ClusterModel c = of(100e9, 160e9, 6e9, 200e9);
  EXPECT_EQ(describe({2, {120e9, 136e9}, {150e9}}, c),
            "copies both ways 128 GB/s, 160 when h200x4 was calibrated; AdamW on the CPU 150 GB/s, 200 when "
            "h200x4 was calibrated");
}

// Streamed states on a host of half the speed take longer, and it is said what was predicted before.
TEST(HostMemory, OfARunIsWhatItIsPredictedFor) {
  const predict::Scenario s = small_scenario(
      "mop:ep=2,dense-shard=2,ulysses=1,vp=1,vp-scheme=tokens,mla-exchange=expanded,checkpoints=hbm,"
      "optimizer=stream");
  store::RunRecord record = measured(s);
  const Comparison as_calibrated = compare(record, nullptr);
  const double both =
      std::min(2 * s.cluster.figures.at("pcie_both_bw").value, s.cluster.figures.at("root_both_bw").value);
  nlohmann::json detail = nlohmann::json::parse(record.detail);
  detail[kHostMemory] = nlohmann::json::parse(to_json(HostMemory{2, {both / 1000}, {}}));
  record.detail = detail.dump();
  const Comparison slow = compare(record, nullptr);
  EXPECT_GT(*slow.step_s, 1.5 * *as_calibrated.step_s);
  ASSERT_FALSE(slow.notes.empty());
  EXPECT_THAT(slow.notes[0], HasSubstr("for the host's memory as calibrated; above, for what the run found"));
}

}  // namespace
}  // namespace mop::validate
