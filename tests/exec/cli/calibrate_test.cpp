// mop calibrate as its users start it, as far as that goes without a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
}

}  // namespace
}  // namespace mop::test
