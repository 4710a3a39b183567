// mop validate, mop what-if and mop results --compare: on a run of the CPU backend, and on records of GPUs
// made from it, whose errors are known.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "sim/base/paths.h"
#include "sim/store/store.h"
#include "tests/cli/process.h"

namespace mop::test {
namespace {

using nlohmann::json;
using store::RunRecord;
using ::testing::HasSubstr;
using ::testing::Not;

struct Errors {  // of the prediction to come, relative to the measurement
  double step = 0, hbm = 0;
};

class Validate : public ::testing::Test {
 protected:
  Validate() {
    std::string text;
    for (int i = 0; i < 300; ++i)
      text += "the quick brown fox jumps over the lazy dog " + std::to_string(i) + ".\n";
    folder.write("text.txt", text);
  }
  // Returns its id.
  int64_t run(const std::string& label, const std::string& plan = "mop",
              std::vector<std::string> more = {}) const {
    std::vector<std::string> args{
        "run",       "--model", "tiny-qwen3-moe", "--data", "text.txt", "--ranks", "2",       "--steps", "2",
        "--context", "64",      "--cluster",      "h200x4", "--plan",   plan,      "--label", label};
    args.insert(args.end(), more.begin(), more.end());
    const Ended ended = folder.mop(args);
    EXPECT_EQ(ended.status, 0) << ended.err;
    return *records({"kind=measurement"}).back().id;
  }
  std::vector<RunRecord> records(std::vector<std::string> where) const {
    return store::Store(folder.path() / "results.db", store::Access::kRead)
        .query({.where = std::move(where)});
  }
  Ended validate(std::vector<std::string> more) const {
    more.insert(more.begin(), "validate");
    return folder.mop(more);
  }
  json answer(std::vector<std::string> more, int status) const {
    more.insert(more.end(), {"--format", "json"});
    const Ended ended = validate(more);
    EXPECT_EQ(ended.status, status) << ended.err;
    return json::parse(ended.out);
  }
  // A measurement on GPUs of what `id` ran, with these errors.
  int64_t on_gpus(int64_t id, const std::string& label, Errors errors) const {
    RunRecord record = records({"id=" + std::to_string(id)}).at(0);
    json detail = json::parse(record.detail);
    detail["backend"] = "cuda";
    detail["data"] = "probe";
    record.cluster = "gpus";
    record.label = "probe";
    record.detail = detail.dump();
    store::Store store(folder.path() / "results.db", store::Access::kWrite);
    store.insert(record);
    const json predicted = answer({"--where", "label=probe", "--bounds",
                                   "hbm=1e9,step-mean=1e9,step-worst=1e9,op=1e9,ratio=1e9,ranking=1e9"},
                                  0)["runs"]
                               .back();
    record.label = label;
    detail["data"] = label;
    record.step_time_s = predicted["predicted_step_time_s"].get<double>() / (1 + errors.step);
    record.hbm_peak_bytes =
        static_cast<int64_t>(predicted["predicted_hbm_peak_bytes"].get<double>() / (1 + errors.hbm));
    detail.erase("operations");  // the CPU's times
    record.detail = detail.dump();
    store.insert(record);
    return *records({"kind=measurement"}).back().id;
  }
  static json bound(const json& answer, const std::string& name) {
    for (const json& one : answer["bounds"])
      if (one["name"] == name) return one;
    return {};
  }
  Folder folder;
};

TEST_F(Validate, ARunOfTheCpuBackendHoldsMemoryAndExplainsItsTime) {
  const int64_t id = run("here", "mop:ep=1");
  const json all = answer({}, 0);
  ASSERT_EQ(all["runs"].size(), 1U);
  const json& one = all["runs"][0];
  EXPECT_EQ(one["id"], id);
  EXPECT_EQ(one["label"], "here");
  EXPECT_EQ(one["backend"], "cpu");
  EXPECT_EQ(one["hbm_error"], 0);
  EXPECT_EQ(bound(all, "hbm")["holds"], true);
  EXPECT_TRUE(bound(all, "step-mean")["holds"].is_null());  // not tested
  // The run did what the program says: every kind of operation as often as predicted, times that add up to
  // the step.
  double compute = 0;
  std::set<std::string> names;
  for (const json& op : one["operations"]) {
    names.insert(op["name"]);
    if (op["stream"] == "compute" || op["stream"] == "") compute += op["measured_s"].get<double>();
    EXPECT_EQ(op["measured_count"], op["predicted_count"]) << op;
  }
  EXPECT_NEAR(compute, one["profiled_step_s"].get<double>(), 1e-9);
  for (const char* name : {"attention gemm", "experts grouped_gemm", "attention attention_bwd"})
    EXPECT_TRUE(names.contains(name)) << name;

  const Ended text = validate({});
  EXPECT_EQ(text.status, 0);
  EXPECT_THAT(text.out, HasSubstr("operations that explain most"));
  EXPECT_THAT(text.out, HasSubstr("times are not judged"));
  EXPECT_THAT(text.out, HasSubstr("the fullest expert had"));
}

TEST_F(Validate, ExitStatusSaysWhetherBoundsHold) {
  const int64_t id = run("cpu");
  on_gpus(id, "good", {0.02, 0.005});
  EXPECT_EQ(validate({"--where", "label=good"}).status, 0);
  on_gpus(id, "slow", {-0.13, 0});
  const json slow = answer({"--where", "label=slow"}, 3);
  EXPECT_EQ(slow["holds"], false);
  EXPECT_NEAR(bound(slow, "step-worst")["value"].get<double>(), 0.13, 1e-9);
  EXPECT_EQ(bound(slow, "step-worst")["holds"], false);
  EXPECT_EQ(bound(slow, "hbm")["holds"], true);
  EXPECT_EQ(validate({"--where", "label=slow", "--bounds", "step-mean=14,step-worst=14%"}).status, 0);
  on_gpus(id, "large", {0, 0.02});
  const Ended large = validate({"--where", "label=large"});
  EXPECT_EQ(large.status, 3);
  EXPECT_THAT(large.out, HasSubstr("BROKEN"));
  EXPECT_EQ(large.err, "");
}

// That of the host that the runs were made on, where another has taken the name since.
TEST_F(Validate, PredictsWithAnotherClusterWhereAsked) {
  on_gpus(run("cpu"), "good", {0, 0});
  const auto predicted = [&](const std::vector<std::string>& more, int status) {
    std::vector<std::string> arguments{"--where", "label=good"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return answer(arguments, status)["runs"][0]["predicted_step_time_s"].get<double>();
  };
  json slow{{"base", (data_home() / "hwmodels/h200x4").string()}, {"description", "slow"}};
  for (const char* name : {"kernel_ns", "native_kernel_ns"})
    slow["figures"][name] = {{"value", 1e6}, {"source", "assumed"}, {"where", "made up"}};
  folder.write("slow.json", slow.dump());
  EXPECT_GT(predicted({"--cluster", "slow.json"}, 3), 2 * predicted({}, 0));
  json detail = json::parse(records({"label=good"}).back().detail);
  detail["question"]["cluster"] = "gone";
  store::RunRecord moved = records({"label=good"}).back();
  moved.label = "moved", moved.detail = detail.dump();
  store::Store(folder.path() / "results.db", store::Access::kWrite).insert(moved);
  EXPECT_EQ(answer({"--where", "label=moved"}, 3)["runs"][0]["why_not"].is_string(), true);
  EXPECT_EQ(answer({"--where", "label=moved", "--cluster", "slow.json"}, 3)["runs"][0]["cluster"], "slow");
  const Ended unknown = validate({"--cluster", "slwo.json"});
  EXPECT_EQ(unknown.status, 2);
  EXPECT_THAT(unknown.err, HasSubstr("slwo.json"));
}

TEST_F(Validate, HeldOutIsWhatTheLabelSaidAndTheFileDeclares) {
  const int64_t id = run("cpu");
  on_gpus(id, "held-out/a", {0.04, 0});
  on_gpus(id, "b", {0.3, 0});   // not held out: step times are not judged
  on_gpus(id, "c", {0.01, 0});  // declared only later
  const std::string keys = "model = \"tiny-qwen3-moe\"\n";
  folder.write("suite.toml", "[a]\nheld-out = true\n" + keys + "[b]\n" + keys + "[c]\nheld-out = true\n" +
                                 keys + "[d]\n" + keys);
  const json all = answer({"--suite", "suite.toml"}, 0);
  EXPECT_EQ(all["runs"].size(), 3U);  // neither the probe nor the run on the CPU
  EXPECT_EQ(all["not_measured"], json({"d"}));
  EXPECT_EQ(all["declared_late"], json({"c"}));
  EXPECT_EQ(all["step_errors"]["held_out"]["runs"], 1);
  EXPECT_NEAR(all["step_errors"]["held_out"]["worst"].get<double>(), 0.04, 1e-9);
  EXPECT_EQ(all["step_errors"]["all"]["runs"], 3);
  EXPECT_NEAR(all["step_errors"]["all"]["worst"].get<double>(), 0.3, 1e-9);
  // Without a file the labels say it; with one that takes it back, none is held out.
  EXPECT_EQ(answer({"--where", "label=held-out/a"}, 0)["runs"][0]["held_out"], true);
  folder.write("none.toml", "[a]\n" + keys);
  EXPECT_EQ(answer({"--where", "label=held-out/a", "--held-out", "none.toml"}, 0)["runs"][0]["held_out"],
            false);
}

TEST_F(Validate, TheNewestOfASuitesRunCounts) {
  const int64_t id = run("cpu");
  on_gpus(id, "a", {0.3, 0});
  on_gpus(id, "a", {0.03, 0});
  folder.write("suite.toml", "[a]\nmodel = \"tiny-qwen3-moe\"\n");
  EXPECT_NEAR(answer({"--suite", "suite.toml"}, 0)["runs"].at(0)["step_error"].get<double>(), 0.03, 1e-9);
  EXPECT_EQ(answer({"--suite", "suite.toml", "--all"}, 3)["runs"].size(), 2U);
}

TEST_F(Validate, PlansOfOneQuestionAreRankedAndCompared) {
  const int64_t mop = run("m", "mop:ulysses=1"), fsdp2 = run("f", "fsdp2");
  on_gpus(mop, "mop", {0, 0});
  on_gpus(fsdp2, "fsdp2", {0.04, 0});
  const std::vector<std::string> chosen{"--where", "cluster=gpus", "label!=probe"};
  const json close = answer(chosen, 0);
  ASSERT_EQ(close["plan_sets"].size(), 1U);
  EXPECT_NEAR(bound(close, "ratio")["value"].get<double>(), 1 - 1 / 1.04, 1e-9);
  EXPECT_EQ(bound(close, "ranking")["value"], 0);
  on_gpus(fsdp2, "fsdp2", {0.08, 0});
  EXPECT_EQ(bound(answer(chosen, 3), "ratio")["holds"], false);
}

// As of several hosts: the last one's of a suite's run.
TEST_F(Validate, SeveralDatabasesAreJudgedTogether) {
  const int64_t id = run("here", "mop:ep=1");
  on_gpus(id, "a", {0.03, 0});
  std::filesystem::copy(folder.path() / "results.db", folder.path() / "other.db");
  on_gpus(id, "a", {0.04, 0});
  on_gpus(id, "b", {0.02, 0});
  const std::vector<std::string> both{"--db", "other.db", "results.db"};
  std::vector<std::string> all = both;
  all.insert(all.end(), {"--where", "cluster=gpus", "label!=probe"});
  const json runs = answer(all, 0)["runs"];
  ASSERT_EQ(runs.size(), 3U);
  EXPECT_EQ(runs[0]["database"], "other.db");
  EXPECT_EQ(runs[0]["label"], "a");
  EXPECT_EQ(runs[1]["database"], "results.db");
  EXPECT_EQ(runs[1]["label"], "a");
  EXPECT_EQ(runs[2]["label"], "b");
  EXPECT_THAT(validate(all).out, HasSubstr("other.db"));

  folder.write("suite.toml", "[a]\nmodel = \"tiny-qwen3-moe\"\n[b]\nmodel = \"tiny-qwen3-moe\"\n");
  std::vector<std::string> suite = both;
  suite.insert(suite.end(), {"--suite", "suite.toml"});
  const json judged = answer(suite, 0);
  ASSERT_EQ(judged["runs"].size(), 2U);
  for (const json& one : judged["runs"]) EXPECT_EQ(one["database"], "results.db");
  EXPECT_EQ(judged["not_measured"].size(), 0U);
  const json first = answer({"--db", "other.db", "--suite", "suite.toml"}, 0);
  EXPECT_EQ(first["not_measured"], json({"b"}));

  const Ended none = validate({"--db", "results.db", "missing.db"});
  EXPECT_EQ(none.status, 2);
  EXPECT_THAT(none.err, HasSubstr("missing.db"));
}

TEST_F(Validate, ARunThatSeveralDatabasesHaveCountsOnce) {
  const int64_t id = run("here", "mop:ep=1");
  on_gpus(id, "a", {0.03, 0});
  on_gpus(id, "b", {0.02, 0});
  std::filesystem::copy(folder.path() / "results.db", folder.path() / "copy.db");
  const std::vector<std::string> where{"--where", "cluster=gpus", "label!=probe"};
  std::vector<std::string> one{"--db", "copy.db"}, two{"--db", "results.db", "copy.db"};
  one.insert(one.end(), where.begin(), where.end());
  two.insert(two.end(), where.begin(), where.end());
  EXPECT_EQ(answer(two, 0)["bounds"], answer(one, 0)["bounds"]);
  EXPECT_EQ(answer(two, 0)["runs"].size(), 2U);
  EXPECT_THAT(validate(two).err, HasSubstr("2 measurements are in several of the databases, and count once"));
}

TEST_F(Validate, BothTimelinesInOneFile) {
  const int64_t id = run("traced", "mop", {"--trace", "m.json"});
  const std::string where = "id=" + std::to_string(id);
  const Ended ended = validate({"--where", where, "--trace", "both.json"});
  ASSERT_EQ(ended.status, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("both timelines in both.json"));
  std::set<std::string> titles;
  std::map<int, std::set<std::string>> operations;  // by process
  const json events = json::parse(folder.read("both.json")).at("traceEvents");
  for (const json& event : events) {
    if (event["name"] == "process_name") titles.insert(event["args"]["name"]);
    if (event["ph"] == "X") operations[event["pid"]].insert(event["name"]);
  }
  EXPECT_EQ(titles, (std::set<std::string>{
                        "rank 0, tiny-qwen3-moe mop, measured", "rank 1, tiny-qwen3-moe mop, measured",
                        "rank 0, tiny-qwen3-moe mop, predicted",
                        "rank 1, tiny-qwen3-moe mop, predicted"}));  // GPUs with clocks of their own
  ASSERT_EQ(operations.size(), 4U);
  EXPECT_EQ(operations[0], operations[2]);  // the same program
  EXPECT_EQ(json::parse(folder.read("m.json")).at("traceEvents").empty(), false);

  // Carried away with its database, from another folder.
  std::filesystem::create_directory(folder.path() / "away");
  const int64_t elsewhere = run("elsewhere", "mop", {"--trace", folder.path() / "away" / "kept.json"});
  std::filesystem::rename(folder.path() / "away" / "kept.json", folder.path() / "kept.json");
  EXPECT_EQ(validate({"--where", "id=" + std::to_string(elsewhere), "--trace", "both.json"}).status, 0);

  const Ended itself = validate({"--where", where, "--trace", "m.json"});
  EXPECT_EQ(itself.status, 2);
  EXPECT_THAT(itself.err, HasSubstr("is the measured timeline itself"));
  std::filesystem::remove(folder.path() / "m.json");
  const Ended gone = validate({"--where", where, "--trace", "both.json"});
  EXPECT_EQ(gone.status, 2);
  EXPECT_THAT(gone.err, HasSubstr("neither here nor beside 'results.db'"));
  const int64_t untraced = run("untraced");
  EXPECT_THAT(validate({"--trace", "both.json"}).err, HasSubstr("3 are chosen; add --where id=N"));
  EXPECT_THAT(validate({"--where", "id=" + std::to_string(untraced), "--trace", "both.json"}).err,
              HasSubstr("kept no timeline"));
}

TEST_F(Validate, SaysWhatIsWrong) {
  run("here");
  for (const auto& [args, part] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"--where", "model=gpt-oss-20b"}, "no measurement in 'results.db' meets the conditions"},
           {{"--db", "nowhere.db"}, "nowhere.db"},
           {{"--bounds", "hbm"}, "no percentage"},
           {{"--suite", "nowhere.toml"}, "suite 'nowhere.toml': no such file"},
           {{"--commands"}, "--suite"},
           {{"--format", "csv"}, "unknown format 'csv'"}}) {
    const Ended ended = validate(args);
    EXPECT_EQ(ended.status, 2) << testing::PrintToString(args);
    EXPECT_THAT(ended.err, HasSubstr(part));
  }
}

