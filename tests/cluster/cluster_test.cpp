#include "sim/cluster/cluster.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "sim/base/error.h"
#include "sim/base/paths.h"

namespace mop::cluster {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

Json shipped(const std::string& name) {
  std::ifstream file(data_home() / "hwmodels" / (name + ".json"));
  return Json::parse(file);
}

class ClusterFile : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("cluster_test_" + std::to_string(getpid()) + "_" +
                                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) {
    const fs::path path = folder_ / name;
    std::ofstream(path) << text;
    return path.string();
  }
  std::string write(const std::string& name, const Json& json) { return write(name, json.dump()); }

  static std::string error_of(const std::string& where) {
    try {
      read_cluster(where);
    } catch (const UserError& error) {
      const std::string message = error.what();
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      return message;
    }
    ADD_FAILURE() << "no UserError";
    return "";
  }
  static void expect_error(const std::string& where, const std::string& part) {
    const std::string message = error_of(where);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }

  fs::path folder_;
};

TEST(Clusters, EveryShippedOneLoadsWithProvenance) {
  const std::vector<std::string> names = shipped_clusters();
  for (const char* name : {"h200", "h200x4", "h200-efa", "h200-half-network", "h200-1tb"})
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  for (const std::string& name : names) {
    SCOPED_TRACE(name);
    const ClusterModel cluster = read_cluster(name);
    EXPECT_EQ(cluster.name, name);
    EXPECT_FALSE(cluster.description.empty());
    for (const char* figure : kFigures) {
      EXPECT_TRUE(std::isfinite(cluster[figure])) << figure;
      EXPECT_GE(cluster.figures.at(figure).where.size(), 8u) << figure << " does not say where it is from";
    }
    EXPECT_GE(cluster.figures.size(), kFigures.size());
    for (const auto& [table, info] : cluster.tables) {
      EXPECT_FALSE(info.table.empty()) << table;
      EXPECT_GE(info.where.size(), 8u) << table;
    }
    EXPECT_GT(cluster.gpus_per_node(), 0);
  }
}

// What does not depend on the calibration: units right, peaks above what is reached.
TEST(Clusters, FiguresAreOfTheRightMagnitude) {
  for (const std::string& name : shipped_clusters()) {
    SCOPED_TRACE(name);
    const ClusterModel c = read_cluster(name);
    EXPECT_EQ(c["peak_flops"], 989e12);
    EXPECT_NEAR(c["hbm_bytes"], 141e9, 12e9);
    EXPECT_NEAR(c["nvlink_bw"], 18 * 26.56e9, 1e6);
    EXPECT_LE(c["pcie_up_bw"], c["pcie_peak_bw"]);
    EXPECT_LE(c["pcie_down_bw"], c["pcie_peak_bw"]);
    EXPECT_LE(c["pcie_both_bw"], 2 * c["pcie_peak_bw"]);
    EXPECT_LE(c["nic_bw"], c["nic_peak_bw"]);
    EXPECT_LE(c["root_up_bw"], c["dram_bw"]);
    const double gpus = c["gpus_per_node"];
    EXPECT_LE(c["root_both_bw"], gpus * c["pcie_both_bw"]);
    // Memory that is read and written by turns may move less than what is read alone.
    EXPECT_GE(c["root_both_bw"], 0.8 * std::max(c["root_up_bw"], c["root_down_bw"]));
    EXPECT_LE(c.table("memory_bound").at({1e15}).value, c["hbm_peak_bw"]);
    for (const char* slowdown :
         {"all_gather_matmul_slowdown", "all_gather_slowdown", "reduce_scatter_matmul_slowdown",
          "reduce_scatter_slowdown", "all_to_all_matmul_slowdown", "all_to_all_slowdown"}) {
      EXPECT_GE(c[slowdown], 1) << slowdown;
      EXPECT_LE(c[slowdown], 3) << slowdown;
    }
  }
}

// No measured rate beyond what the hardware can do.
TEST(Clusters, TablesStayBelowThePeaks) {
  const Json tables = shipped("h200x4")["tables"];
  const ClusterModel c = read_cluster("h200x4");
  for (const char* name : {"matmul", "grouped_matmul", "attention_forward", "attention_backward"})
    for (const auto& point : tables[name]["points"]) {
      EXPECT_LT(point.back().get<double>(), c["peak_flops"]) << name << " " << point;
      EXPECT_GT(point.back().get<double>(), 1e9) << name << " " << point;
    }
  for (const char* name : {"all_gather", "reduce_scatter", "all_to_all"})
    for (const auto& point : tables[name]["points"])
      EXPECT_LT(point.back().get<double>(), c["nvlink_bw"]) << name << " " << point;
  for (const auto& point : tables["memory_bound"]["points"])
    EXPECT_LT(point.back().get<double>(), c["hbm_peak_bw"]) << point;
}

