#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "sim/base/error.h"
#include "sim/search/parallel.h"
#include "sim/search/settings.h"
#include "sim/search/sweep.h"

namespace mop::search {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const UserError& error) {
    return error.what();
  }
  return "no error";
}

predict::Scenario tiny() {
  predict::Scenario scenario;
  scenario.model = model::read_config("tiny-mixtral");
  scenario.cluster = cluster::read_cluster("h200");
  scenario.workload.context = 512;
  scenario.plan = parse_plan("fsdp2");
  return scenario;
}

TEST(Range, DoublesListsAndMixes) {
  EXPECT_THAT(expand_range("128K..1M", "context"), ElementsAre("128K", "256K", "512K", "1M"));
  EXPECT_THAT(expand_range("8..64", "ulysses"), ElementsAre("8", "16", "32", "64"));
  EXPECT_THAT(expand_range("3..12", "nodes"), ElementsAre("3", "6", "12"));
  EXPECT_THAT(expand_range("7..7", "nodes"), ElementsAre("7"));
  EXPECT_THAT(expand_range("4,8,12", "nodes"), ElementsAre("4", "8", "12"));
  EXPECT_THAT(expand_range("1,4..16", "nodes"), ElementsAre("1", "4", "8", "16"));
  EXPECT_THAT(expand_range("hbm,host", "checkpoints"), ElementsAre("hbm", "host"));
  EXPECT_THAT(expand_range("auto", "ep"), ElementsAre("auto"));
}

TEST(Range, Errors) {
  EXPECT_THAT(error_of([] { expand_range("", "nodes"); }), HasSubstr("nodes is ''"));
  EXPECT_THAT(error_of([] { expand_range("1,,2", "nodes"); }), HasSubstr("a value of the list is empty"));
  EXPECT_THAT(error_of([] { expand_range("8..4", "nodes"); }), HasSubstr("write 4..8"));
  EXPECT_THAT(error_of([] { expand_range("4..12", "nodes"); }), HasSubstr("12 is not reached by doubling 4"));
  EXPECT_THAT(error_of([] { expand_range("4..", "nodes"); }), HasSubstr("nodes is ''"));
  EXPECT_THAT(error_of([] { expand_range("0..4", "nodes"); }), HasSubstr("greater than zero"));
  EXPECT_THAT(error_of([] { expand_range("5..9000000000000000000", "nodes"); }), HasSubstr("not reached"));
}

TEST(Range, RoutingsKeepTheirOptions) {
  EXPECT_THAT(split_routings("balanced,zipf:1.2,seed=7,independent,hot:0.3@4"),
              ElementsAre("balanced", "zipf:1.2,seed=7,independent", "hot:0.3@4"));
}

TEST(Settings, SetWhatTheirNameSays) {
  predict::Scenario s = tiny();
  set(s, "context", "8K");
  set(s, "nodes", "3");
  set(s, "gpus-per-node", "4");
  set(s, "recompute", "none");
  EXPECT_EQ(s.workload.context, 8192);
  EXPECT_EQ(s.gpus(), 12);
  EXPECT_EQ(s.plan.recompute, plan::Recompute::none);
  EXPECT_EQ(s.workload.precision, plan::Precision::bf16);
  set(s, "precision", "fp32");
  EXPECT_EQ(s.workload.precision, plan::Precision::fp32);
  set(s, "precision", "bf16");
  EXPECT_EQ(s.workload.precision, plan::Precision::bf16);
  EXPECT_FALSE(s.workload.balance_loss);
  for (const bool on : {true, false}) {
    set(s, "balance-loss", on ? "on" : "off");
    EXPECT_EQ(s.workload.balance_loss, on);
  }
  EXPECT_THAT(error_of([&] { set(s, "precision", "fp8"); }), HasSubstr("it takes bf16 or fp32"));
  EXPECT_THAT(error_of([&] { set(s, "balance-loss", "maybe"); }), HasSubstr("it takes on or off"));
  EXPECT_THAT(error_of([&] { set(s, "recomput", "none"); }), HasSubstr("did you mean 'recompute'?"));
  EXPECT_THAT(error_of([&] { set(s, "ulysses", "2"); }), HasSubstr("belongs to mop"));
}