TEST_F(Validate, PrintsTheCommandsOfASuite) {
  folder.write("suite.toml", "steps = 6\n[a]\nheld-out = true\nmodel = \"tiny-qwen3-moe\"\n");
  const Ended ended = validate({"--suite", "suite.toml", "--commands", "--db", "v.db"});
  EXPECT_EQ(ended.status, 0);
  EXPECT_THAT(ended.out, HasSubstr("mop run --steps 6 --model tiny-qwen3-moe --db v.db --label held-out/a "
                                   "--trace traces/a.trace.json\n"));
  EXPECT_THAT(validate({"--suite", "suite.toml", "--check"}).out, HasSubstr("1 runs, 1 of them held out"));
}

TEST_F(Validate, OnlyRunsThatAreMissingOrOfSoManyGpus) {
  const std::string keys = "model = \"tiny-qwen3-moe\"\n";
  folder.write("suite.toml", "[a]\n" + keys + "[b]\ngpus = 2\n" + keys + "[c]\n" + keys);
  const auto labels = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"--suite", "suite.toml", "--commands"});
    const std::string out = validate(more).out;
    std::string found;
    for (const char* name : {"a", "b", "c"})
      if (out.find(std::string("--label ") + name + " ") != std::string::npos) found += name;
    return found;
  };
  EXPECT_EQ(labels({"--missing"}), "abc");  // nothing has been stored yet
  on_gpus(run("cpu"), "a", {0.01, 0});
  EXPECT_EQ(labels({}), "abc");
  EXPECT_EQ(labels({"--missing"}), "bc");
  EXPECT_EQ(labels({"--gpus", "2"}), "b");
  EXPECT_EQ(labels({"--gpus", "1", "--missing"}), "c");
  EXPECT_THAT(validate({"--suite", "suite.toml", "--missing", "--check"}).out, HasSubstr("2 runs"));
  const Ended judged = validate({"--suite", "suite.toml", "--missing"});
  EXPECT_EQ(judged.status, 2);
  EXPECT_THAT(judged.err, HasSubstr("--check or --commands"));
}

