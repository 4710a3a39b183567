#include "exec/launch/spawn.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "tests/exec/launch/support.h"

namespace mop::launch {
namespace {

using ::testing::ElementsAre;
using ::testing::MatchesRegex;

class SpawnTest : public ::testing::Test {
 protected:
  void start(const std::vector<std::string>& arguments) {
    processes.start([&] {
      std::vector<char*> argv{const_cast<char*>(SPAWNED)};
      for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
      argv.push_back(nullptr);
      execv(SPAWNED, argv.data());
      return 72;
    });
  }
  int run(const std::vector<std::string>& arguments) {
    start(arguments);
    return processes.wait().front();
  }
  void await_ready() const {
    while (processes.out().find("ready\n") == std::string::npos) usleep(5000);
  }

  Processes processes;
};

TEST_F(SpawnTest, RunsThisProgramAndShowsTheOutputOfProcess0) {
  EXPECT_EQ(run({"3", "10", "say", "an argument  of words"}), 0);
  EXPECT_EQ(processes.out(), "mop 0/3 an argument  of words\n");
  EXPECT_EQ(processes.err(), "");
}

TEST_F(SpawnTest, GivesEachAnEnvironmentOfItsOwn) {
  EXPECT_EQ(run({"3", "10", "host"}), 0);
  EXPECT_EQ(processes.out(), "host 0\nhost 0\nhost 1\n");
}

TEST_F(SpawnTest, ReturnsTheStatus) {
  EXPECT_EQ(run({"1", "10", "exit", "0"}), 0);
  EXPECT_EQ(run({"3", "10", "exit", "0", "0", "0"}), 0);
  EXPECT_EQ(run({"3", "10", "exit", "0", "1", "0"}), 1);
  EXPECT_EQ(run({"3", "10", "exit", "1", "0", "2"}), 2);
  EXPECT_EQ(run({"3", "10", "exit", "0", "7", "0"}), 1);
  EXPECT_EQ(run({"2", "10", "exit", "130", "130"}), 130);
  EXPECT_EQ(processes.err(), "");
}

TEST_F(SpawnTest, TellsWhichSignalEndedAProcess) {
  EXPECT_EQ(run({"3", "30", "die-late", "2", "9"}), 1);
  EXPECT_THAT(
      processes.err(),
      MatchesRegex(
          "mop: rank 2 \\(pid [0-9]+\\) was ended by signal 9 \\(Killed[^\n]*\\): the others stop[^\n]*\n"));
}

TEST_F(SpawnTest, TellsWhichSignalEndedProcess0) {
  EXPECT_EQ(run({"3", "30", "die-late", "0", "6"}), 1);
  EXPECT_THAT(processes.err(),
              MatchesRegex("mop: rank 0 \\(pid [0-9]+\\) was ended by signal 6 \\(Aborted\\): [^\n]*\n"));
}

TEST_F(SpawnTest, EndsThoseThatDoNotNotice) {
  EXPECT_EQ(run({"3", "1", "die", "1", "9"}), 1);
  EXPECT_THAT(processes.err(), MatchesRegex("mop: rank 1 \\(pid [0-9]+\\) was ended by signal 9 [^\n]*\n"));
}

// Silent for 20 seconds it is given up by the others, and then it is killed.
TEST_F(SpawnTest, EndsOneThatIsStopped) {
  const auto begin = Clock::now();
  EXPECT_EQ(run({"3", "300", "die-late", "1", std::to_string(SIGSTOP)}), 1);
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(30));
  EXPECT_THAT(processes.err(), MatchesRegex("mop: rank 1 \\(host [^\n]*, pid [0-9]+\\) [^\n]*\n"));
}

TEST_F(SpawnTest, TellsWhoReturnedWithoutTheOthers) {
  EXPECT_EQ(run({"3", "30", "return-late", "1", "0"}), 1);
  EXPECT_THAT(processes.err(),
              MatchesRegex("mop: rank 1 \\(host [^\n]*, pid [0-9]+\\) ended unexpectedly: [^\n]*\n"));
}

TEST_F(SpawnTest, TellsAReasonOnce) {
  EXPECT_EQ(run({"4", "30", "abandon", "3"}), 2);
  EXPECT_EQ(processes.err(), "mop: rank 3: out of GPU memory\n");
}

TEST_F(SpawnTest, HandsASignalOnOnce) {
  start({"3", "30", "count"});
  await_ready();
  kill(-processes.pids.front(), SIGINT);  // all of the group, as Ctrl-C does
  EXPECT_THAT(processes.wait(), ElementsAre(0));
  EXPECT_EQ(processes.err(), "");
}

TEST_F(SpawnTest, SaysNothingOfASignalThatWasHandedOn) {
  start({"3", "30", "hang"});
  await_ready();
  kill(processes.pids.front(), SIGINT);
  EXPECT_THAT(processes.wait(), ElementsAre(1));
  EXPECT_EQ(processes.err(), "");
}

TEST_F(SpawnTest, ProcessesDieWithTheirParent) {
  start({"3", "30", "hang"});
  await_ready();
  std::istringstream words(processes.out());
  std::vector<pid_t> children(3);
  for (pid_t& pid : children) {
    words >> pid;
    EXPECT_EQ(kill(pid, 0), 0);
  }
  kill(processes.pids.front(), SIGKILL);
  EXPECT_THAT(processes.wait(), ElementsAre(128 + SIGKILL));
  for (const pid_t pid : children)  // gone, or waiting for whoever inherited it
    for (int i = 0; i < 2000; ++i) {
      std::ifstream status(fmt::format("/proc/{}/stat", pid));
      std::string ignored, name, state;
      if (!(status >> ignored >> name >> state) || state == "Z") break;
      ASSERT_LT(i, 1999) << "process " << pid << " lives";
      usleep(5000);
    }
}

TEST_F(SpawnTest, SharesTheCores) {
  cpu_set_t set;
  ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
  std::string all;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &set)) all += fmt::format("{} ", core);
  const int count = CPU_COUNT(&set), half = std::min(count, 2);

  EXPECT_EQ(run({std::to_string(half), "30", "cores"}), 0);
  std::istringstream lines(processes.out());
  std::string line, joined;
  for (int rank = 0; rank < half; ++rank) {
    ASSERT_TRUE(std::getline(lines, line));
    EXPECT_NEAR(static_cast<double>(std::ranges::count(line, ' ')), count / half, 1);
    joined += line;
  }
  EXPECT_EQ(joined, all);

  if (count > 8) GTEST_SKIP() << "too many cores to have fewer than processes";
  const size_t before = processes.out().size();
  EXPECT_EQ(run({std::to_string(count + 1), "30", "cores"}), 0);
  std::string expected;
  for (int rank = 0; rank <= count; ++rank) expected += all + "\n";
  EXPECT_EQ(processes.out().substr(before), expected);
}

}  // namespace
}  // namespace mop::launch
