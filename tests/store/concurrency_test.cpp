#include <thread>

#include "tests/store/sample.h"

namespace mop::store {
namespace {

class Concurrency : public Folder {
 protected:
  static constexpr uint64_t kBatches = 20, kBatch = 25, kWriters = 3;

  // Opens, perhaps while others make the tables, and stores in batches, with readings in between.
  void write(uint64_t writer) {
    Store store(path, Access::kWrite, std::chrono::seconds(60));
    for (uint64_t batch = 0; batch < kBatches; ++batch) {
      std::vector<RunRecord> records;
      for (uint64_t i = 0; i < kBatch; ++i) {
        const uint64_t mine = (writer * kBatches + batch) * kBatch + i;
        records.push_back(sample(mine, kPrediction, fmt::format("w{}", writer)));
        records.push_back(sample(i, kPrediction, "common"));
      }
      store.insert(records);
      const size_t seen = store.finished_keys(fmt::format("w{}", writer)).size();
      if (seen != (batch + 1) * kBatch) throw UserError(fmt::format("writer {} sees {}", writer, seen));
    }
  }
  void expect_all() {
    Store store(path, Access::kRead);
    for (uint64_t writer = 0; writer < kWriters; ++writer) {
      EXPECT_EQ(store.finished_keys(fmt::format("w{}", writer)).size(), kBatches * kBatch);
    }
    EXPECT_EQ(store.query({.where = {"sweep=common"}}).size(), kBatch);
  }
};

TEST_F(Concurrency, Threads) {
  std::vector<std::string> errors(kWriters);
  {
    std::vector<std::jthread> threads;
    for (uint64_t writer = 0; writer < kWriters; ++writer) {
      threads.emplace_back([&, writer] { errors[writer] = error_of([&] { write(writer); }); });
    }
  }
  for (const std::string& error : errors) EXPECT_EQ(error, "no error");
  expect_all();
}

TEST_F(Concurrency, Processes) {
  std::vector<pid_t> children;
  for (uint64_t writer = 0; writer < kWriters; ++writer) {
    children.push_back(::fork());
    if (children.back() == 0) {
      const std::string error = error_of([&] { write(writer); });
      if (error != "no error") fmt::print(stderr, "{}\n", error);
      ::_exit(error == "no error" ? 0 : 1);
    }
  }
  for (const pid_t child : children) {
    int status = -1;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  expect_all();
}

}  // namespace
}  // namespace mop::store