TEST_F(Validate, ResultsShowPredictionAndMeasurementSideBySide) {
  const int64_t id = run("here");
  on_gpus(id, "fast", {0.25, 0.1});
  const Ended text = folder.mop({"results", "--compare", "--where", "label=fast"});
  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("+25.0 %"));
  EXPECT_THAT(text.out, HasSubstr("+10.0 %"));
  EXPECT_THAT(text.out, HasSubstr("1 measurement\n"));
  const json rows = json::parse(folder.mop({"results", "--compare", "--format", "json"}).out);
  ASSERT_EQ(rows.size(), 3U);
  EXPECT_TRUE(rows[0]["hbm_peak_bytes_error"].is_null());  // of the CPU backend
  EXPECT_NEAR(rows[2]["step_time_s_error"].get<double>(), 0.25, 1e-9);
  EXPECT_EQ(folder.mop({"results", "--compare", "--columns", "id"}).status, 2);
}

struct WhatIf : Validate {
  json what_if(int64_t id, std::vector<std::string> more) const {
    std::vector<std::string> args{"what-if", "--from", std::to_string(id), "--format", "json"};
    args.insert(args.end(), more.begin(), more.end());
    const Ended ended = folder.mop(args);
    EXPECT_EQ(ended.status, 0) << ended.err;
    return json::parse(ended.out);
  }
};

