#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "sim/base/error.h"
#include "sim/store/store.h"
#include "tests/cli/process.h"

namespace mop::test {
namespace {

using ::testing::HasSubstr;

size_t rows_in(const Folder& folder, const std::string& db) {
  if (!std::filesystem::exists(folder.path() / db)) return 0;
  try {
    return store::Store(folder.path() / db, store::Access::kRead).query({.with_detail = false}).size();
  } catch (const UserError&) {  // being made
    return 0;
  }
}

std::vector<std::string> sweep(const std::string& stem) {
  return {"sweep",    "--model",  "tiny-mixtral", "--plan",      "fsdp2",      "--context",
          "512..32K", "--nodes",  "1,2,3,4",      "--sequences", "1..32",      "--ep",
          "1..4",     "--reduce", "bf16,fp32",    "--recompute", "full,none",  "--jobs",
          "1",        "--db",     stem + ".db",   "--csv",       stem + ".csv"};
}

TEST(Sweep, InterruptedAndResumedIsTheSame) {
  const Folder folder;
  const Ended whole = folder.mop(sweep("whole"));
  ASSERT_EQ(whole.status, 0) << whole.err;
  EXPECT_EQ(whole.err, "") << "no progress bar where there is no terminal";
  const size_t all = rows_in(folder, "whole.db");
  ASSERT_GT(all, 300u);

  Process process(sweep("part"), folder.path());
  for (int i = 0; i < 600 && rows_in(folder, "part.db") == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  process.interrupt();
  const Ended interrupted = process.wait();
  EXPECT_EQ(interrupted.status, 130);
  EXPECT_THAT(interrupted.err, HasSubstr("with --resume"));
  EXPECT_EQ(std::count(interrupted.err.begin(), interrupted.err.end(), '\n'), 1);
  const size_t kept = rows_in(folder, "part.db");
  EXPECT_GT(kept, 0u);
  EXPECT_LT(kept, all);
  EXPECT_THAT(interrupted.err, HasSubstr("interrupted: " + std::to_string(kept) + " of "));

  std::vector<std::string> again = sweep("part");
  again.emplace_back("--resume");
  const Ended resumed = folder.mop(again);
  EXPECT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_THAT(resumed.out, HasSubstr(std::to_string(kept) + " were there already"));
  EXPECT_EQ(rows_in(folder, "part.db"), all);
  EXPECT_EQ(folder.read("part.csv"), folder.read("whole.csv"));
}

TEST(Sweep, RowsAreInTheOrderOfTheCombinations) {
  const Folder folder;
  const std::vector<std::string> args{"sweep",
                                      "--model",
                                      "olmoe-1b-7b",
                                      "--plan",
                                      "fsdp2",
                                      "--plan",
                                      "mop:ulysses=1,ep=8,vp=8",
                                      "--context",
                                      "4K,2K",
                                      "--nodes",
                                      "1,2",
                                      "--cp",
                                      "1,3",
                                      "--routing",
                                      "balanced,zipf:1.2,seed=7",
                                      "--csv",
                                      "rows.csv",
                                      "--format",
                                      "json"};
  const Ended ended = folder.mop(args);
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("skipped 8 of 24 combinations; the first: plan setting cp is 3"));
  const nlohmann::json rows = nlohmann::json::parse(ended.out);
  ASSERT_EQ(rows.size(), 16u);
  EXPECT_EQ(rows[0].at("plan").at("family"), "fsdp2");
  EXPECT_EQ(rows[0].at("nodes"), 1);
  EXPECT_EQ(rows[0].at("context"), 4096);
  EXPECT_EQ(rows[0].at("routing"), "balanced");
  EXPECT_EQ(rows[1].at("routing"), "zipf:1.2,seed=7");
  EXPECT_EQ(rows[2].at("context"), 2048);
  EXPECT_EQ(rows[4].at("nodes"), 2);
  EXPECT_EQ(rows[8].at("plan").at("family"), "mop");
  const std::string csv = folder.read("rows.csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 17);
  EXPECT_TRUE(csv.starts_with(
      "model,cluster,nodes,gpus,context,sequences,accumulate,calibration,plan_family,routing,precision,"
      "balance_loss,cp,plan,fits,"));
  EXPECT_THAT(csv,
              HasSubstr("\nolmoe-1b-7b,h200,1,8,4096,1,1,measured,fsdp2,\"zipf:1.2,seed=7\",bf16,false,1,"));

  std::vector<std::string> parallel = args;
  parallel.insert(parallel.end(), {"--jobs", "3"});
  ASSERT_EQ(folder.mop(parallel).status, 0);
  EXPECT_EQ(folder.read("rows.csv"), csv);
}

TEST(Sweep, OfAThousandPointsTakesSeconds) {
  const Folder folder;
  const auto begin = std::chrono::steady_clock::now();
  const Ended ended =
      folder.mop({"sweep", "--model", "mixtral-8x7b", "--plan", "mop:vp=8,checkpoints=hbm,optimizer=host",
                  "--context", "2K..16K", "--nodes", "2,4,6,8", "--ulysses", "1..8", "--ep", "1..8",
                  "--dense-shard", "8,16", "--sequences", "1,2"});
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_EQ(rows_in(folder, "results.db"), 1024u);
  EXPECT_LT(seconds, 60) << "20 s on two cores of its own";
  RecordProperty("seconds", std::to_string(seconds));
}

}  // namespace
}  // namespace mop::test
