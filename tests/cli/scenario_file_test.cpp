#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/cli/process.h"

namespace mop::test {
namespace {

using ::testing::HasSubstr;

constexpr const char* kScenario = R"(# a comment
model = "mixtral-8x7b"
cluster = "h200"
nodes = 2
context = "16K"
plan = "fsdp2:ep=8,cp=2"
routing = "zipf:1.2,seed=7"
clip = false
no-store = true
format = "json"
)";

TEST(ScenarioFile, HoldsAnyFlag) {
  const Folder folder;
  folder.write("s.toml", kScenario);
  const Ended ended = folder.mop({"simulate", "--config", "s.toml"});
  ASSERT_EQ(ended.status, 0) << ended.err;
  const nlohmann::json j = nlohmann::json::parse(ended.out);
  EXPECT_EQ(j.at("gpus"), 16);
  EXPECT_EQ(j.at("context"), 16384);
  EXPECT_EQ(j.at("routing"), "zipf:1.2,seed=7");
  EXPECT_EQ(j.at("plan").at("cp"), 2);
  EXPECT_EQ(j.at("plan").at("clip"), false);
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "results.db"));
}

TEST(ScenarioFile, FlagsWin) {
  const Folder folder;
  folder.write("s.toml", kScenario);
  const nlohmann::json j = nlohmann::json::parse(
      folder.mop({"simulate", "--config", "s.toml", "--context", "8K", "--clip", "on", "--cp", "1"}).out);
  EXPECT_EQ(j.at("context"), 8192);
  EXPECT_EQ(j.at("plan").at("clip"), true);
  EXPECT_EQ(j.at("plan").at("cp"), 1);
  EXPECT_EQ(j.at("nodes"), 2);
}

// A setting may stand in a plan and by itself: what was typed counts.
TEST(ScenarioFile, FlagsWinOverSettingsOfThePlan) {
  const Folder folder;
  const std::string rest = "model = \"mixtral-8x7b\"\nno-store = true\nformat = \"json\"\n";
  folder.write("plan.toml", rest + "plan = \"fsdp2:ep=8\"\n");
  folder.write("flag.toml", rest + "ep = 8\n");
  folder.write("both.toml", rest + "plan = \"fsdp2:ep=8\"\nep = 4\n");
  const auto ep = [&](const std::vector<std::string>& args) {
    const Ended ended = folder.mop(args);
    EXPECT_EQ(ended.status, 0) << ended.err;
    return nlohmann::json::parse(ended.out).at("plan").at("ep").get<int>();
  };
  EXPECT_EQ(ep({"simulate", "--config", "plan.toml", "--ep", "2"}), 2);
  EXPECT_EQ(ep({"simulate", "--config", "flag.toml", "--plan", "fsdp2:ep=2"}), 2);
  EXPECT_EQ(ep({"simulate", "--config", "flag.toml", "--plan", "fsdp2"}), 8);
  const Ended both = folder.mop({"simulate", "--config", "both.toml"});
  EXPECT_EQ(both.status, 2);
  EXPECT_THAT(both.err, HasSubstr("write it once"));
}

TEST(ScenarioFile, Lists) {
  const Folder folder;
  folder.write("s.toml",
               "model = \"mixtral-8x7b\"\ncontext = [\"8K\", \"16K\"]\nplan = [\"fsdp2:ep=8,cp=2\", "
               "\"fsdp2\"]\nno-store = true\nformat = \"json\"\n");
  EXPECT_EQ(nlohmann::json::parse(folder.mop({"compare", "--config", "s.toml"}).out).size(), 4u);
}

TEST(ScenarioFile, Errors) {
  const Folder folder;
  const auto error_of = [&](const std::string& text) {
    folder.write("s.toml", text);
    const Ended ended = folder.mop({"simulate", "--config", "s.toml", "--no-store"});
    EXPECT_EQ(ended.status, 2);
    EXPECT_TRUE(ended.err.starts_with("mop: error: scenario file 's.toml'")) << ended.err;
    EXPECT_EQ(std::count(ended.err.begin(), ended.err.end(), '\n'), 1) << ended.err;
    return ended.err;
  };
  EXPECT_THAT(error_of("contxt = 3\n"), HasSubstr("unknown key 'contxt'; did you mean 'context'?"));
  EXPECT_THAT(error_of("[workload]\ncontext = 3\n"), HasSubstr("section [workload]"));
  EXPECT_THAT(error_of("\x01\x02=\xff\n"), HasSubstr("unknown key"));
  EXPECT_THAT(folder.mop({"simulate", "--config", "none.toml"}).err, HasSubstr("no such file"));
}

}  // namespace
}  // namespace mop::test