TEST_F(WhatIf, ScalesTheMeasuredStepAndSaysHowSure) {
  const int64_t cpu = run("cpu"), base = on_gpus(cpu, "base", {-0.2, 0});
  const json alone = what_if(base, {"--context", "32K", "--sequences", "4"});
  const double measured = alone["base_measured_s"], predicted = alone["base_predicted_s"],
               then = alone["changed_predicted_s"];
  EXPECT_NEAR(predicted / measured, 0.8, 1e-9);
  EXPECT_GT(then, 2 * predicted);
  EXPECT_NEAR(alone["changed_from_measured_s"].get<double>(), measured * then / predicted, 1e-9);
  EXPECT_EQ(alone["changed"]["context"], 32768);
  EXPECT_TRUE(alone["error_bar"]["relative"].is_null());
  EXPECT_THAT(alone["error_bar"]["why_none"].get<std::string>(),
              HasSubstr("1 other measured run"));  // the probe

  on_gpus(cpu, "x", {0, 0});
  on_gpus(cpu, "y", {0, 0});
  const json sure = what_if(base, {"--context", "32K", "--sequences", "4"});
  EXPECT_EQ(sure["error_bar"]["chosen"], "plan family mop on cluster h200x4");
  EXPECT_EQ(sure["error_bar"]["runs"], 3);  // two, and the last probe
  EXPECT_GT(sure["error_bar"]["relative"].get<double>(), 0);
  EXPECT_LT(sure["error_bar"]["low_s"].get<double>(), sure["changed_from_measured_s"].get<double>());
}

