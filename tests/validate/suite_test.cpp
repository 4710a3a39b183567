#include "sim/validate/suite.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "sim/base/paths.h"
#include "sim/predict/predict.h"
#include "sim/search/planner.h"
#include "tests/error_of.h"

namespace mop::validate {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

struct Suite : ::testing::Test {
  Suite() {
    std::string pattern = (std::filesystem::temp_directory_path() / "mop-suite-XXXXXX").string();
    folder = ::mkdtemp(pattern.data());
  }
  ~Suite() override { std::filesystem::remove_all(folder); }
  std::vector<SuiteRun> read(const std::string& text) const {
    std::ofstream(folder / "suite.toml") << text;
    return read_suite((folder / "suite.toml").string());
  }
  std::filesystem::path folder;
};

const char* const kTwo =
    "data = \"t.bin\"\nsteps = 6\nmodel = \"olmoe-1b-7b\"\ncluster = \"h200x4\"\n"
    "[first]\ngpus = 2\ncontext = \"8K\"\nplan = \"fsdp2:cp=2\"\n"
    "[second]\nheld-out = true\ngpus = 4\nsteps = 3\nplan = \"mop:ulysses=1\"\nep = 2\n";

TEST_F(Suite, RunsHaveTheCommonKeysAndTheirOwn) {
  const std::vector<SuiteRun> runs = read(kTwo);
  ASSERT_EQ(runs.size(), 2U);
  EXPECT_EQ(runs[0].label(), "first");
  EXPECT_EQ(runs[0].steps, 6);
  EXPECT_EQ(runs[0].scenario.gpus(), 2);
  EXPECT_EQ(runs[0].scenario.workload.context, 8192);
  EXPECT_TRUE(runs[0].scenario.plan.native());
  EXPECT_EQ(runs[1].label(), "held-out/second");
  EXPECT_EQ(runs[1].steps, 3);
  EXPECT_EQ(runs[1].scenario.plan.expert, 2);
  EXPECT_EQ(parse_label(runs[0].label()), std::pair(std::string("first"), false));
  EXPECT_EQ(parse_label(runs[1].label()), std::pair(std::string("second"), true));
}

TEST_F(Suite, CommandsAreALineARun) {
  const std::string script = commands(read(kTwo), "r.db", "t");
  EXPECT_THAT(
      script,
      HasSubstr("\nmop run --data t.bin --steps 6 --model olmoe-1b-7b --cluster h200x4 --gpus 2 --context 8K "
                "--plan fsdp2:cp=2 --db r.db --label first --trace t/first.trace.json\n"));
  EXPECT_THAT(
      script,
      HasSubstr(
          "--steps 3 --model olmoe-1b-7b --cluster h200x4 --gpus 4 --plan mop:ulysses=1 --ep 2 --db r.db "
          "--label held-out/second --trace t/second.trace.json\n"));
  EXPECT_THAT(script, Not(HasSubstr("on_nodes")));
}

TEST_F(Suite, EmulatedNodesStartTheirRanksThemselves) {
  const std::string script = commands(read("[n]\nmodel = \"olmoe-1b-7b\"\ncluster = "
                                           "\"scenarios/validation/clusters/h200-2x2.json\"\ngpus = 4\n"),
                                      "r.db", "t");
  EXPECT_THAT(script, HasSubstr("NCCL_HOSTID=node$node"));
  EXPECT_THAT(script, HasSubstr("\non_nodes 2 2 mop run --model olmoe-1b-7b --cluster"));
  EXPECT_THAT(script, Not(HasSubstr("--gpus")));
}

TEST_F(Suite, SaysWhatIsWrongAndWhere) {
  EXPECT_THAT(error_of([] { read_suite("/nowhere.toml"); }), HasSubstr("no such file"));
  EXPECT_THAT(error_of([&] { read("data = \"x\"\n"); }), HasSubstr("declares no run"));
  EXPECT_THAT(error_of([&] { read("[a]\ngpus = 1\n"); }), HasSubstr("run a: no model is given"));
  EXPECT_THAT(error_of([&] { read("[a]\nmodle = \"olmoe-1b-7b\"\n"); }),
              HasSubstr("run a: unknown key 'modle'; did you mean 'model'?"));
  EXPECT_THAT(error_of([&] { read("[a]\nmodel = \"olmoe-1b-7b\"\nheld-out = \"maybe\"\n"); }),
              HasSubstr("write true or false"));
  EXPECT_THAT(error_of([&] { read("[a]\nmodel = \"olmoe-1b-7b\"\ngpus = 12\n"); }),
              HasSubstr("neither a part nor a multiple"));
  EXPECT_THAT(error_of([&] { read("[a]\nmodel = \"olmoe-1b-7b\"\ngpus = 2\nep = 3\n"); }),
              HasSubstr("run a: "));
  EXPECT_THAT(
      error_of([&] {
        read("[a]\nmodel = \"olmoe-1b-7b\"\n[b]\nmodel = \"olmoe-1b-7b\"\n[a]\nmodel = \"olmoe-1b-7b\"\n");
      }),
      HasSubstr("stands twice"));
}

// What the validation suite promises: enough runs, of all sorts, a third of them held out, and all of them
// fit.
TEST(ShippedSuite, CoversWhatItMust) {
  const std::vector<SuiteRun> runs = read_suite((data_home() / "scenarios/validation/suite.toml").string());
  EXPECT_GE(runs.size(), 40U);
  EXPECT_GE(3 * std::ranges::count_if(runs, &SuiteRun::held_out), std::ssize(runs));
  std::set<std::string> models, families;
  std::set<int64_t> gpus;
  int64_t shortest = 1 << 30, longest = 0, nodes = 1;
  double seconds = 0;
  for (const SuiteRun& run : runs) {
    predict::Scenario s = run.scenario;
    s.plan = search::choose(s);
    const predict::Prediction p = predict::predict(s);
    EXPECT_TRUE(p.fits) << run.name << ": " << p.why_not;
    EXPECT_TRUE(s.plan.native()) << run.name;
    seconds += p.step_time.value_or(0) * static_cast<double>(run.steps);
    models.insert(s.model.name);
    families.insert(plan::family_name(s.plan.family));
    gpus.insert(run.gpus);
    shortest = std::min(shortest, s.workload.context);
    longest = std::max(longest, s.workload.context);
    nodes = std::max(nodes, s.nodes);
  }
  EXPECT_THAT(models, ::testing::IsSupersetOf({"qwen3-30b-a3b", "gpt-oss-20b", "olmoe-1b-7b"}));
  EXPECT_GE(models.size(), 4U);
  EXPECT_EQ(families.size(), 2U);
  EXPECT_THAT(gpus, ::testing::IsSupersetOf({1, 2, 4}));
  EXPECT_EQ(nodes, 2);
  EXPECT_EQ(shortest, 2048);
  EXPECT_EQ(longest, 256 * 1024);
  EXPECT_LT(seconds, 1800);  // half an hour of all kinds of host; starts take as long
}

}  // namespace
}  // namespace mop::validate