TEST(Settings, BestFsdp2LeavesAllThatCanBeOpen) {
  const plan::Plan best = parse_plan("fsdp2-best");
  EXPECT_FALSE(best.resolved());
  EXPECT_EQ(best.context, 0);
  EXPECT_EQ(best.expert, 0);
  EXPECT_EQ(best.tensor, 0);
  EXPECT_EQ(best.replicate, 0);
  EXPECT_EQ(best.recompute, plan::Recompute::automatic);
}

TEST(Sweep, LastAxisVariesFastest) {
  Sweep sweep{tiny(), {{"plan", {"fsdp2", "mop"}}, {"nodes", {"1", "2"}}, {"cp", {"1", "2", "4"}}}};
  ASSERT_EQ(count_points(sweep), 12u);
  EXPECT_EQ(point(sweep, 0).plan.context, 1);
  EXPECT_EQ(point(sweep, 1).plan.context, 2);
  EXPECT_EQ(point(sweep, 2).nodes, 1);
  EXPECT_EQ(point(sweep, 3).nodes, 2);
  EXPECT_EQ(point(sweep, 6).plan.family, plan::Family::mop);
  EXPECT_EQ(point(sweep, 7).plan.context, 1) << "a knob that the family lacks is left alone";
}

TEST(Sweep, ValuesAreReadBeforeAnythingRuns) {
  EXPECT_THAT(error_of([] {
                count_points({tiny(), {{"nodes", {"1", "many"}}}});
              }),
              HasSubstr("nodes is 'many'"));
  EXPECT_THAT(error_of([] {
                count_points({tiny(), {{"clip", {"on", "perhaps"}}}});
              }),
              HasSubstr("on or off"));
  const std::vector<std::string> many(1001, "1");
  EXPECT_THAT(error_of([&] {
                count_points({tiny(), {{"nodes", many}, {"sequences", many}}});
              }),
              HasSubstr("more than 1000000"));
}

TEST(Sweep, PrecisionAndBalanceLossAreAxesToo) {
  predict::Scenario base = tiny();
  base.plan = parse_plan("fsdp2:runtime=native");
  const Sweep sweep{base, {{"precision", {"bf16", "fp32"}}, {"balance-loss", {"off", "on"}}}};
  ASSERT_EQ(count_points(sweep), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(point(sweep, i).workload.precision == plan::Precision::fp32, i >= 2);
    EXPECT_EQ(point(sweep, i).workload.balance_loss, i % 2 == 1);
  }
}

TEST(Sweep, RunsEveryPointOnceAndSaysWhyNot) {
  const Sweep sweep{tiny(), {{"nodes", {"1", "2"}}, {"cp", {"1", "2", "3"}}}};
  const std::atomic<bool> stop = false;
  std::set<size_t> seen;
  size_t last_done = 0;
  run(
      count_points(sweep), 2, stop, [&](size_t i) { return point(sweep, i); },
      [&](std::vector<Outcome>&& finished, size_t done) {
        for (const Outcome& outcome : finished) {
          EXPECT_TRUE(seen.insert(outcome.index).second);
          EXPECT_EQ(outcome.prediction.has_value(), outcome.index % 3 != 2);
          EXPECT_EQ(outcome.why_not.find("cp is 3") != std::string::npos, outcome.index % 3 == 2);
        }
        last_done = done;
      });
  EXPECT_EQ(seen.size(), 6u);
  EXPECT_EQ(last_done, 6u);
}

TEST(Parallel, StopLeavesOutWhatHasNotBegun) {
  std::atomic<bool> stop = false;
  std::atomic<int> begun = 0;
  parallel(
      1000, 2, stop,
      [&](size_t) {
        if (++begun == 10) stop = true;
      },
      [] {});
  EXPECT_GE(begun, 10);
  EXPECT_LE(begun, 12);
}

TEST(Parallel, FailuresEndTheRest) {
  const std::atomic<bool> stop = false;
  std::atomic<int> begun = 0;
  EXPECT_THROW(parallel(
                   100000, 2, stop,
                   [&](size_t) {
                     if (++begun == 10) throw InternalError("broken");
                   },
                   [] {}),
               InternalError);
  EXPECT_LT(begun, 100000);
  EXPECT_THROW(parallel(
                   10, 2, stop, [](size_t) {}, [] { throw UserError("full"); }),
               UserError);
}

}  // namespace
}  // namespace mop::search
