// What commands print and store.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "sim/store/store.h"
#include "tests/cli/process.h"

namespace mop::test {
namespace {

using Json = nlohmann::ordered_json;
using ::testing::HasSubstr;

Json json_of(const Ended& ended) {
  EXPECT_EQ(ended.status, 0) << ended.err;
  return Json::parse(ended.out);
}

void expect_schema(const Json& j) {
  for (const char* text : {"model", "cluster", "calibration", "bound_by", "routing", "precision"})
    EXPECT_TRUE(j.at(text).is_string()) << text;
  for (const char* whole :
       {"nodes", "gpus", "context", "sequences", "accumulate", "hbm_allocated_bytes", "hbm_peak_bytes",
        "hbm_capacity_bytes", "host_peak_bytes", "host_capacity_bytes", "tokens_per_step", "ops_simulated"})
    EXPECT_TRUE(j.at(whole).is_number_integer()) << whole;
  EXPECT_TRUE(j.at("fits").is_boolean());
  EXPECT_TRUE(j.at("balance_loss").is_boolean());
  EXPECT_TRUE(j.at("plan").is_object());
  EXPECT_TRUE(j.at("plan").at("family").is_string());
  EXPECT_TRUE(j.at("plan").at("clip").is_boolean());
  EXPECT_TRUE(j.at("plan").at("ep").is_number_integer());
  EXPECT_TRUE(j.at("memory_by_component").is_object());
  EXPECT_TRUE(j.at("model_flops_per_token").is_number());
  EXPECT_TRUE(j.at("wall_time_s").is_number());
  for (const char* time : {"step_time_s", "tokens_per_s_per_gpu", "mfu", "exposed_communication_s"})
    EXPECT_TRUE(j.at("fits").get<bool>() ? j.at(time).is_number() : j.at(time).is_null()) << time;
  EXPECT_TRUE(j.at("fits").get<bool>() ? j.at("time_by_component").is_object()
                                       : j.at("time_by_component").is_null());
  int64_t memory = 0;
  for (const auto& [name, bytes] : j.at("memory_by_component").items()) memory += bytes.get<int64_t>();
  EXPECT_EQ(memory, j.at("hbm_peak_bytes").get<int64_t>());
}

TEST(Answer, PrecisionAndBalanceLossArePartOfTheQuestion) {
  const Folder folder;
  const auto ask = [&](const std::vector<std::string>& more, bool json) {
    std::vector<std::string> args{"simulate", "--model", "tiny-qwen3-moe", "--cluster", "h200x4",
                                  "--plan",   "fsdp2",   "--runtime",      "native"};
    args.insert(args.end(), more.begin(), more.end());
    if (json) args.insert(args.end(), {"--format", "json"});
    return folder.mop(args);
  };
  const Json plain = json_of(ask({}, true)),
             wide = json_of(ask({"--precision", "fp32", "--balance-loss", "on"}, true));
  EXPECT_EQ(plain.at("precision"), "bf16");
  EXPECT_EQ(plain.at("balance_loss"), false);
  EXPECT_EQ(wide.at("precision"), "fp32");
  EXPECT_EQ(wide.at("balance_loss"), true);
  EXPECT_GT(wide.at("hbm_allocated_bytes").get<int64_t>(), plain.at("hbm_allocated_bytes").get<int64_t>());
  EXPECT_THAT(ask({}, false).out, HasSubstr("balanced routing, bf16\n"));
  EXPECT_THAT(ask({"--precision", "fp32", "--balance-loss", "on"}, false).out,
              HasSubstr("balanced routing, fp32, balance loss\n"));
  // Two questions, each kept once.
  EXPECT_EQ(store::Store(folder.path() / "results.db", store::Access::kRead).query().size(), 2u);
}

TEST(Answer, JsonHasWhatWasPromised) {
  const Folder folder;
  const Json j = json_of(folder.mop({"simulate", "--model", "qwen3-30b-a3b", "--cluster", "h200x4", "--plan",
                                     "fsdp2:ep=4", "--loss-chunk", "2K", "--format", "json"}));
  expect_schema(j);
  EXPECT_EQ(j.at("model"), "qwen3-30b-a3b");
  EXPECT_EQ(j.at("gpus"), 4);
  EXPECT_EQ(j.at("tokens_per_step"), 4 * 4096);
  EXPECT_EQ(j.at("plan").at("ep"), 4);
  EXPECT_EQ(j.at("plan").at("loss-chunk"), 2048);
  EXPECT_FALSE(j.at("plan").contains("ulysses"));
  double time = 0;
  for (const auto& [name, seconds] : j.at("time_by_component").items()) time += seconds.get<double>();
  EXPECT_NEAR(time, j.at("step_time_s").get<double>(), 1e-6);

  // Stored as it was printed.
  const std::vector<store::RunRecord> records =
      store::Store(folder.path() / "results.db", store::Access::kRead).query();
  ASSERT_EQ(records.size(), 1u);
  EXPECT_EQ(Json::parse(records[0].detail), j);
  EXPECT_THAT(records[0].command, HasSubstr("mop simulate --model qwen3-30b-a3b"));
  const Json listed =
      json_of(folder.mop({"results", "--columns", "model,step_time_s,detail", "--format", "json"}));
  EXPECT_EQ(listed.at(0).at("detail"), j);
  EXPECT_EQ(listed.at(0).at("step_time_s"), j.at("step_time_s"));
}

TEST(Answer, OpenDegreesAreResolved) {
  const Folder folder;
  const Json j = json_of(folder.mop(
      {"simulate", "--model", "olmoe-1b-7b", "--gpus-per-node", "4", "--no-store", "--format", "json"}));
  expect_schema(j);
  for (const char* degree : {"ulysses", "ep", "vp", "dense-shard"})
    EXPECT_TRUE(j.at("plan").at(degree).is_number_integer()) << degree;
  EXPECT_EQ(j.at("plan").dump().find("auto"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "results.db"));
}

TEST(Answer, WithoutTimesWhenItDoesNotFit) {
  const Folder folder;
  const std::vector<std::string> args{"simulate", "--model", "kimi-k2", "--plan", "fsdp2", "--db", ""};
  std::vector<std::string> json = args;
  json.insert(json.end(), {"--format", "json"});
  const Json j = json_of(folder.mop(json));
  expect_schema(j);
  EXPECT_FALSE(j.at("fits").get<bool>());
  EXPECT_GT(j.at("hbm_peak_bytes"), j.at("hbm_capacity_bytes"));
  EXPECT_THAT(j.at("why_not").get<std::string>(), HasSubstr("too much"));
  EXPECT_THAT(folder.mop(args).out, HasSubstr("no: HBM needs"));
}

TEST(Answer, SameBytesTwice) {
  const Folder folder;
  const auto answer = [&] {
    Json j =
        json_of(folder.mop({"compare", "--model", "mixtral-8x7b", "--context", "8K,16K", "--ulysses", "4",
                            "--ep", "8", "--routing", "zipf:1.1,seed=3", "--no-store", "--format", "json"}));
    for (Json& row : j) row.erase("wall_time_s");
    return j.dump();
  };
  EXPECT_EQ(answer(), answer());
}

// More micro-batches hold gradients between them: a plan chosen for one of them would not fit.
TEST(Compare, PlansAreChosenForTheMicroBatchesThatTheyTrainOn) {
  const Folder folder;
  const Json rows = json_of(
      folder.mop({"compare", "--model", "gpt-oss-120b", "--nodes", "2", "--context", "512K", "--windows",
                  "off", "--plan", "mop", "--plan", "fsdp2-best", "--no-store", "--format", "json"}));
  int64_t most = 0;
  for (const Json& row : rows) {
    EXPECT_TRUE(row.at("fits")) << row.dump();
    most = std::max<int64_t>(most, row.at("accumulate"));
  }
  EXPECT_GT(most, 1);
}

TEST(Answer, UnfoldedIsTheSame) {
  const Folder folder;
  std::vector<std::string> args{"simulate",  "--model", "mixtral-8x7b", "--plan",   "fsdp2:ep=8",
                                "--routing", "zipf:1",  "--no-store",   "--format", "json"};
  const Json folded = json_of(folder.mop(args));
  args.emplace_back("--unfold");
  const Json unfolded = json_of(folder.mop(args));
  EXPECT_EQ(folded.at("step_time_s"), unfolded.at("step_time_s"));
  EXPECT_EQ(unfolded.at("rank_classes"), 8);
}

TEST(Answer, CompareIsAtEqualTokens) {
  const Folder folder;
  const std::vector<std::string> args{
      "compare",    "--model", "mixtral-8x7b",       "--context",  "8K..16K",  "--plan",
      "fsdp2:ep=8", "--plan",  "mop:ulysses=4,ep=8", "--no-store", "--format", "json"};
  const Json equal = json_of(folder.mop(args));
  ASSERT_EQ(equal.size(), 4u);
  for (const Json& row : equal) expect_schema(row);
  EXPECT_EQ(equal[0].at("tokens_per_step"), 8 * 8192);
  EXPECT_EQ(equal[1].at("tokens_per_step"), 8 * 8192);
  EXPECT_EQ(equal[1].at("accumulate"), 4);
  EXPECT_EQ(equal[3].at("context"), 16384);

  std::vector<std::string> more = args;
  more.insert(more.end(), {"--tokens-per-step", "256K"});
  for (const Json& row : json_of(folder.mop(more))) EXPECT_EQ(row.at("tokens_per_step"), 256 * 1024);
  more = args;
  more.emplace_back("--unequal-tokens");
  EXPECT_EQ(json_of(folder.mop(more))[1].at("tokens_per_step"), 2 * 8192);
}

TEST(Answer, CompareTable) {
  const Folder folder;
  const Ended ended = folder.mop({"compare", "--model", "mixtral-8x7b", "--gpus-per-node", "4", "--plan",
                                  "fsdp2-best", "--plan", "fsdp2:ep=4", "--db", "here.db"});
  EXPECT_EQ(ended.status, 0) << ended.err;
  EXPECT_THAT(ended.out, HasSubstr("tokens/s/GPU"));
  EXPECT_THAT(ended.out, HasSubstr("fsdp2-best"));
  EXPECT_THAT(folder.mop({"results", "--db", "here.db"}).out, HasSubstr("2 records"));
}

TEST(Answer, ClustersAndCalibrations) {
  const Folder folder;
  for (const char* cluster : {"h200", "h200-1tb", "h200-efa", "h200-half-network", "h200x4"}) {
    SCOPED_TRACE(cluster);
    expect_schema(json_of(folder.mop({"simulate", "--model", "olmoe-1b-7b", "--cluster", cluster, "--plan",
                                      "fsdp2", "--no-store", "--format", "json"})));
    const Json shown = json_of(folder.mop({"show", "cluster", "--cluster", cluster, "--format", "json"}));
    for (const auto& [name, figure] : shown.at("figures").items()) {
      EXPECT_THAT(figure.at("source").get<std::string>(),
                  ::testing::AnyOf("measured", "published", "assumed"))
          << name;
      EXPECT_NE(figure.at("where"), "") << name;
    }
  }
  for (const char* calibration : {"measured", "paper"})
    EXPECT_EQ(json_of(folder.mop({"simulate", "--model", "olmoe-1b-7b", "--plan", "fsdp2", "--no-store",
                                  "--format", "json", "--calibration", calibration}))
                  .at("calibration"),
              calibration);
}

TEST(Answer, ShowModel) {
  const Folder folder;
  const Json j = json_of(folder.mop({"show", "model", "--model", "mixtral-8x7b", "--format", "json"}));
  EXPECT_EQ(j.at("parameters_total"), 46702792704);
  int64_t total = 0, active = 0;
  double flops = 0;
  for (const auto& [name, n] : j.at("parameters_by_component").items()) total += n.get<int64_t>();
  for (const auto& [name, n] : j.at("active_by_component").items()) active += n.get<int64_t>();
  for (const auto& [name, n] : j.at("flops_by_component").items()) flops += n.get<double>();
  EXPECT_EQ(total, j.at("parameters_total"));
  EXPECT_EQ(active, j.at("parameters_active"));
  EXPECT_DOUBLE_EQ(flops, j.at("flops_per_token").get<double>());
  EXPECT_GT(j.at("parameters_active"), j.at("parameters_active_without_embedding"));
  EXPECT_THAT(folder.mop({"show", "model", "--model", "mixtral-8x7b"}).out, HasSubstr("46,702,792,704"));
}

TEST(Answer, ShowPlanAndProgram) {
  const Folder folder;
  const std::vector<std::string> scenario{"--model", "mixtral-8x7b",    "--nodes",  "2",
                                          "--plan",  "fsdp2:ep=8,cp=2", "--format", "json"};
  std::vector<std::string> args{"show", "plan"};
  args.insert(args.end(), scenario.begin(), scenario.end());
  const Json plan = json_of(folder.mop(args));
  EXPECT_EQ(plan.at("groups").at("dense"),
            (Json{{"size", 16}, {"stride", 1}, {"per_node", 8}, {"nodes", 2}}));
  EXPECT_EQ(plan.at("groups").at("context").at("size"), 2);
  EXPECT_EQ(plan.at("sequence_groups"), 8);

  args[1] = "program";
  args.insert(args.end(), {"--ops", "--buffers"});
  const Json program = json_of(folder.mop(args));
  EXPECT_EQ(program.at("ops").size(), program.at("operations"));
  EXPECT_EQ(program.at("buffer_list").size(), program.at("buffers"));
  for (const char* sums : {"by_kind", "by_stream", "by_phase"}) {
    int64_t operations = 0;
    for (const auto& [name, sum] : program.at(sums).items())
      operations += sum.at("operations").get<int64_t>();
    EXPECT_EQ(operations, program.at("operations")) << sums;
  }
}

TEST(Answer, ResultsAreQueried) {
  const Folder folder;
  for (const char* context : {"4K", "8K"})
    ASSERT_EQ(
        folder.mop({"simulate", "--model", "olmoe-1b-7b", "--plan", "fsdp2", "--context", context}).status,
        0);
  EXPECT_THAT(folder.mop({"results"}).out, HasSubstr("2 records"));
  EXPECT_THAT(folder.mop({"results", "--where", "context>=8K", "fits=1"}).out, HasSubstr("1 record\n"));
  const Json j = json_of(
      folder.mop({"results", "--order=-context", "--limit", "1", "--format", "json", "--columns", "all"}));
  ASSERT_EQ(j.size(), 1u);
  EXPECT_EQ(j[0].at("context"), 8192);
  EXPECT_TRUE(folder.mop({"results", "--format", "csv", "--columns", "model,context"})
                  .out.starts_with("model,context\nolmoe-1b-7b,4096\n"));
}

}  // namespace
}  // namespace mop::test
