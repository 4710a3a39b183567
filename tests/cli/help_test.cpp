#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "sim/plan/plan.h"
#include "tests/cli/process.h"

namespace mop::test {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Help, EveryCommandHasAnExample) {
  const Folder folder;
  const std::vector<std::vector<std::string>> commands{
      {},
      {"simulate"},
      {"compare"},
      {"sweep"},
      {"show"},
      {"results"},
      {"validate"},
      {"what-if"},
      {"run"},
      {"show", "model"},
      {"show", "cluster"},
      {"show", "plan"},
      {"show", "program"},
  };
  for (std::vector<std::string> command : commands) {
    SCOPED_TRACE(testing::PrintToString(command));
    command.emplace_back("--help");
    const Ended ended = folder.mop(command);
    EXPECT_EQ(ended.status, 0);
    EXPECT_EQ(ended.err, "");
    EXPECT_THAT(ended.out, HasSubstr("Example:\n  mop "));
  }
}

TEST(Help, EveryPredictionTakesTheWorkload) {
  const Folder folder;
  const std::vector<std::vector<std::string>> commands{
      {"simulate"}, {"compare"}, {"sweep"}, {"show", "program"}};
  for (std::vector<std::string> command : commands) {
    command.emplace_back("--help");
    const std::string help = folder.mop(command).out;
    for (const char* flag :
         {"--context TOKENS", "--sequences N", "--precision TYPE", "--balance-loss on|off"})
      EXPECT_THAT(help, HasSubstr(flag)) << command[0];
  }
}

TEST(Help, PlanSettingsAreListedOnce) {
  const Folder folder;
  const std::string plan = folder.mop({"show", "plan", "--help"}).out,
                    simulate = folder.mop({"simulate", "--help"}).out;
  EXPECT_THAT(plan, HasSubstr("Plan settings of both families"));
  for (const plan::Knob& knob : plan::knobs()) {
    EXPECT_THAT(plan, HasSubstr(std::string("--") + knob.name + " "));
    EXPECT_THAT(plan, HasSubstr(knob.help));
    EXPECT_THAT(simulate, Not(HasSubstr(knob.help)));
  }
}

TEST(Help, Version) {
  const Folder folder;
  const Ended ended = folder.mop({"--version"});
  EXPECT_EQ(ended.status, 0);
  EXPECT_THAT(ended.out, ::testing::MatchesRegex("mop [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

}  // namespace
}  // namespace mop::test
