#include "sim/base/suggest.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <vector>

#include "sim/base/paths.h"

namespace mop {
namespace {

const std::vector<std::string> kNames{"deepseek-v3", "kimi-k2", "mixtral-8x7b", "qwen3-30b-a3b"};

TEST(UnknownName, SuggestsTheNearest) {
  EXPECT_EQ(unknown_name("model", "kimi-k3", kNames),
            "unknown model 'kimi-k3'; did you mean 'kimi-k2'?; known: deepseek-v3, kimi-k2, mixtral-8x7b, "
            "qwen3-30b-a3b");
  EXPECT_NE(unknown_name("model", "deepsek-v3", kNames).find("did you mean 'deepseek-v3'?"),
            std::string::npos);
  EXPECT_NE(unknown_name("model", "qwen3-30b", kNames).find("did you mean 'qwen3-30b-a3b'?"),
            std::string::npos);
}

TEST(UnknownName, SuggestsNothingThatIsFarOff) {
  EXPECT_EQ(unknown_name("model", "zzzzzzzzzz", kNames),
            "unknown model 'zzzzzzzzzz'; known: deepseek-v3, kimi-k2, mixtral-8x7b, qwen3-30b-a3b");
}

TEST(UnknownName, TakesTheFirstOfEquallyNear) {
  const std::vector<std::string> names{"cp", "tp", "ep"};
  EXPECT_NE(unknown_name("plan setting", "xp", names).find("did you mean 'cp'?"), std::string::npos);
}

TEST(UnknownName, CopesWithNothing) {
  EXPECT_EQ(unknown_name("cluster", "h200", {}), "unknown cluster 'h200'; known: ");
  EXPECT_NE(unknown_name("model", "", kNames).find("unknown model ''"), std::string::npos);
}

TEST(DataHome, FollowsTheEnvironment) {
  const char* before = std::getenv("MOP_HOME");
  const std::string kept = before != nullptr ? before : "";
  setenv("MOP_HOME", "/somewhere", 1);
  EXPECT_EQ(data_home(), "/somewhere");
  setenv("MOP_HOME", "", 1);
  EXPECT_TRUE(std::filesystem::exists(data_home() / "hwmodels"));
  before != nullptr ? setenv("MOP_HOME", kept.c_str(), 1) : unsetenv("MOP_HOME");
}

}  // namespace
}  // namespace mop