TEST(Clusters, MeasuredSeedsAgreeWithTheNotes) {
  const ClusterModel c = read_cluster("h200x4");
  EXPECT_EQ(c.gpus_per_node(), 4);
  EXPECT_NEAR(c["pcie_up_bw"], 55.1e9, 0.1 * 55.1e9);
  EXPECT_NEAR(c["pcie_down_bw"], 54.9e9, 0.1 * 54.9e9);
  // Hosts of the same kind differ: 113 to 184 GB/s both ways were seen.
  EXPECT_NEAR(c["root_up_bw"], 173e9, 0.4 * 173e9);
  EXPECT_NEAR(c["root_down_bw"], 133e9, 0.4 * 133e9);
  EXPECT_NEAR(c["root_both_bw"], 184e9, 0.4 * 184e9);
  EXPECT_NEAR(c["dram_bw"], 217e9, 3e9);
  EXPECT_NEAR(c.table("matmul").at({8192, 8192, 8192}).value, 772e12, 0.12 * 772e12);
  EXPECT_NEAR(c.table("all_gather").at({4, double(int64_t{1} << 30)}).value, 320e9, 0.10 * 320e9);
}

TEST(Clusters, VariantsDifferOnlyAsTheirFilesSay) {
  for (const std::string& name : shipped_clusters()) {
    const Json json = shipped(name);
    if (!json.contains("base")) continue;
    SCOPED_TRACE(name);
    const ClusterModel variant = read_cluster(name), base = read_cluster(json["base"].get<std::string>());
    std::set<std::string> stated;
    if (json.contains("figures"))
      for (const auto& [key, entry] : json["figures"].items()) stated.insert(key);
    EXPECT_FALSE(stated.empty());
    bool differs = false;
    for (const char* figure : kFigures) {
      if (stated.contains(figure)) {
        EXPECT_EQ(variant[figure], json["figures"][figure]["value"].get<double>());
        differs |= variant[figure] != base[figure];
      } else {
        EXPECT_EQ(variant[figure], base[figure]) << figure;
        EXPECT_EQ(variant.figures.at(figure).where, base.figures.at(figure).where);
      }
    }
    EXPECT_TRUE(differs);
    EXPECT_NE(variant.description, base.description);
    if (json.contains("tables")) continue;
    for (const double k : {512.0, 4096.0}) {
      EXPECT_EQ(variant.table("matmul").at({4096, 4096, k}).value,
                base.table("matmul").at({4096, 4096, k}).value);
    }
  }
  EXPECT_EQ(2 * read_cluster("h200-half-network")["nic_bw"], read_cluster("h200")["nic_bw"]);
  EXPECT_EQ(2 * read_cluster("h200-1tb")["host_bytes"], read_cluster("h200")["host_bytes"]);
  EXPECT_LT(read_cluster("h200-efa")["nic_bw"], read_cluster("h200")["nic_bw"]);
}

TEST(Clusters, UnknownNameSuggests) {
  try {
    read_cluster("h200x44");
    FAIL();
  } catch (const UserError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("unknown cluster 'h200x44'; did you mean 'h200x4'?"), std::string::npos)
        << message;
    EXPECT_NE(message.find("h200-efa"), std::string::npos) << message;
  }
}

TEST(Clusters, AskingForWhatIsNotThereIsInternal) {
  const ClusterModel cluster = read_cluster("h200");
  EXPECT_THROW(cluster["speed"], InternalError);
  EXPECT_THROW(cluster.table("speed"), InternalError);
}

TEST_F(ClusterFile, OfTheUserLoadsByPath) {
  Json json = shipped("h200x4");
  json["figures"]["nic_bw"]["value"] = 12345678.0;
  const ClusterModel cluster = read_cluster(write("mine.json", json));
  EXPECT_EQ(cluster.name, "mine");
  EXPECT_EQ(cluster["nic_bw"], 12345678.0);
}

TEST_F(ClusterFile, BaseIsBesideTheFile) {
  write("lab.json", shipped("h200x4"));
  const std::string path =
      write("lab-slow.json",
            Json{{"base", "lab"},
                 {"description", "slow"},
                 {"figures", {{"nic_bw", {{"value", 1e9}, {"source", "assumed"}, {"where", "a guess"}}}}}});
  const ClusterModel cluster = read_cluster(path);
  EXPECT_EQ(cluster["nic_bw"], 1e9);
  EXPECT_EQ(cluster.figures.at("nic_bw").source, Source::assumed);
  EXPECT_EQ(cluster["peak_flops"], 989e12);
  EXPECT_EQ(cluster.description, "slow");
}

