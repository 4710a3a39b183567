// Whatever is wrong with the file, the user reads one clear line and nothing stored is lost.
#include <SQLiteCpp/SQLiteCpp.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <thread>

#include "tests/store/sample.h"

namespace mop::store {
namespace {

using namespace std::chrono_literals;

class Fault : public Folder {
 protected:
  std::string open_error(const std::filesystem::path& file, Access access) {
    const std::string message = error_of([&] { Store(file, access, 50ms); });
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message;
  }
  void make(uint64_t records) {
    std::vector<RunRecord> batch;
    for (uint64_t i = 0; i < records; ++i) batch.push_back(sample(i));
    Store(path, Access::kWrite).insert(batch);
  }
  size_t count() { return Store(path, Access::kRead).query().size(); }
  std::vector<RunRecord> large_batch() {  // 16 MB, far beyond SQLite's cache: it must write before it commits
    std::vector<RunRecord> batch;
    for (uint64_t i = 0; i < 800; ++i) {
      batch.push_back(sample(1000 + i));
      batch.back().detail = "{\"x\": \"" + std::string(20'000, 'x') + "\"}";
    }
    return batch;
  }
};

TEST_F(Fault, PathsThatAreNoFile) {
  for (const Access access : {Access::kRead, Access::kWrite}) {
    EXPECT_SAYS(open_error("", access), "has no name");
    EXPECT_SAYS(open_error(folder, access), "is a folder");
    EXPECT_SAYS(open_error("/dev/null", access), "is not a regular file");
    EXPECT_SAYS(open_error(folder / "no" / "results.db", access), "there is no folder");
    EXPECT_SAYS(open_error(folder / std::string(300, 'x'), access), "File name too long");
  }
  const auto fifo = folder / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_SAYS(open_error(fifo, Access::kRead), "is not a regular file");
  make(1);
  EXPECT_SAYS(open_error(path / "results.db", Access::kWrite), "there is no folder");
}

TEST_F(Fault, ReadingWhatIsNotThereMakesNothing) {
  EXPECT_SAYS(open_error(path, Access::kRead), "there is no such file");
  EXPECT_FALSE(std::filesystem::exists(path));
  std::ofstream(path).close();
  EXPECT_SAYS(open_error(path, Access::kRead), "is empty");
  make(1);  // an empty file is taken over
  EXPECT_EQ(count(), 1);
}

TEST_F(Fault, FolderThatCannotBeWritten) {
  ::chmod(folder.c_str(), 0555);
  EXPECT_SAYS(error_in_child([&] { Store(path, Access::kWrite); }), "cannot be written");
  ::chmod(folder.c_str(), 0777);
  make(2);
  ::chmod(path.c_str(), 0666);
  ::chmod(folder.c_str(), 0555);  // the file can be written, its journal cannot
  EXPECT_SAYS(error_in_child([&] { Store(path, Access::kWrite); }), "cannot be written");
  EXPECT_EQ(error_in_child([&] { Store(path, Access::kRead).query(); }), "no error");
  ::chmod(folder.c_str(), 0777);
  EXPECT_EQ(count(), 2);
}

TEST_F(Fault, FileThatCannotBeWrittenOrRead) {
  make(2);
  ::chmod(path.c_str(), 0444);
  EXPECT_SAYS(error_in_child([&] { Store(path, Access::kWrite); }),
              "cannot be written; change its permissions");
  EXPECT_EQ(error_in_child([&] { Store(path, Access::kRead).query(); }), "no error");
  ::chmod(path.c_str(), 0000);
  EXPECT_SAYS(error_in_child([&] { Store(path, Access::kRead); }), "no permission to read it");
  EXPECT_SAYS(error_in_child([&] { Store(path, Access::kWrite); }), "no permission to read it");
  ::chmod(path.c_str(), 0644);
  EXPECT_EQ(count(), 2);
}

TEST_F(Fault, LockedByAnother) {
  make(1);
  Store store(path, Access::kWrite, 50ms);
  SQLite::Database other(path.string(), SQLite::OPEN_READWRITE);
  other.exec("BEGIN IMMEDIATE");
  EXPECT_SAYS(error_of([&] { store.insert(sample(7)); }), "kept it locked for 0.05 s");
  EXPECT_SAYS(open_error(path, Access::kWrite), "wait for that process to end");
  EXPECT_EQ(count(), 1);  // reading goes on
  other.exec("COMMIT");
  other.exec("BEGIN EXCLUSIVE");
  EXPECT_SAYS(error_of([&] { store.query(); }), "kept it locked");
  EXPECT_SAYS(open_error(path, Access::kRead), "kept it locked");
  other.exec("COMMIT");
  store.insert(sample(7));
  EXPECT_EQ(count(), 2);
}

TEST_F(Fault, AReaderDelaysACommitAndNothingHalfWayRemains) {
  make(1);
  Store store(path, Access::kWrite, 50ms);
  SQLite::Database other(path.string(), SQLite::OPEN_READWRITE);
  {
    SQLite::Statement reading(other, "SELECT * FROM runs");
    reading.executeStep();
    EXPECT_SAYS(error_of([&] { store.insert(sample(7)); }), "kept it locked");
  }
  EXPECT_EQ(count(), 1);
  store.insert(sample(7));
  EXPECT_EQ(count(), 2);
}

TEST_F(Fault, FilesOfOthersAreRefusedAndUnchanged) {
  const auto refuse = [&](std::string_view part) {
    const std::string before = bytes_of(path);
    SCOPED_TRACE(before.substr(0, 20));
    for (const Access access : {Access::kRead, Access::kWrite}) EXPECT_SAYS(open_error(path, access), part);
    EXPECT_TRUE(bytes_of(path) == before);
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder), {}), 1);
    std::filesystem::remove(path);
  };
  for (const std::string& text : {std::string("x"), std::string("model,step\n"), std::string(10'000, 'z')}) {
    std::ofstream(path) << text;
    refuse("is not a results database");
  }
  SQLite::Database(path.string(), SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE).exec("CREATE TABLE t (x)");
  refuse("database of another program");
  SQLite::Database(path.string(), SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE)
      .exec("PRAGMA application_id = 7; PRAGMA user_version = 1");
  refuse("database of another program");
  SQLite::Database(path.string(), SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE)
      .exec("PRAGMA user_version = 1");
  refuse("database of another program");
  make(1);
  SQLite::Database(path.string(), SQLite::OPEN_READWRITE).exec("PRAGMA user_version = 99");
  refuse("written by a newer mop (schema 99, this one knows 2)");
}

TEST_F(Fault, AReaderWritesNothing) {
  make(1);
  Store store(path, Access::kRead);
  EXPECT_SAYS(error_of([&] { store.insert(sample(2)); }), "cannot be written");
  EXPECT_EQ(count(), 1);
}

TEST_F(Fault, DamagedFile) {
  make(200);
  const auto size = std::filesystem::file_size(path);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4096);
    file << std::string(size - 4096, '\xff');
  }
  EXPECT_SAYS(error_of([&] { Store(path, Access::kRead).query(); }), "is damaged");
  std::filesystem::resize_file(path, 4096);
  EXPECT_SAYS(error_of([&] { Store(path, Access::kRead).query(); }), "is damaged");
  EXPECT_SAYS(error_of([&] { Store(path, Access::kWrite).insert(sample(1)); }), "is damaged");
}

