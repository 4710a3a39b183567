// What the user cannot mean: one clear line on standard error, exit status 2, nothing on standard output.
#include <SQLiteCpp/Database.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/cli/process.h"

namespace mop::test {
namespace {

using ::testing::HasSubstr;

void expect_error(const Ended& ended, const std::string& part) {
  EXPECT_EQ(ended.status, 2) << ended.err;
  EXPECT_EQ(ended.out, "");
  EXPECT_TRUE(ended.err.starts_with("mop: error: ")) << ended.err;
  EXPECT_EQ(std::count(ended.err.begin(), ended.err.end(), '\n'), 1) << ended.err;
  EXPECT_TRUE(ended.err.ends_with("\n"));
  EXPECT_THAT(ended.err, HasSubstr(part));
}

struct Case {
  std::vector<std::string> args;
  std::string part;
};

std::vector<std::string> simulate(std::vector<std::string> more) {
  std::vector<std::string> args{"simulate", "--model", "mixtral-8x7b", "--no-store"};
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

TEST(Error, NamesWhatIsWrong) {
  const std::vector<Case> cases{
      {{}, "no command is given; mop takes one of: simulate, compare, sweep, show, results"},
      {{"simulat"}, "unknown command 'simulat'; did you mean 'simulate'?"},
      {{"show"}, "no command is given; mop show takes one of: model, cluster, plan, program"},
      {{"show", "modle"}, "did you mean 'model'?"},
      {{"simulate", "--modle", "kimi-k2"}, "unknown flag '--modle'; did you mean '--model'?"},
      {{"simulate", "--modle=kimi-k2"}, "unknown flag '--modle'; did you mean '--model'?"},
      {{"simulate", "--model"}, "--model"},
      {{"simulate", "kimi-k2"}, "'kimi-k2' follows no flag"},
      {{"simulate"}, "no model is given"},
      {{"simulate", "--model", "kimi"}, "unknown model 'kimi'; did you mean 'kimi-k2'?"},
      {{"simulate", "--model", "kimi-k2", "--cluster", "h20"}, "unknown cluster 'h20'; did you mean 'h200'?"},
      {simulate({"--plan", "fsdp"}), "unknown plan 'fsdp'; did you mean 'fsdp2'?"},
      {simulate({"--plan", "mop:ulyses=4"}), "unknown plan setting 'ulyses'; did you mean 'ulysses'?"},
      {simulate({"--plan", "mop:ulysses"}), "'ulysses' has no value"},
      {simulate({"--plan", "fsdp2", "--ulysses", "4"}), "plan setting ulysses belongs to mop, not to fsdp2"},
      {simulate({"--checkpoints", "disk"}), "plan setting checkpoints is 'disk': it takes"},
      {simulate({"--clip", "maybe"}), "on or off"},
      {simulate({"--calibration", "measred"}), "did you mean 'measured'?"},
      {simulate({"--routing", "zip:1.2"}), "unknown routing 'zip'; did you mean 'zipf'?"},
      {simulate({"--routing", "histogram:nowhere.csv"}), "no such file"},
      {simulate({"--precision", "fp16"}), "precision is 'fp16': it takes bf16 or fp32"},
      {simulate({"--balance-loss", "maybe"}), "balance-loss is 'maybe': it takes on or off"},
      {simulate({"--plan", "fsdp2", "--precision", "fp32"}), "runtime=native"},
      {simulate({"--plan", "fsdp2:runtime=native,cp=3", "--nodes", "3", "--context", "6K"}),
       "runtime native divides the 32 attention heads"},
      {simulate({"--format", "jsn"}), "unknown format 'jsn'; did you mean 'json'?"},
      // Sizes.
      {simulate({"--context", "0"}), "context is '0': it must be greater than zero"},
      {simulate({"--context=-4096"}), "context is '-4096': it must be greater than zero"},
      {simulate({"--nodes", "-2"}), "nodes is '-2': it must be greater than zero"},
      {simulate({"--context", "99999999999999999999"}), "too large"},
      {simulate({"--context", "9223372036854775807"}), "context is"},
      {simulate({"--context", "12Q"}), "not a size"},
      {simulate({"--context", ""}), "context is ''"},
      {simulate({"--nodes", "1.5"}), "it must be a whole number"},
      {simulate({"--nodes", "1M"}), "nodes is 1048576: it must be 1 to 65536"},
      {simulate({"--gpus-per-node", "9"}), "gpus-per-node is 9: a node of h200 has 8"},
      {simulate({"--accumulate", "5000"}), "accumulate is 5000"},
      // Degrees.
      {simulate({"--nodes", "3", "--ulysses", "5"}),
       "does not divide the 24 GPUs; values that do: 1, 2, 4, 8"},
      {simulate({"--plan", "fsdp2:tp=3"}), "values that do"},
      {simulate({"--ep", "16", "--nodes", "2"}),
       "which does not divide the 8 experts; values that do: 1, 2, 4, 8"},
      {simulate({"--plan", "mop:head-chunks=3"}), "plan setting head-chunks is 3"},
      {simulate({"--plan", "fsdp2-best:tp=3"}), "plan setting tp is 3"},
      {simulate({"--plan", "mop:optimizer=hbm,optimizer-staged-layers=3"}),
       "optimizer-staged-layers is for optimizer=stream"},
      // What is said twice.
      {simulate({"--plan", "mop:ep=2", "--ep", "4"}), "ep stands in plan 'mop:ep=2' and as --ep"},
      {{"compare", "--model", "mixtral-8x7b", "--tokens-per-step", "128K", "--accumulate", "4", "--no-store"},
       "leave --accumulate out"},
      {{"compare", "--model", "mixtral-8x7b", "--tokens-per-step", "16G", "--no-store"},
       "micro-batches of 32K tokens for 16384M tokens a step, and 4096 is the most"},
      // Commands of their own.
      {{"compare", "--model", "mixtral-8x7b", "--plan", "fsdp2", "--ulysses", "4", "--no-store"},
       "ulysses belongs to mop, and no plan given is of that family"},
      {{"compare", "--model", "mixtral-8x7b", "--context", "8K..4K", "--no-store"}, "the range falls"},
      {{"compare", "--model", "mixtral-8x7b", "--context", "8K..20K", "--no-store"},
       "not reached by doubling"},
      {{"compare", "--model", "mixtral-8x7b", "--plan", "fsdp2", "--tokens-per-step", "10000", "--no-store"},
       "tokens-per-step 10000 is not a multiple of the 32K tokens"},
      {{"sweep", "--model", "mixtral-8x7b", "--nodes", "1,,2", "--no-store"}, "a value of the list is empty"},
      {{"sweep", "--model", "mixtral-8x7b", "--ulysses", "3,5", "--no-store"},
       "none of the 2 combinations is possible; the first: plan setting ulysses is 3"},
      {{"sweep", "--model", "mixtral-8x7b", "--resume", "--no-store"}, "--resume needs the database"},
      {{"sweep", "--model", "mixtral-8x7b", "--csv", "/nonexistent/rows.csv", "--no-store"},
       "CSV file '/nonexistent/rows.csv'"},
      {{"sweep", "--model", "mixtral-8x7b", "--jobs", "0"}, "--jobs"},
      {{"results"}, "results.db"},
      {{"results", "--db", ""}, "database"},
      {{"results", "--limit", "abc"}, "--limit = abc is not what the flag takes"},
      {{"validate", "--all=maybe"}, "--all = maybe is not what the flag takes"},
      {{"validate", "--bounds", "hbm=1%,hbm=2%"}, "bound hbm is given twice"},
      {{"sweep", "--model", "mixtral-8x7b", "--plan", "mop:ep=2", "--ep", "4", "--no-store"},
       "ep stands in plan 'mop:ep=2' and as --ep"},
  };
  const Folder folder;
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::PrintToString(c.args));
    expect_error(folder.mop(c.args), c.part);
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path())) << "bad input leaves nothing behind";
}

