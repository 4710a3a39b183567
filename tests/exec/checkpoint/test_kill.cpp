#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>

#include "tests/exec/checkpoint/support.h"

namespace mop::checkpoint {
namespace {

using KillTest = Folder;

// A process writes checkpoint after checkpoint and is killed at a random instant, again and again: what is
// there is whole, never older than before, and the next process goes on from it.
TEST_F(KillTest, TheNewestCheckpointIsAlwaysWhole) {
  constexpr int kKills = 80;
  constexpr int kKeep = 2;
  std::vector<Group> groups = some_groups();
  for (Group& group : groups) group.elements *= 10;
  // The instants spread over three checkpoints, whatever the disk's speed.
  const auto begin = std::chrono::steady_clock::now();
  {
    Writer writer(folder / "measured");
    for (int64_t step = 1; step <= 4; ++step) save(writer, step, static_cast<size_t>(step), groups);
  }
  const auto span = (std::chrono::steady_clock::now() - begin) * 3 / 4;
  const auto microseconds =
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(span).count());
  std::filesystem::remove_all(folder / "measured");

  std::mt19937_64 random(1);
  int64_t newest_step = 0;
  int unfinished = 0;
  // More kills where a busy disk lets few checkpoints through.
  for (int kills = 0; kills < kKills || (newest_step <= 10 && kills < 10 * kKills); ++kills) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      try {
        Writer writer(folder, kKeep);
        for (int64_t step = newest_step + 1;; ++step)
          save(writer, step, 1 + static_cast<size_t>(step) % 4, groups);
      } catch (...) {
      }
      _exit(1);
    }
    usleep(static_cast<useconds_t>(random() % microseconds));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the writing process failed by itself";

    const Newest newest = open_newest(folder);
    ASSERT_THAT(newest.skipped, ::testing::IsEmpty());
    const std::vector<std::string> names = names_in(folder);
    const size_t finished = checkpoints(folder).size();
    unfinished += names.size() > finished;
    if (!newest.reader) {
      ASSERT_EQ(newest_step, 0);
      continue;
    }
    ASSERT_GE(newest.reader->state().step, newest_step);
    newest_step = newest.reader->state().step;
    ASSERT_GE(finished, std::min<size_t>(kKeep, static_cast<size_t>(newest_step)));
    for (const std::filesystem::path& path : checkpoints(folder)) {
      const Reader reader(path);
      ASSERT_NO_FATAL_FAILURE(expect_contents(reader, reader.state().step, groups));
    }
  }
  // One that is not killed puts all in order.
  Writer writer(folder, kKeep);
  save(writer, newest_step + 1, 2, groups);
  EXPECT_THAT(names_in(folder), ::testing::ElementsAre(step_name(newest_step), step_name(newest_step + 1)));

  RecordProperty("checkpoints", std::to_string(newest_step));
  RecordProperty("killed while writing", unfinished);
  EXPECT_GT(newest_step, 10);
  EXPECT_GT(unfinished, kKills / 4);
}

}  // namespace
}  // namespace mop::checkpoint