TEST_F(WhatIf, ChangesNodesLinksAndPlan) {
  const int64_t id = run("cpu");
  const auto linked = [&](const char* speed) {
    return what_if(id, {"--cluster", "h200", "--nodes", "2", "--context", "16K", "--plan",
                        "mop:ep=8,ulysses=1,expert-placement=across", "--link-speed", speed});
  };
  const json slow = linked("x0.1"), fast = linked("x10");
  EXPECT_EQ(slow["changed"]["gpus"], 16);
  EXPECT_GT(slow["changed_predicted_s"], fast["changed_predicted_s"]);
  EXPECT_EQ(what_if(id, {"--plan", "ulysses=2"})["changed"]["plan"]["ulysses"], 2);
  EXPECT_EQ(what_if(id, {"--plan", "fsdp2"})["changed"]["plan"]["runtime"], "native");
}

TEST_F(WhatIf, KeepsTheGpusOnAnotherCluster) {
  const int64_t id = run("cpu");
  const json base = what_if(id, {"--context", "2K"}), other = what_if(id, {"--cluster", "h200"});
  EXPECT_EQ(other["changed"]["gpus"], base["changed"]["gpus"]);
  EXPECT_EQ(what_if(id, {"--cluster", "h200", "--nodes", "2"})["changed"]["gpus"], 16);
  const Ended text = folder.mop({"what-if", "--from", std::to_string(id), "--cluster", "h200"});
  EXPECT_THAT(text.out, HasSubstr("of h200, "));
  EXPECT_THAT(text.out, HasSubstr("tokens a step instead of"));
}

