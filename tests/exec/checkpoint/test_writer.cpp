#include <sys/wait.h>
#include <unistd.h>

#include "tests/exec/checkpoint/support.h"

namespace mop::checkpoint {
namespace {

using ::testing::ElementsAre;

using WriterTest = Folder;

TEST_F(WriterTest, KeepsTheLatest) {
  Writer writer(folder / "made" / "anew", 3);
  for (int64_t step = 10; step <= 60; step += 10) {
    save(writer, step, 2);
    EXPECT_EQ(checkpoints(folder / "made" / "anew").size(),
              static_cast<size_t>(std::min<int64_t>(3, step / 10)));
  }
  EXPECT_THAT(names_in(folder / "made" / "anew"), ElementsAre("step-000040", "step-000050", "step-000060"));
  EXPECT_THAT(names_in(folder / "made" / "anew" / "step-000060"),
              ElementsAre("manifest.json", "rank-00000.bin", "rank-00001.bin"));
}

TEST_F(WriterTest, KeepsOneWhenAskedTo) {
  Writer writer(folder, 1);
  for (const int64_t step : {1, 2}) save(writer, step, 1);
  EXPECT_THAT(names_in(folder), ElementsAre("step-000002"));
}

// A run that went back does not lose what it has just written, nor what lies ahead.
TEST_F(WriterTest, LeavesLaterStepsAlone) {
  Writer writer(folder, 2);
  for (const int64_t step : {100, 200, 150, 160}) save(writer, step, 1);
  EXPECT_THAT(names_in(folder), ElementsAre("step-000150", "step-000160", "step-000200"));
}

TEST_F(WriterTest, ReplacesACheckpointOfTheSameStep) {
  Writer writer(folder);
  save(writer, 7, 5);
  std::filesystem::remove(folder / "step-000007" / rank_name(2));  // damaged, say
  save(writer, 7, 2);
  EXPECT_THAT(names_in(folder), ElementsAre("step-000007"));
  expect_contents(Reader(folder / "step-000007"), 7);
  EXPECT_EQ(names_in(folder / "step-000007").size(), 3);
}

TEST_F(WriterTest, WritesWhileTheCallerGoesOn) {
  Writer writer(folder, 4);
  EXPECT_TRUE(writer.done());
  writer.wait();
  const Filled first = filled(1, 3), second = filled(2, 3), third = filled(3, 3);
  writer.begin(first.snapshot());
  writer.begin(second.snapshot());  // waits for the first
  expect_contents(Reader(folder / "step-000001"), 1);
  while (!writer.done()) usleep(100);
  expect_contents(Reader(folder / "step-000002"), 2);
  {
    Writer other(folder / "other");
    other.begin(third.snapshot());
  }  // the destructor waits
  expect_contents(Reader(folder / "other" / "step-000003"), 3);
}

TEST_F(WriterTest, RemovesWhatTheKilledLeft) {
  const pid_t dead = fork();
  if (dead == 0) _exit(0);
  waitpid(dead, nullptr, 0);
  const auto made = [&](const std::string& name) {
    std::filesystem::create_directories(folder / name / "inside");
    return name;
  };
  made("step-000009.tmp-" + std::to_string(dead));
  made("step-000009.tmp-" + std::to_string(getpid()));
  const std::string running = made("step-000009.tmp-" + std::to_string(getppid()));
  const std::string strange = made("step-9.tmp-x"), foreign = made("notes.tmp-" + std::to_string(dead));
  Writer writer(folder);
  EXPECT_THAT(names_in(folder), ElementsAre(foreign, running, strange));
}

}  // namespace
}  // namespace mop::checkpoint
