// mop run as its users run it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <thread>

#include "sim/store/store.h"
#include "tests/cli/process.h"

namespace mop::test {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string text() {
  std::string all;
  for (int i = 0; i < 400; ++i)
    all += "the quick brown fox jumps over the lazy dog " + std::to_string(i % 10) + ".\n";
  return all;
}

struct Run : ::testing::Test {
  Run() { folder.write("text.txt", text()); }
  Ended run(std::vector<std::string> more) const { return folder.mop(args(std::move(more))); }
  static std::vector<std::string> args(std::vector<std::string> more) {
    std::vector<std::string> all{"run", "--model", "tiny-qwen3-moe", "--data", "text.txt", "--context", "64"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  static std::vector<json> lines(const std::string& out) {
    std::vector<json> all;
    std::istringstream stream(out);
    for (std::string line; std::getline(stream, line);) all.push_back(json::parse(line));
    return all;
  }
  Folder folder;
};

TEST_F(Run, TrainsAndKeepsTheMeasurementBesideThePrediction) {
  const Ended ended = run({"--plan", "mop", "--ranks", "4", "--steps", "3", "--trace", "t.trace.json"});
  ASSERT_EQ(ended.status, 0) << ended.err;
  for (const char* part : {"step     1  loss", "step     3  loss", "grad norm", "tokens/s", "exposed"})
    EXPECT_THAT(ended.out, HasSubstr(part));
  const json trace = json::parse(folder.read("t.trace.json"));
  EXPECT_GT(trace.at("traceEvents").size(), 100U);
  const store::Store store((folder.path() / "results.db").string(), store::Access::kRead);
  const std::vector<store::RunRecord> records = store.query();
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[0].kind, store::kPrediction);
  EXPECT_EQ(records[1].kind, store::kMeasurement);
  EXPECT_EQ(records[0].scenario, records[1].scenario);
  EXPECT_EQ(records[0].plan, records[1].plan);
  EXPECT_EQ(records[0].tokens_per_step, records[1].tokens_per_step);
  EXPECT_THAT(records[1].machine, HasSubstr("CPU backend, 4 ranks"));
  EXPECT_GT(*records[1].step_time_s, 0);
}

TEST_F(Run, LossFallsAndJsonHasALineAStep) {
  const Ended ended = run({"--plan", "fsdp2", "--ranks", "2", "--steps", "40", "--lr", "5e-3", "--format",
                           "json", "--precision", "fp32"});
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("runtime=native"));
  const std::vector<json> steps = lines(ended.out);
  ASSERT_EQ(steps.size(), 40U);
  EXPECT_NEAR(steps[0].at("loss").get<double>(), std::log(256.0), 0.3);
  EXPECT_LT(steps[39].at("loss").get<double>(), 2.0);
  for (const char* key :
       {"gradient_norm", "learning_rate", "tokens_per_s", "hbm_bytes", "exposed_communication_s"})
    EXPECT_TRUE(steps[7].at(key).is_number()) << key;
}

TEST_F(Run, DryRunShowsMemoryAndRunsNothing) {
  const Ended ended =
      folder.mop({"run", "--model", "tiny-qwen3-moe", "--ranks", "4", "--dry-run", "--no-store"});
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_THAT(ended.out, HasSubstr("CPU backend:"));
  EXPECT_THAT(ended.out, HasSubstr("critical path"));
  EXPECT_THAT(ended.out, ::testing::Not(HasSubstr("loss")));
}

TEST_F(Run, ResumesFromItsCheckpoints) {
  const std::vector<std::string> common{"--ranks",    "2",       "--plan", "mop",    "--format", "json",
                                        "--no-store", "--steps", "6",      "--save", "ckpt"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), common.begin(), common.end());
    return more;
  };
  const Ended whole = run(with({"--save-every", "3", "--keep", "5"}));
  ASSERT_EQ(whole.status, 0) << whole.err;
  std::filesystem::remove_all(folder.path() / "ckpt" / "step-000006");
  const Ended rest = run(with({"--resume"}));
  ASSERT_EQ(rest.status, 0) << rest.err;
  EXPECT_THAT(rest.err, HasSubstr("resumed from ckpt/step-000003"));
  const std::vector<json> all = lines(whole.out), tail = lines(rest.out);
  ASSERT_EQ(tail.size(), 3U);
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(tail[i].at("loss"), all[3 + i].at("loss"));
  EXPECT_THAT(run(with({"--resume"})).err, HasSubstr("nothing is left to do"));
}

TEST_F(Run, InterruptFinishesTheStepAndSaves) {
  Process process(args({"--ranks", "2", "--steps", "100000", "--save", "ckpt", "--no-store"}), folder.path());
  std::this_thread::sleep_for(std::chrono::seconds(3));
  process.interrupt();
  const Ended ended = process.wait();
  EXPECT_EQ(ended.status, 130) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("interrupted after step"));
  EXPECT_THAT(ended.err, HasSubstr("--resume"));
  EXPECT_FALSE(std::filesystem::is_empty(folder.path() / "ckpt"));
}