TEST_F(Fault, FileSizeLimit) {
  make(5);
  const std::string message = error_in_child(
      [&] {
        ::signal(SIGXFSZ, SIG_IGN);
        const rlimit limit{200'000, 200'000};
        ::setrlimit(RLIMIT_FSIZE, &limit);
        Store(path, Access::kWrite).insert(large_batch());
      },
      false);
  EXPECT_SAYS(message, "what was stored before is intact");
  EXPECT_EQ(count(), 5);
}

// A file system of 1 MB of our own; the kernel may refuse it to users without privileges.
TEST_F(Fault, FullDisk) {
  const uid_t user = ::geteuid(), group = ::getegid();
  const auto enter_namespace = [&] {
    if (::unshare(CLONE_NEWNS) == 0) return true;
    if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
    std::ofstream("/proc/self/setgroups") << "deny";
    std::ofstream("/proc/self/uid_map") << fmt::format("0 {} 1", user);
    std::ofstream("/proc/self/gid_map") << fmt::format("0 {} 1", group);
    return ::geteuid() == 0 && ::getegid() == 0;
  };
  const std::string message = error_in_child(
      [&] {
        const bool mounted = enter_namespace() &&
                             ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                             ::mount("none", folder.c_str(), "tmpfs", 0, "size=1m") == 0;
        if (!mounted) throw UserError("cannot mount");
        make(5);
        const std::string full = error_of([&] { Store(path, Access::kWrite).insert(large_batch()); });
        if (count() != 5) throw UserError("rows were lost: " + full);
        std::ofstream(folder / "filler") << std::string(2 << 20, 'x');
        if (count() != 5) throw UserError("rows cannot be read on a full disk: " + full);
        const std::string no_room = error_of([&] { Store(folder / "new.db", Access::kWrite); });
        std::filesystem::remove(folder / "filler");
        make(6);  // 0..4 are replaced
        if (count() != 6) throw UserError("no use after room was made: " + full);
        throw UserError(full + " / " + no_room);
      },
      false);
  if (message == "cannot mount") GTEST_SKIP() << "no permission to mount a tmpfs";
  EXPECT_SAYS(message, "the disk is full, nothing of this was stored");
  EXPECT_SAYS(message, " / results database");
}

