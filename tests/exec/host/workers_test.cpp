#include "exec/host/workers.h"

#include <gmock/gmock.h>
#include <sched.h>

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "tests/exec/support/allocations.h"

namespace mop::host {
namespace {

using testing::Each;

// More threads than cores, unpinned: -1.
std::vector<int> anywhere(int threads) {
  return std::vector<int>(static_cast<size_t>(threads), -1);
}

TEST(Parts, AreWholeAndEven) {
  for (const int64_t n : {0, 1, 31, 32, 33, 64, 1000, 4096, 99999}) {
    for (const int64_t grain : {1, 32, 4096}) {
      for (const int parts : {1, 2, 3, 7, 64}) {
        int64_t at = 0, most = 0, least = n;
        for (int part = 0; part < parts; ++part) {
          const Range range = part_of(n, grain, part, parts);
          ASSERT_EQ(range.begin, at);
          ASSERT_GE(range.end, range.begin);
          ASSERT_TRUE(range.end == n || range.end % grain == 0);
          at = range.end;
          most = std::max(most, range.end - range.begin);
          least = std::min(least, range.end - range.begin);
        }
        ASSERT_EQ(at, n);
        ASSERT_LT(most - least, 2 * grain) << n << " in " << parts << " parts of grains of " << grain;
      }
    }
  }
}

TEST(Workers, RunEveryThreadOnceACall) {
  for (const int threads : {1, 2, 5}) {
    Workers workers(anywhere(threads));
    ASSERT_EQ(workers.count(), threads);
    std::vector<int> calls(static_cast<size_t>(threads));
    for (int call = 1; call <= 500; ++call) {
      workers.run([&](int thread) { ++calls[static_cast<size_t>(thread)]; });
      ASSERT_THAT(calls, Each(call));
    }
  }
}

TEST(Workers, CallsFromSeveralThreadsTakeTurns) {
  Workers workers(anywhere(3));
  int inside = 0;  // not atomic: the calls must not overlap
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int call = 0; call < 200; ++call)
        workers.run([&](int thread) {
          if (thread == 1) ++inside;
        });
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(inside, 4 * 200);
}

TEST(Workers, ArePinnedToTheirCores) {
  const std::vector<int> cores = cores_of_process();
  ASSERT_FALSE(cores.empty());
  ASSERT_TRUE(std::is_sorted(cores.begin(), cores.end()));
  Workers workers(cores);
  std::vector<int> on(cores.size());
  workers.run([&](int thread) { on[static_cast<size_t>(thread)] = sched_getcpu(); });
  EXPECT_EQ(on, cores);
}

TEST(Cores, AreSharedByProcesses) {
  const std::vector<int> cores{3, 5, 6, 7, 9, 20, 21};
  for (const int processes : {1, 2, 3, 7}) {
    std::vector<int> all;
    for (int i = 0; i < processes; ++i)
      for (const int core : share_of(cores, i, processes)) all.push_back(core);
    EXPECT_EQ(all, cores) << processes;
  }
  for (int i = 0; i < 9; ++i) EXPECT_EQ(share_of(cores, i, 9).size(), 1U);
  EXPECT_TRUE(share_of({}, 0, 4).empty());
}

TEST(Workers, OfTheProcessLeaveOneCore) {
  const auto cores = static_cast<int>(cores_of_process().size());
  EXPECT_EQ(Workers::of_process().count(), std::max(1, cores - 1));
}

TEST(Workers, AllocateNothingInACall) {
  if (!test::Allocations::counted()) GTEST_SKIP() << "a sanitizer's malloc is not counted";
  Workers workers(anywhere(4));
  workers.run([](int) {});
  const test::Allocations allocations;
  for (int call = 0; call < 50; ++call) workers.run([](int) {});
  EXPECT_EQ(allocations.count(), 0);
}

TEST(FirstTouch, ZeroesAllAndNothingElse) {
  Workers workers(anywhere(3));
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, size_t{100003}}) {
    std::vector<unsigned char> memory(bytes + 2, 0xaa);
    first_touch(workers, memory.data() + 1, static_cast<int64_t>(bytes));
    EXPECT_EQ(memory.front(), 0xaa);
    EXPECT_EQ(memory.back(), 0xaa);
    EXPECT_TRUE(std::all_of(memory.begin() + 1, memory.end() - 1, [](unsigned char c) { return c == 0; }));
  }
}

}  // namespace
}  // namespace mop::host