// Killed at random instants, it always has something to go on from once a first checkpoint was written.
TEST_F(Run, KilledAtAnyInstantItResumes) {
  const std::vector<std::string> common = args(
      {"--ranks", "2", "--steps", "100000", "--save", "ckpt", "--save-every", "1", "--resume", "--no-store"});
  ASSERT_EQ(run({"--ranks", "2", "--steps", "1", "--save", "ckpt", "--no-store"}).status, 0);
  std::mt19937 random(5);
  for (int i = 0; i < 12; ++i) {
    std::string command = "cd '" + folder.path().string() + "' && timeout -s KILL " +
                          std::to_string(0.2 + static_cast<double>(random() % 1500) / 1000) + " " +
                          MOP_BINARY;
    for (const std::string& arg : common) command += " '" + arg + "'";
    command += " >out.txt 2>err.txt";
    const int status = std::system(command.c_str());
    EXPECT_EQ(WEXITSTATUS(status), 137) << folder.read("err.txt");
  }
  const Ended ended = run({"--ranks", "4", "--plan", "fsdp2", "--steps", "100000", "--save", "ckpt",
                           "--resume", "--dry-run", "--no-store"});
  EXPECT_EQ(ended.status, 0);
  size_t complete = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path() / "ckpt"))
    complete += entry.path().filename().string().find(".tmp-") == std::string::npos ? 1 : 0;
  EXPECT_GE(complete, 1U);
}

TEST_F(Run, ExportsWhatItReadsAgain) {
  ASSERT_EQ(
      run({"--steps", "2", "--export", "hf", "--export-type", "f32", "--no-store", "--precision", "fp32"})
          .status,
      0);
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "hf" / "config.json"));
  const Ended again =
      run({"--steps", "1", "--weights", "hf", "--no-store", "--precision", "fp32", "--ranks", "2"});
  EXPECT_EQ(again.status, 0) << again.err;
}

TEST_F(Run, SaysWhatIsWrong) {
  struct Wrong {
    std::vector<std::string> args;
    std::string part;
  };
  folder.write("empty.txt", "");
  folder.write("short.txt", "too short");
  for (const Wrong& wrong : std::vector<Wrong>{
           {{"run", "--model", "tiny-qwen3-moe"}, "no data is given"},
           {{"run", "--model", "tiny-qwen3-moe", "--data", "nowhere.txt"}, "nowhere.txt"},
           {{"run", "--model", "tiny-qwen3-moe", "--data", "empty.txt"}, "empty.txt"},
           {{"run", "--model", "tiny-qwen3-moe", "--data", "short.txt"}, "short.txt"},
           {args({"--ranks", "0"}), "--ranks is 0"},
           {args({"--ranks", "3", "--plan", "mop:ep=2"}), "ep"},
           {args({"--nodes", "2"}), "--ranks"},
           {args({"--lr", "fast"}), "--lr is 'fast'"},
           {args({"--lr", "-1"}), "rate"},
           {args({"--steps", "0"}), "--steps is 0"},
           {args({"--resume"}), "--save"},
           {args({"--save-every", "2"}), "--save DIR"},
           {args({"--save", "ckpt", "--resume"}), "no complete checkpoint"},
           {args({"--weights", "nowhere"}), "nowhere"},
           {args({"--save", "text.txt"}), "text.txt"},
           {args({"--plan", "fsdp2:tp=8", "--ranks", "8"}), "attention heads"},
           {args({"--order", "sorted"}), "--order is 'sorted'"},
           {args({"--export", "text.txt"}), "text.txt exists already"},
           {args({"--trace", "/nonexistent/t.json"}), "'/nonexistent/t.json' cannot be written"},
           {{"run", "--model", "kimi-k2", "--data", "text.txt", "--ranks", "2"},
            "memory for 2 ranks of the CPU backend needs"}}) {
    std::vector<std::string> all = wrong.args;
    all.push_back("--no-store");
    const Ended ended = folder.mop(all);
    EXPECT_EQ(ended.status, 2) << ended.err;
    EXPECT_THAT(ended.err, HasSubstr(wrong.part));
    EXPECT_THAT(ended.out, ::testing::Not(HasSubstr("step "))) << "before the first step";
  }
}

// What fails at the very end takes no measurement along.
TEST_F(Run, AFailedExportLeavesTheMeasurement) {
  Process process(args({"--steps", "100", "--export", "hf", "--db", "runs.db"}), folder.path());
  while (!std::filesystem::exists(folder.path() / "runs.db"))  // opened behind all that is checked before
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  folder.write("hf", "somebody else's");
  const Ended ended = process.wait();
  EXPECT_EQ(ended.status, 2) << ended.err;
  const store::Store store((folder.path() / "runs.db").string(), store::Access::kRead);
  EXPECT_EQ(store.query({.where = {"kind=measurement"}}).size(), 1U);
}

TEST_F(Run, AFullDiskDuringACheckpointLeavesTheOldOnes) {
  ASSERT_EQ(run({"--steps", "1", "--save", "ckpt", "--no-store"}).status, 0);
  const Ended ended =
      Process(args({"--steps", "3", "--save", "ckpt", "--resume", "--no-store"}), folder.path(), 100000)
          .wait();
  EXPECT_EQ(ended.status, 2) << ended.err;
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "ckpt" / "step-000001" / "manifest.json"));
  EXPECT_EQ(run({"--steps", "3", "--save", "ckpt", "--resume", "--no-store"}).status, 0);
}

}  // namespace
}  // namespace mop::test
