// mop calibrate as its users start it, as far as that goes without a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/cli/process.h"

namespace mop::test {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

void expect_refusal(const std::vector<std::string>& more, const std::string& part) {
  const Folder folder;
  std::vector<std::string> words{"calibrate"};
  words.insert(words.end(), more.begin(), more.end());
  const Ended ended = folder.mop(words);
  EXPECT_EQ(ended.status, 2) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr(part));
  EXPECT_EQ(ended.out, "");
  EXPECT_EQ(std::count(ended.err.begin(), ended.err.end(), '\n'), 1) << ended.err;
}

TEST(Calibrate, HelpHasAnExampleAndEveryFamily) {
  const Folder folder;
  const Ended ended = folder.mop({"calibrate", "--help"});
  EXPECT_EQ(ended.status, 0);
  for (const char* part : {"Example:\n  mop calibrate", "--gpus N", "--base NAME|FILE", "--out FILE",
                           "--only NAME,...", "matmul", "copy-engines", "interference", "network"})
    EXPECT_THAT(ended.out, HasSubstr(part));
  EXPECT_THAT(ended.out, Not(HasSubstr("--found")));
}

TEST(Calibrate, SaysWhatIsWrong) {
  expect_refusal({"--out", "a.json"}, "no GPUs are given; write --gpus N");
  expect_refusal({"--out", "a.json", "--gpus", "-1"}, "--gpus is -1; at least one is needed");
  expect_refusal({"--out", "a.json", "--gpus", "two"}, "--gpus");
  expect_refusal({"--gpus", "1"}, "no file is given; write --out FILE");
  expect_refusal({"--gpus", "1", "--out", "a.txt"}, "names of cluster files end in .json");
  expect_refusal({"--gpus", "1", "--out", "none/a.json"}, "in a folder that is not there");
  expect_refusal({"--gpus", "1", "--out", "a.json", "--only", "matmul,atention"},
                 "did you mean 'attention'?");
  expect_refusal({"--gpus", "1", "--out", "a.json", "--only", "network"}, "two emulated hosts need two GPUs");
  expect_refusal({"--gpus", "1", "--out", "a.json", "--base", "h200x44"}, "did you mean 'h200x4'?");
  expect_refusal({"--gpus", "1", "--out", "a.json", "--format", "xml"}, "write table or json");
  expect_refusal({"--gpus", "1", "--out", "a.json", "--gpu", "2"}, "unknown flag '--gpu'");
  expect_refusal({"--from", "kept", "--out", "a.json", "--gpus", "1"}, "leave out --gpus and --only");
  expect_refusal({"--from", "kept", "--out", "a.json", "--only", "matmul"}, "leave out --gpus and --only");
  expect_refusal({"--from", "kept", "--out", "a.json"}, "nothing that a calibration measured is there");
}

// As a calibration leaves it whose file could not be written. The mean of pcie_up_bw lies beside its pieces.
TEST(Calibrate, WritesWhatAnEarlierOneKept) {
  const Folder folder;
  std::filesystem::create_directory(folder.path() / "kept");
  folder.write("kept/host.json", R"({"machine": "2 x GPU", "libraries": "driver 13.0", "cut_short": [],
      "unsupported": [], "tables": {}, "seconds": {"copies": 9.5},
      "figures": {"pcie_up_bw": {"what": "up", "reading": [5.5e10, 1.0002, 1.0004]}}})");
  const std::vector<std::string> words{"calibrate", "--from", "kept",     "--out", "mine.json",
                                       "--base",    "h200x2", "--format", "json"};
  Ended ended = folder.mop(words);
  EXPECT_EQ(ended.status, 2);
  EXPECT_THAT(ended.err, HasSubstr("provenance.json is not there"));
  folder.write("kept/provenance.json", R"({"host": "one", "cpu": "a CPU", "kernel": "6.1",
      "date": "2026-11-28 20:29 UTC", "command": "mop calibrate --gpus 2", "gpus": 2, "seconds": 12.5,
      "environment": ["NCCL_NVLS_ENABLE=0"]})");
  ended = folder.mop(words);
  ASSERT_EQ(ended.status, 0) << ended.err;
  const nlohmann::json said = nlohmann::json::parse(ended.out),
                       file = nlohmann::json::parse(folder.read("mine.json"));
  EXPECT_EQ(said["gpus"], 2);
  EXPECT_EQ(said["date"], "2026-11-28 20:29 UTC");
  EXPECT_EQ(file["provenance"]["command"], "mop calibrate --gpus 2");
  EXPECT_EQ(file["provenance"]["host"], "one");
  EXPECT_EQ(file["provenance"]["machine"], "2 x GPU");
  const nlohmann::json& up = file["figures"]["pcie_up_bw"];
  EXPECT_EQ(up["value"], 5.5e10);
  EXPECT_EQ(up["spread"][0], 1.0);
  EXPECT_EQ(up["spread"][1], 1.0004);

  folder.write("kept/provenance.json", "{}");
  ended = folder.mop(words);
  EXPECT_EQ(ended.status, 2);
  EXPECT_THAT(ended.err, HasSubstr("provenance.json is not what a calibration kept"));
}

}  // namespace
}  // namespace mop::test