TEST(Error, ModelFile) {
  const Folder folder;
  const auto with_config = [&](const std::string& text) {
    folder.write("config.json", text);
    return folder.mop({"simulate", "--model", "config.json", "--no-store"});
  };
  expect_error(with_config("{"), "config.json");
  expect_error(with_config(""), "config.json");
  expect_error(with_config("\xff\xfe\x00garbage"), "config.json");
  expect_error(with_config(R"({"model_type": "mixtral"})"), "field 'num_hidden_layers' is missing");
  expect_error(with_config(R"({"model_type": "mixtrall"})"), "did you mean 'mixtral'?");
  expect_error(with_config(R"({"model_type": "mixtral", "num_hidden_layers": "many"})"), "num_hidden_layers");
  expect_error(folder.mop({"simulate", "--model", ".", "--cluster", "config.json", "--no-store"}),
               "config.json");
}

TEST(Error, DatabaseThatCannotBeWritten) {
  const Folder folder;
  std::filesystem::create_directory(folder.path() / "folder.db");
  folder.write("foreign.db",
               "this is not a database, it is the diary of somebody else, and a long one at that\n");
  SQLite::Database(folder.path() / "other.db", SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE)
      .exec("CREATE TABLE t(x)");
  const auto simulate_into = [&](const std::string& db) {
    return folder.mop({"simulate", "--model", "mixtral-8x7b", "--plan", "fsdp2", "--db", db});
  };
  expect_error(simulate_into("/nonexistent/results.db"), "/nonexistent");
  expect_error(simulate_into("folder.db"), "folder.db");
  expect_error(simulate_into("foreign.db"), "foreign.db");
  expect_error(simulate_into("other.db"), "other.db");
  EXPECT_THAT(folder.read("foreign.db"), HasSubstr("diary"));
}