TEST_F(ClusterFile, MissingFilesAreNamed) {
  expect_error((folder_ / "none.json").string(),
               "cannot read cluster file " + (folder_ / "none.json").string());
  expect_error(write("a.json", Json{{"base", "gone"}}), "gone.json");
}

TEST_F(ClusterFile, NotJson) {
  for (const char* text : {"", "{", "[]", "3", "null", "{\"figures\": }", "\xff\xfe"})
    expect_error(write("a.json", std::string(text)), "a.json is not a JSON object");
}

TEST_F(ClusterFile, BaseThatGoesInACircle) {
  expect_error(write("a.json", Json{{"base", "a"}}), "'base' goes round in a circle");
  write("c.json", Json{{"base", "b"}});
  expect_error(write("b.json", Json{{"base", "c"}}), "'base' goes round in a circle");
  expect_error(write("d.json", Json{{"base", 3}}), "'base' is not a text");
}

TEST_F(ClusterFile, EveryFigureAndTableIsNeeded) {
  const Json json = shipped("h200x4");
  for (const char* figure : kFigures) {
    Json without = json;
    without["figures"].erase(figure);
    expect_error(write("a.json", without), std::string("figure ") + figure + " is missing");
  }
  for (const auto& [table, entry] : json["tables"].items()) {
    if (std::ranges::find(optional_tables(), table) != optional_tables().end()) continue;
    Json without = json;
    without["tables"].erase(table);
    expect_error(write("a.json", without), "table " + table + " is missing");
  }
}

TEST_F(ClusterFile, UnknownFigureAndTableSuggest) {
  Json json = shipped("h200x4");
  json["figures"]["nic_bv"] = json["figures"]["nic_bw"];
  expect_error(write("a.json", json), "unknown figure 'nic_bv'; did you mean 'nic_bw'?");
  json = shipped("h200x4");
  json["tables"]["matmull"] = json["tables"]["matmul"];
  expect_error(write("a.json", json), "unknown table 'matmull'; did you mean 'matmul'?");
}

Json with_native() {
  Json json = shipped("h200x4");
  json["figures"]["native_context_bytes"] = {
      {"value", 6e8}, {"source", "measured"}, {"where", "here"}, {"spread", {0.9, 1.25}}};
  json["tables"]["native_rms_norm"] = {{"source", "measured"},
                                       {"where", "here"},
                                       {"points", {{1e6, 1e12}, {1e9, 3e12}}},
                                       {"spread", {{0.99, 1.01}, {1, 1}}}};
  return json;
}

TEST_F(ClusterFile, MayHaveWhatOnlyCalibrationMeasures) {
  const ClusterModel with = read_cluster(write("a.json", with_native())), without = read_cluster("h200x4");
  EXPECT_EQ(with.native("context_bytes"), 6e8);
  EXPECT_EQ(with["context_bytes"], without["context_bytes"]);
  EXPECT_EQ(with.native("library_bytes"), with.figures.contains("native_library_bytes")
                                              ? with["native_library_bytes"]
                                              : with["library_bytes"]);
  ASSERT_TRUE(with.figures.at("native_context_bytes").spread);
  EXPECT_EQ(with.figures.at("native_context_bytes").spread->high, 1.25);
  EXPECT_DOUBLE_EQ(with.table("native_rms_norm").at({1e9}).value, 3e12);
  ASSERT_EQ(with.tables.at("native_rms_norm").spreads.size(), 2U);
  EXPECT_EQ(with.tables.at("native_rms_norm").spreads[0].low, 0.99);
  EXPECT_FALSE(with.figures.at("peak_flops").spread);
}

TEST_F(ClusterFile, AVariantsFigureStandsForTheBasesNativeOne) {
  const Json other = {{"value", 7e8}, {"source", "assumed"}, {"where", "here"}};
  Json json = with_native();
  json["figures"]["native_library_bytes"] = other;
  write("lab.json", json);
  const ClusterModel variant =
      read_cluster(write("variant.json", Json{{"base", "lab"}, {"figures", {{"context_bytes", other}}}}));
  EXPECT_EQ(variant.native("context_bytes"), 7e8);
  EXPECT_EQ(variant.native("library_bytes"), 7e8);
  EXPECT_TRUE(variant.tables.contains("native_rms_norm"));
}

