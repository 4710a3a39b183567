#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "tests/exec/checkpoint/support.h"

namespace mop::checkpoint {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

using FailureTest = Folder;

// Files of this process end at `bytes`, as a full disk ends them.
class FileLimit {
 public:
  explicit FileLimit(rlim_t bytes) : signal_(signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    signal(SIGXFSZ, signal_);
  }

 private:
  sighandler_t signal_;
  rlimit before_{};
};

TEST_F(FailureTest, AFullDiskCostsTheNewCheckpointOnly) {
  Writer writer(folder);
  save(writer, 1, 3);
  save(writer, 2, 3);
  const Filled third = filled(3, 3), fourth = filled(4, 3);
  const auto whole = static_cast<uint64_t>(std::filesystem::file_size(folder / "step-000002" / rank_name(1)));
  for (const uint64_t limit : {uint64_t{0}, uint64_t{5000}, whole / 2}) {
    {
      const FileLimit full(limit);
      writer.begin(third.snapshot());
      EXPECT_THAT(
          error_of([&] { writer.wait(); }),
          AllOf(HasSubstr("cannot write " + folder.string() + "/step-000003.tmp-"), HasSubstr("free space")));
    }
    EXPECT_THAT(names_in(folder), ElementsAre("step-000001", "step-000002"));
    EXPECT_NO_THROW(writer.wait());  // told once
  }
  {
    const FileLimit full(5000);
    writer.begin(third.snapshot());
    while (!writer.done()) usleep(100);
    EXPECT_THAT(error_of([&] { writer.begin(fourth.snapshot()); }), HasSubstr("step-000003"));
    EXPECT_TRUE(writer.done());
  }
  expect_contents(*open_newest(folder).reader, 2);
  writer.begin(fourth.snapshot());
  writer.wait();
  expect_contents(*open_newest(folder).reader, 4);
}

TEST_F(FailureTest, TheManifestMayBeWhatDoesNotFit) {
  Writer writer(folder);
  save(writer, 1, 1);
  Filled many(state_of(2), 1);
  for (int64_t i = 0; i < 200; ++i)
    many.add(0, {program::FlatPart::head, 1}, What::m, i, i + 1, [](auto...) { return 1.0f; });
  {
    const FileLimit full(200 * 64);  // enough for the rank's file
    writer.begin(many.snapshot());
    EXPECT_THAT(error_of([&] { writer.wait(); }), HasSubstr("/manifest.json: "));
  }
  EXPECT_THAT(names_in(folder), ElementsAre("step-000001"));
}

// A file system of 1 MiB, mounted where only a child process sees it.
TEST_F(FailureTest, ADiskThatIsReallyFull) {
  std::vector<Group> groups = some_groups();
  groups[2].elements = 16384;  // 230 KB a checkpoint: four fit
  const pid_t child = fork();
  if (child == 0) {
    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        mount("none", folder.c_str(), "tmpfs", 0, "size=1m") != 0)
      _exit(77);
    Writer writer(folder, 100);
    int64_t step = 0;
    std::string error;
    try {
      while (step < 100) save(writer, ++step, 3, groups);
    } catch (const UserError& e) {
      error = e.what();
    }
    const bool told = error.find("No space left on device; free space") != std::string::npos;
    const bool clean = checkpoints(folder).size() == static_cast<size_t>(step - 1) &&
                       names_in(folder).size() == static_cast<size_t>(step - 1);
    expect_contents(*open_newest(folder).reader, step - 1, groups);
    std::filesystem::remove_all(folder / "step-000001");
    save(writer, step, 3, groups);
    expect_contents(*open_newest(folder).reader, step, groups);
    _exit(told && clean && step > 2 && !::testing::Test::HasFailure() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "may not mount a file system";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST_F(FailureTest, AFolderThatCannotBeWritten) {
  std::filesystem::create_directory(folder / "closed");
  if (geteuid() == 0) {
    std::filesystem::permissions(folder,
                                 std::filesystem::perms::group_exec | std::filesystem::perms::others_exec,
                                 std::filesystem::perm_options::add);
    ASSERT_EQ(seteuid(65534), 0);
  } else {
    std::filesystem::permissions(folder / "closed",
                                 std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
  }
  Writer writer(folder / "closed");
  const Filled memory = filled(1, 1);
  writer.begin(memory.snapshot());
  EXPECT_THAT(error_of([&] { writer.wait(); }), HasSubstr("step-000001.tmp-"));
  EXPECT_THAT(error_of([&] { Writer(folder / "closed" / "below"); }), HasSubstr("Permission denied"));
  if (getuid() == 0) {
    ASSERT_EQ(seteuid(0), 0);
  }
  std::filesystem::permissions(folder / "closed", std::filesystem::perms::owner_all);
}

TEST_F(FailureTest, AFileInTheWay) {
  std::ofstream(folder / "file").flush();
  EXPECT_THAT(error_of([&] { Writer(folder / "file"); }), HasSubstr("cannot make the folder"));
  EXPECT_THAT(error_of([&] { Writer(folder / "file" / "below"); }), HasSubstr("Not a directory"));
}

}  // namespace
}  // namespace mop::checkpoint