TEST(Error, DatabaseThatIsLocked) {
  const Folder folder;
  ASSERT_EQ(folder.mop({"simulate", "--model", "mixtral-8x7b", "--plan", "fsdp2"}).status, 0);
  SQLite::Database other(folder.path() / "results.db", SQLite::OPEN_READWRITE);
  other.exec("BEGIN EXCLUSIVE");
  expect_error(folder.mop({"simulate", "--model", "mixtral-8x7b", "--plan", "fsdp2"}), "locked");
}

TEST(Error, FullDisk) {
  const Folder folder;
  const std::vector<std::string> one{"simulate", "--model", "tiny-mixtral", "--plan", "fsdp2"};
  ASSERT_EQ(folder.mop(one).status, 0);
  const auto before = std::filesystem::file_size(folder.path() / "results.db");
  // Answers go into the database until it may not grow any more.
  Ended ended = folder.mop(one);
  for (int context = 512; ended.status == 0 && context < 512 * 200; context += 512) {
    std::vector<std::string> next = one;
    next.insert(next.end(), {"--context", std::to_string(context)});
    ended = Process(next, folder.path(), before + 16384).wait();
  }
  expect_error(ended, "results.db");
  EXPECT_EQ(folder.mop({"results"}).status, 0) << "what was stored is still there";
  expect_error(
      folder.mop({"sweep", "--model", "tiny-mixtral", "--plan", "fsdp2", "--no-store", "--csv", "/dev/full"}),
      "CSV file '/dev/full' cannot be written: No space left on device");
}

TEST(Error, NoTimelineOfWhatDoesNotFit) {
  const Folder folder;
  const Ended ended =
      folder.mop({"simulate", "--model", "kimi-k2", "--plan", "fsdp2", "--no-store", "--trace", "t.json"});
  EXPECT_EQ(ended.status, 2);
  EXPECT_THAT(ended.err, HasSubstr("the plan does not fit"));
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "t.json"));
}

}  // namespace
}  // namespace mop::test