TEST_F(WhatIf, SaysByHowMuchAPlanDoesNotFit) {
  const int64_t id = run("cpu", "fsdp2");
  const Ended ended =
      folder.mop({"what-if", "--from", std::to_string(id), "--context", "1M", "--sequences", "64"});
  EXPECT_EQ(ended.status, 0);
  EXPECT_THAT(ended.out, HasSubstr("the changed run does not fit: HBM needs"));
  EXPECT_THAT(ended.out, HasSubstr("too much"));
  EXPECT_THAT(ended.out, HasSubstr("is of the CPU backend"));
}

TEST_F(WhatIf, SaysWhatIsWrong) {
  const std::string id = std::to_string(run("cpu"));
  for (const auto& [args, part] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"--context", "8K"}, "--from"},
           {{"--from", id}, "nothing is changed"},
           {{"--from", "1", "--context", "8K"}, "run 1 is a prediction"},
           {{"--from", "99", "--context", "8K"}, "run 99 is not in 'results.db'"},
           {{"--from", id, "--link-speed", "x2"}, "there is one node"},
           {{"--from", id, "--plan", "ulysses=3"}, "or let the planner choose: --plan mop"},
           {{"--from", id, "--plan", "ulises=2"}, "did you mean 'ulysses'"}}) {
    std::vector<std::string> all{"what-if"};
    all.insert(all.end(), args.begin(), args.end());
    const Ended ended = folder.mop(all);
    EXPECT_EQ(ended.status, 2) << testing::PrintToString(args);
    EXPECT_THAT(ended.err, HasSubstr(part));
  }
}

}  // namespace
}  // namespace mop::test