// Killed at many moments, while its batch is on its way to the file: all of it is there or nothing.
TEST_F(Fault, KilledInABatch) {
  make(5);
  const std::vector<RunRecord> batch = large_batch();
  const auto journal = path.string() + "-journal";
  int interrupted = 0;
  for (int delay = 0; delay < 6; ++delay) {
    const size_t before = count();
    const pid_t child = ::fork();
    if (child == 0) {
      Store(path, Access::kWrite).insert(batch);
      ::_exit(0);
    }
    // Not when the journal appears: opening for writing has one for a moment too.
    const auto size = std::filesystem::file_size(path);
    while (std::filesystem::file_size(path) < size + 1'000'000 && ::waitpid(child, nullptr, WNOHANG) == 0) {
      std::this_thread::sleep_for(100us);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(3 * delay));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    interrupted += std::filesystem::exists(journal);
    const Access access = delay % 2 ? Access::kRead : Access::kWrite;  // a reader recovers just as well
    const size_t after = Store(path, access).query({.with_detail = false}).size();
    EXPECT_TRUE(after == before || after == 5 + batch.size()) << after;
    EXPECT_FALSE(std::filesystem::exists(journal));
    if (after != before) {  // it had finished: back to the five
      std::filesystem::remove(path);
      make(5);
    }
    EXPECT_EQ(error_of([&] { Store(path, Access::kWrite).insert(sample(3)); }), "no error");
  }
  EXPECT_GT(interrupted, 0) << "no kill hit a batch";
  SQLite::Database db(path.string());
  EXPECT_EQ(db.execAndGet("PRAGMA integrity_check").getString(), "ok");
}

TEST_F(Fault, InterruptedBatchOfAFileThatCannotBeWritten) {
  make(5);
  const pid_t child = ::fork();
  if (child == 0) {
    SQLite::Database db(path.string(), SQLite::OPEN_READWRITE);
    db.exec(
        "PRAGMA cache_spill = 1; PRAGMA cache_size = 1; BEGIN IMMEDIATE; "
        "UPDATE runs SET model = 'half', detail = hex(randomblob(100000))");
    ::_exit(0);  // without COMMIT
  }
  ::waitpid(child, nullptr, 0);
  ASSERT_TRUE(std::filesystem::exists(path.string() + "-journal"));
  ::chmod(path.c_str(), 0444);
  ::chmod((path.string() + "-journal").c_str(), 0444);
  EXPECT_SAYS(error_in_child([&] { Store(path, Access::kRead).query(); }), "interrupted");
  ::chmod(path.c_str(), 0644);
  ::chmod((path.string() + "-journal").c_str(), 0644);
  EXPECT_EQ(Store(path, Access::kWrite).query({.where = {"model=kimi-k2"}}).size(), 5);
}

}  // namespace
}  // namespace mop::store