TEST_F(ClusterFile, OptionalNamesAreCheckedToo) {
  Json json = with_native();
  json["figures"]["native_contex_bytes"] = json["figures"]["native_context_bytes"];
  expect_error(write("a.json", json),
               "unknown figure 'native_contex_bytes'; did you mean 'native_context_bytes'?");
  json = with_native();
  json["tables"]["native_rms_norms"] = json["tables"]["native_rms_norm"];
  expect_error(write("a.json", json), "unknown table 'native_rms_norms'; did you mean 'native_rms_norm'?");
  json = with_native();
  json["tables"]["native_rms_norm"]["points"] = {{1e6, 1e6, 1e12}};
  expect_error(write("a.json", json), "table native_rms_norm: a point has 3 numbers, not 2");
  EXPECT_EQ(error_of(write("a.json", json)).find("calibrate"), std::string::npos);
  json["tables"]["native_rms_norm"]["where"] = "kernels/, rms_norm; mop calibrate, 2026-11-27 20:53 UTC";
  expect_error(write("a.json", json),
               "not 2; a mop calibrate of another version wrote it: run mop calibrate again");
  json = with_native();
  json["figures"]["native_all_gather_matmul_slowdown"] = {
      {"value", 0}, {"source", "measured"}, {"where", "here"}};
  expect_error(write("a.json", json), "figure native_all_gather_matmul_slowdown must be above zero");
  json["figures"]["native_all_gather_matmul_slowdown"]["value"] = 1.2;
  json["figures"]["native_peer_memory_bytes"] = {{"value", 0}, {"source", "measured"}, {"where", "here"}};
  EXPECT_EQ(read_cluster(write("a.json", json))["native_peer_memory_bytes"], 0);
}

TEST_F(ClusterFile, UnusableSpreads) {
  const std::string form = "a spread is the smallest and the largest over the value";
  for (const Json& spread :
       {Json(1), Json{1}, Json{1.1, 0.9}, Json{1.1, 1.2}, Json{-0.5, 1}, Json{"low", "high"}}) {
    Json json = with_native();
    json["figures"]["native_context_bytes"]["spread"] = spread;
    expect_error(write("a.json", json), "figure native_context_bytes: " + form);
    json = with_native();
    json["tables"]["native_rms_norm"]["spread"][1] = spread;
    expect_error(write("a.json", json), "table native_rms_norm: " + form);
  }
  Json json = with_native();
  json["tables"]["native_rms_norm"]["spread"] = {{1, 1}};
  expect_error(write("a.json", json), "table native_rms_norm: spread has one entry a point");
}

TEST_F(ClusterFile, UnusableFigures) {
  const Json json = shipped("h200x4");
  const auto with = [&](const Json& entry) {
    Json changed = json;
    changed["figures"]["nic_bw"] = entry;
    return write("a.json", changed);
  };
  const std::string form = "figure nic_bw needs value (a number), source and where (texts)";
  expect_error(with(3), form);
  expect_error(with({{"source", "measured"}, {"where", "here"}}), form);
  expect_error(with({{"value", "fast"}, {"source", "measured"}, {"where", "here"}}), form);
  expect_error(with({{"value", nullptr}, {"source", "measured"}, {"where", "here"}}),
               form);  // what NaN is written as
  expect_error(with({{"value", 1}, {"where", "here"}}), form);
  expect_error(with({{"value", 1}, {"source", "measured"}}), form);
  expect_error(with({{"value", -1}, {"source", "measured"}, {"where", "here"}}),
               "figure nic_bw is -1: not a usable number");
  expect_error(with({{"value", 1}, {"source", "guessed"}, {"where", "here"}}),
               "source 'guessed' is none of measured, published, assumed");
  std::string huge = json.dump();
  const size_t at = huge.find("\"peak_flops\"");
  const size_t value = huge.find("989", at);
  ASSERT_NE(value, std::string::npos);
  huge.replace(value, 3, "1e999;");
  expect_error(write("a.json", huge), "a.json is not a JSON object");
}

TEST_F(ClusterFile, FiguresThatMustBeAboveZero) {
  for (const char* figure :
       {"gpus_per_node", "peak_flops", "hbm_bytes", "hbm_peak_bw", "nvlink_bw", "dram_bw", "host_bytes"}) {
    Json json = shipped("h200x4");
    json["figures"][figure]["value"] = 0;
    expect_error(write("a.json", json), std::string("figure ") + figure + " must be above zero");
  }
}

TEST_F(ClusterFile, UnusableTables) {
  const Json json = shipped("h200x4");
  const auto with = [&](const Json& points) {
    Json changed = json;
    changed["tables"]["matmul"]["points"] = points;
    return write("a.json", changed);
  };
  expect_error(with(Json::array()), "table matmul has no points");
  expect_error(with({{1, 2, 3}}), "table matmul: a point has 3 numbers, not 4");
  expect_error(with({{1, 2, 3, -4}}), "table matmul: -4 is not a positive number");
  expect_error(with({{1, 2, 3, "four"}}),
               "table matmul needs points (rows of numbers), source and where (texts)");
  expect_error(with("none"), "table matmul needs points (rows of numbers), source and where (texts)");
  Json changed = json;
  changed["tables"]["matmul"].erase("where");
  expect_error(write("a.json", changed),
               "table matmul needs points (rows of numbers), source and where (texts)");
}

}  // namespace
}  // namespace mop::cluster
