#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <ranges>
#include <set>
#include <string_view>
#include <tuple>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cli/commands.h"
#include "sim/cli/comparisons.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/search/planner.h"
#include "sim/validate/bounds.h"
#include "sim/validate/overlay.h"
#include "sim/validate/suite.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;
using validate::Comparison;

constexpr size_t kShown = 5;  // operations that explain a difference

Json finite(double value) {
  return std::isfinite(value) ? Json(value) : Json();
}

std::string bytes_text(int64_t bytes) {
  return format_bytes(static_cast<double>(bytes));
}

// A database and what of it is judged.
struct Source {
  std::string path;
  store::Store store;
  std::vector<store::RunRecord> records;
};

struct Validate {
  std::vector<std::string> databases{"results.db"};
  std::string format = "table", bounds_text, held_out_file, suite_file, cluster_file, trace,
              traces = "traces";
  std::vector<std::string> where;
  bool all = false, print_commands = false, check = false, only_missing = false;
  int64_t only_gpus = 0;

  explicit Validate(CLI::App& command) {
    command
        .add_option("--db", databases,
                    "database with the measurements; several, as of several hosts, are judged together")
        ->type_name("FILE...")
        ->default_str(databases[0]);
    command
        .add_option("--where", where,
                    "conditions on the measurements, as of mop results: model=gpt-oss-20b gpus=4 id=12")
        ->type_name("CONDITION...");
    command
        .add_option(
            "--cluster", cluster_file,
            "predict with this one instead of the runs' own: a name or a file, as a calibration of the host "
            "that they were made on")
        ->type_name("CLUSTER");
    command.add_flag("--all", all, "also older measurements of the same question, plan and label");
    command
        .add_option("--bounds", bounds_text,
                    "those that differ, in percent: " + validate::describe(validate::Bounds{}))
        ->type_name("NAME=PERCENT,...");
    command.add_option("--held-out", held_out_file, "suite that says which runs are held out")
        ->type_name("FILE");
    CLI::Option* suite =
        command
            .add_option("--suite", suite_file,
                        "only the runs of this suite, by their labels; it says which are held out")
            ->type_name("FILE");
    CLI::Option* checks =
        command.add_flag("--check", check, "predict the suite's runs, measured or not: plan, memory, time")
            ->needs(suite);
    command
        .add_flag("--commands", print_commands,
                  "print the script that makes the suite's runs, and judge nothing")
        ->needs(suite)
        ->excludes(checks);
    command
        .add_flag("--missing", only_missing,
                  "with --check or --commands: only runs that no database has a measurement of")
        ->needs(suite);
    command.add_option("--gpus", only_gpus, "with --check or --commands: only runs of so many GPUs")
        ->needs(suite)
        ->check(CLI::PositiveNumber);
    command.add_option("--traces", traces, "folder for the timelines of --commands")
        ->type_name("DIR")
        ->default_str(traces);
    command
        .add_option(
            "--trace", trace,
            "both timelines of the one measurement that is chosen, laid over each other, for Perfetto")
        ->type_name("FILE");
    command.add_option("--format", format, "table or json")->type_name("FORM")->default_str(format);
    command.footer(
        "Bounds: hbm, host: worst memory error; step-mean, step-worst: step times of held-out runs (of all "
        "when none is);\n"
        "ratio: of mop to fsdp2 on the same question; ranking: time lost by the plan predicted best; op: "
        "worst median of a "
        "kind\n"
        "of operation that holds more than 2 % of the step. Measurements of the CPU backend test memory "
        "only.\n"
        "Exit status: 0 all bounds hold, 3 some do not, 2 bad input, 1 a defect of ours.\n"
        "Example:\n"
        "  mop validate --db host-a.db host-b.db --suite scenarios/validation/suite.toml\n"
        "  mop validate --db host-a.db --cluster host-a.json\n"
        "  mop validate --suite scenarios/validation/suite.toml --commands > suite.sh\n"
        "  mop validate --suite scenarios/validation/suite.toml --commands --gpus 4 --missing > rest.sh\n"
        "  mop validate --where id=12 --trace overlaid.trace.json");
  }

  void run() {
    check_format(format, {"table", "json"});
    const validate::Bounds bounds = validate::parse_bounds(bounds_text);
    std::vector<validate::SuiteRun> suite;
    if (!suite_file.empty() && !held_out_file.empty())
      throw UserError("--suite says which runs are held out already; leave --held-out away");
    if (const std::string& file = suite_file.empty() ? held_out_file : suite_file; !file.empty())
      suite = validate::read_suite(file);
    if ((print_commands || check) && !cluster_file.empty())
      throw UserError(
          "--cluster is to predict measurements with; the suite names the clusters of --check and "
          "--commands");
    if (!print_commands && !check && (only_missing || only_gpus != 0))
      throw UserError(
          "--missing and --gpus choose runs for --check or --commands; measurements are chosen by --where");
    if (print_commands || check) choose_runs(suite);
    if (print_commands) {
      if (format == "json")
        throw UserError("--commands prints a script; --check --format json tells of the runs");
      fmt::print("{}", validate::commands(suite, databases.front(), traces));
      return;
    }
    if (check) return check_suite(suite);

    std::vector<Source> sources = open(where, !all);
    count_once(sources);
    std::vector<std::string> missing;
    if (!suite_file.empty()) missing = keep_of_suite(sources, suite);
    size_t chosen = 0;
    for (const Source& source : sources) chosen += source.records.size();
    std::optional<cluster::ClusterModel> cluster;
    if (!cluster_file.empty()) cluster = cluster::read_cluster(cluster_file);
    const cluster::ClusterModel* const instead = cluster ? &*cluster : nullptr;
    std::vector<Comparison> comparisons;
    for (const Source& source : sources) {
      if (source.records.empty()) continue;
      if (!trace.empty()) write_trace(source, chosen, instead);
      for (Comparison& c : compare_all(source.store, source.records, instead)) {
        c.database = source.path;
        comparisons.push_back(std::move(c));
      }
    }
    if (comparisons.empty())
      throw UserError(
          fmt::format("no measurement in '{}' meets the conditions; mop run makes them, mop results --where "
                      "kind=measurement lists them",
                      fmt::join(databases, "', '")));
    const std::vector<std::string> late = mark_held_out(comparisons, suite);
    const std::vector<validate::Verdict> verdicts = validate::judge(comparisons, bounds);
    if (format == "json")
      print_json(comparisons, verdicts, missing, late);
    else
      print_text(comparisons, verdicts, missing, late);
    if (!std::ranges::all_of(verdicts, &validate::Verdict::holds)) throw Ended{kBoundsBroken};
  }

  void choose_runs(std::vector<validate::SuiteRun>& suite) const {
    if (only_gpus != 0)
      std::erase_if(suite, [&](const validate::SuiteRun& run) { return run.gpus != only_gpus; });
    if (!only_missing) return;
    std::vector<Source> sources = open({}, false);
    const std::vector<std::string> missing = keep_of_suite(sources, suite);
    std::erase_if(suite, [&](const validate::SuiteRun& run) {
      return std::ranges::find(missing, run.name) == missing.end();
    });
  }

  // With their measurements. With --missing a database may yet have to come.
  std::vector<Source> open(const std::vector<std::string>& conditions, bool newest) const {
    std::vector<Source> sources;
    for (const std::string& path : databases) {
      if (only_missing && !std::filesystem::exists(path)) continue;
      store::Store store(path, store::Access::kRead);
      std::vector<store::RunRecord> records = measurements(store, conditions, newest);
      sources.push_back({path, std::move(store), std::move(records)});
    }
    return sources;
  }

  // Of a run that several databases have, as copies of one do, that of the last.
  static void count_once(std::vector<Source>& sources) {
    std::set<std::tuple<std::string, std::string, std::string, double>> seen;
    size_t again = 0;
    for (Source& source : std::views::reverse(sources))
      again += std::erase_if(source.records, [&](const store::RunRecord& r) {
        return !seen.emplace(r.created, r.label, r.command, r.step_time_s.value_or(0)).second;
      });
    if (again > 0)
      fmt::print(stderr, "mop: {} measurement{} in several of the databases, and count once\n", again,
                 again == 1 ? " is" : "s are");
  }

  // Leaves the measurements of the suite's runs, the newest of each (of the last database that has it) unless
  // all are wanted; returns the runs without any.
  std::vector<std::string> keep_of_suite(std::vector<Source>& sources,
                                         const std::vector<validate::SuiteRun>& suite) const {
    std::vector<std::vector<store::RunRecord>> kept(sources.size());
    std::vector<std::string> missing;
    for (const validate::SuiteRun& run : suite) {
      std::vector<std::pair<size_t, const store::RunRecord*>> found;
      for (size_t i = 0; i < sources.size(); ++i)
        for (const store::RunRecord& record : sources[i].records)
          if (validate::parse_label(record.label).first == run.name) found.emplace_back(i, &record);
      if (found.empty()) missing.push_back(run.name);
      if (!all && !found.empty()) found.erase(found.begin(), found.end() - 1);
      for (const auto& [source, record] : found) kept[source].push_back(*record);
    }
    for (size_t i = 0; i < sources.size(); ++i) sources[i].records = std::move(kept[i]);
    return missing;
  }

  // Held out is what the label says that the run was made as, and the file still declares. Returns what the
  // file declares held out and the label does not.
  static std::vector<std::string> mark_held_out(std::vector<Comparison>& comparisons,
                                                const std::vector<validate::SuiteRun>& suite) {
    std::vector<std::string> late;
    for (Comparison& c : comparisons) {
      const auto [name, said] = validate::parse_label(c.measured.label);
      const auto declared = std::ranges::find(suite, name, &validate::SuiteRun::name);
      c.held_out = said && (suite.empty() || (declared != suite.end() && declared->held_out));
      if (!said && declared != suite.end() && declared->held_out) late.push_back(name);
    }
    return late;
  }

  void write_trace(const Source& source, size_t chosen, const cluster::ClusterModel* instead) const {
    if (chosen != 1)
      throw UserError(fmt::format(
          "--trace lays one measurement over its prediction, and {} are chosen; add --where id=N", chosen));
    const auto& [database, store, records] = source;
    const store::RunRecord& record = records.front();
    const Json detail = Json::parse(record.detail);
    if (!detail.contains("trace"))
      throw UserError(fmt::format("run {} kept no timeline; repeat it with --trace FILE: {}", *record.id,
                                  record.command));
    const std::string kept = detail["trace"];
    std::string path = kept;
    if (!std::filesystem::exists(path))
      path =
          (std::filesystem::path(database).parent_path() / std::filesystem::path(kept).filename()).string();
    if (!std::filesystem::exists(path))
      throw UserError(fmt::format(
          "run {} wrote its timeline to '{}', which is neither here nor beside '{}'; bring it, or repeat "
          "the run: {}",
          *record.id, kept, database, record.command));
    const std::optional<store::RunRecord> beside = prediction_beside(store, record);
    predict::Details details;
    const Comparison c = validate::compare(record, beside ? &*beside : nullptr, instead, &details);
    if (!c.step_s)
      throw UserError(fmt::format("run {} has no predicted timeline: {}", *record.id, c.why_not));
    validate::write_overlay(trace, path, c.scenario, details);
    fmt::print(stderr, "mop: both timelines in {}; open it at https://ui.perfetto.dev\n", trace);
  }

  // What the planner makes of every run, and whether it fits.
  void check_suite(const std::vector<validate::SuiteRun>& suite) const {
    TextTable table({"run", "held out", "GPUs", "fits", "HBM/GPU", "host/node", "step", "plan"}, "llrlrrrl");
    Json array = Json::array();
    std::vector<std::string> reasons;
    double seconds = 0;
    for (const validate::SuiteRun& run : suite) {
      predict::Scenario s = run.scenario;
      s.plan = search::choose(s);
      const predict::Prediction p = predict::predict(s);
      table.add({run.name, run.held_out ? "yes" : "", std::to_string(run.gpus), p.fits ? "yes" : "no",
                 bytes_text(p.hbm_peak), bytes_text(p.host_peak),
                 p.step_time ? format_seconds(*p.step_time) : "-", plan::describe(s.plan)});
      array.push_back({{"run", run.name},
                       {"held_out", run.held_out},
                       {"gpus", run.gpus},
                       {"fits", p.fits},
                       {"hbm_peak_bytes", p.hbm_peak},
                       {"host_peak_bytes", p.host_peak},
                       {"step_time_s", p.step_time ? Json(*p.step_time) : Json()},
                       {"plan", plan::describe(s.plan)}});
      seconds += p.step_time.value_or(0) * static_cast<double>(run.steps);
      if (!p.fits) reasons.push_back(fmt::format("{} does not fit: {}", run.name, p.why_not));
    }
    if (format == "json")
      fmt::print("{}\n", array.dump(2));
    else
      fmt::print("{}{} runs, {} of them held out; their steps take {}\n", table.text(), suite.size(),
                 std::ranges::count_if(suite, &validate::SuiteRun::held_out), format_seconds(seconds));
    if (!reasons.empty())
      throw UserError(fmt::format("suite '{}': {}", suite_file, fmt::join(reasons, "; ")));
  }

  static void print_text(const std::vector<Comparison>& comparisons,
                         const std::vector<validate::Verdict>& verdicts,
                         const std::vector<std::string>& missing, const std::vector<std::string>& late) {
    TextTable table({"id", "run", "plan", "GPUs", "context", "step", "predicted", "error", "GPU memory",
                     "predicted", "error", "host", "predicted", "error", ""},
                    "rllrrrrrrrrrrrl");
    const bool several = std::ranges::adjacent_find(comparisons, std::not_equal_to<>(),
                                                    &Comparison::database) != comparisons.end();
    std::string_view from;
    for (const Comparison& c : comparisons) {
      const store::RunRecord& m = c.measured;
      const bool known = c.hbm_bytes > 0;
      if (several && c.database != from) table.add({"", c.database});
      from = c.database;
      table.add({std::to_string(m.id.value_or(0)), m.label.empty() ? m.model : m.label, m.plan_family,
                 std::to_string(m.gpus), format_count(m.context), format_seconds(m.step_time_s.value_or(0)),
                 c.step_s ? format_seconds(*c.step_s) : "-", c.step_s ? signed_percent(c.step_error()) : "-",
                 bytes_text(m.hbm_peak_bytes.value_or(0)), known ? bytes_text(c.hbm_bytes) : "-",
                 known ? signed_percent(c.hbm_error()) : "-", bytes_text(m.host_peak_bytes.value_or(0)),
                 known ? bytes_text(c.host_bytes) : "-", known ? signed_percent(c.host_error()) : "-",
                 c.held_out  ? "held out"
                 : c.on_gpus ? ""
                             : "CPU backend: arenas, and times are not judged"});
    }
    fmt::print("{}", table.text());
    for (const Comparison& c : comparisons) print_explanation(c);
    for (const std::string& name : missing) fmt::print("\nnot measured: {}", name);
    for (const std::string& name : late)
      fmt::print("\nnot counted as held out: {} was made before the file declared it so", name);
    if (!missing.empty() || !late.empty()) fmt::print("\n");
    for (const bool held_out : {false, true})
      if (const validate::StepErrors errors = validate::step_errors(comparisons, held_out); errors.count > 0)
        fmt::print("{}step time of {} {}on GPUs: mean absolute error {}, worst {}\n", held_out ? "" : "\n",
                   errors.count, held_out ? "held-out runs " : "runs ", percent(errors.mean),
                   percent(errors.worst));
    for (const validate::PlanSet& set : validate::plan_sets(comparisons)) {
      fmt::print("\n{}\n", set.question);
      TextTable plans({"id", "measured", "predicted", "plan"}, "rrrl");
      for (const Comparison* c : set.plans)
        plans.add({std::to_string(c->measured.id.value_or(0)), format_seconds(*c->measured.step_time_s),
                   format_seconds(*c->step_s), c->measured.plan});
      fmt::print("{}", plans.text());
    }
    if (const std::vector<validate::KindErrors> kinds = validate::kind_errors(comparisons); !kinds.empty()) {
      TextTable errors({"kind of operation", "runs where it has 2 % of the step", "median error", "largest"},
                       "lrrr");
      for (const validate::KindErrors& kind : kinds)
        errors.add({kind.kind, std::to_string(kind.errors.size()), percent(kind.median()),
                    percent(kind.errors.back())});
      fmt::print("\n{}", errors.text());
    }
    TextTable judged({"bound", "at most", "is", "", "of"}, "lrrll");
    for (const validate::Verdict& v : verdicts) {
      const bool number = v.name == "predicted";
      judged.add({v.name, number ? fmt::format("{}", v.bound) : percent(v.bound),
                  v.count == 0 ? "-"
                  : number     ? fmt::format("{}", v.value)
                               : percent(v.value),
                  v.count == 0 ? "not tested"
                  : v.holds()  ? "holds"
                               : "BROKEN",
                  v.of});
    }
    fmt::print("\n{}", judged.text());
  }

  static void print_explanation(const Comparison& c) {
    if (c.operations.empty() && c.notes.empty() && c.why_not.empty()) return;
    fmt::print("\nrun {}{}{}\n", c.measured.id.value_or(0), c.measured.label.empty() ? "" : " ",
               c.measured.label);
    if (!c.why_not.empty()) fmt::print("  {}\n", c.why_not);
    if (!c.operations.empty()) {
      TextTable table({"operations that explain most", "stream", "measured", "predicted", "difference",
                       "of the step", "executed"},
                      "llrrrrr");
      for (size_t i = 0; i < std::min(kShown, c.operations.size()); ++i) {
        const validate::OpDifference& op = c.operations[i];
        table.add({op.name, op.stream, format_seconds(op.measured), format_seconds(op.predicted),
                   (op.difference() < 0 ? "-" : "+") + format_seconds(std::abs(op.difference())),
                   signed_percent(op.difference() / c.measured_step_s),
                   op.measured_count == op.predicted_count
                       ? (op.stream.empty() ? "" : fmt::format("{:.0f}", op.measured_count))
                       : fmt::format("{:.0f}, predicted {:.0f}", op.measured_count, op.predicted_count)});
      }
      fmt::print("{}", table.text());
    }
    for (const std::string& note : c.notes) fmt::print("  {}\n", note);
  }

  static void print_json(const std::vector<Comparison>& comparisons,
                         const std::vector<validate::Verdict>& verdicts,
                         const std::vector<std::string>& missing, const std::vector<std::string>& late) {
    Json runs = Json::array(), bounds = Json::array(), sets = Json::array(), kinds = Json::array();
    for (const Comparison& c : comparisons) {
      const store::RunRecord& m = c.measured;
      const bool known = c.hbm_bytes > 0;
      Json operations = Json::array();
      for (const validate::OpDifference& op : c.operations)
        operations.push_back({{"name", op.name},
                              {"stream", op.stream},
                              {"measured_s", op.measured},
                              {"predicted_s", op.predicted},
                              {"measured_count", op.measured_count},
                              {"predicted_count", op.predicted_count}});
      runs.push_back({{"id", m.id.value_or(0)},
                      {"database", c.database},
                      {"label", m.label},
                      {"model", m.model},
                      {"plan", m.plan},
                      {"gpus", m.gpus},
                      {"context", m.context},
                      {"backend", c.on_gpus ? "cuda" : "cpu"},
                      {"cluster", c.scenario.cluster.name},
                      {"held_out", c.held_out},
                      {"why_not", c.predicted() ? Json() : Json(c.why_not)},
                      {"step_time_s", m.step_time_s ? Json(*m.step_time_s) : Json()},
                      {"predicted_step_time_s", c.step_s ? Json(*c.step_s) : Json()},
                      {"step_error", c.step_s && m.step_time_s ? finite(c.step_error()) : Json()},
                      {"hbm_peak_bytes", m.hbm_peak_bytes ? Json(*m.hbm_peak_bytes) : Json()},
                      {"predicted_hbm_peak_bytes", known ? Json(c.hbm_bytes) : Json()},
                      {"hbm_error", known ? finite(c.hbm_error()) : Json()},
                      {"host_peak_bytes", m.host_peak_bytes ? Json(*m.host_peak_bytes) : Json()},
                      {"predicted_host_peak_bytes", known ? Json(c.host_bytes) : Json()},
                      {"host_error", known ? finite(c.host_error()) : Json()},
                      {"profiled_step_s", c.measured_step_s},
                      {"operations", operations},
                      {"notes", c.notes}});
    }
    for (const validate::Verdict& v : verdicts)
      bounds.push_back({{"name", v.name},
                        {"bound", v.bound},
                        {"value", v.count == 0 ? Json() : finite(v.value)},
                        {"count", v.count},
                        {"holds", v.count == 0 ? Json() : Json(v.holds())},
                        {"of", v.of}});
    for (const validate::PlanSet& set : validate::plan_sets(comparisons)) {
      Json plans = Json::array();
      for (const Comparison* c : set.plans) plans.push_back(c->measured.id.value_or(0));
      sets.push_back({{"question", set.question}, {"runs", plans}});
    }
    for (const validate::KindErrors& kind : validate::kind_errors(comparisons))
      kinds.push_back(
          {{"kind", kind.kind}, {"median_error", finite(kind.median())}, {"runs", kind.errors.size()}});
    Json steps = Json::object();
    for (const bool held_out : {false, true}) {
      const validate::StepErrors errors = validate::step_errors(comparisons, held_out);
      steps[held_out ? "held_out" : "all"] = {
          {"runs", errors.count}, {"mean", finite(errors.mean)}, {"worst", finite(errors.worst)}};
    }
    fmt::print("{}\n", Json{{"runs", runs},
                            {"step_errors", steps},
                            {"plan_sets", sets},
                            {"kinds", kinds},
                            {"not_measured", missing},
                            {"declared_late", late},
                            {"bounds", bounds},
                            {"holds", std::ranges::all_of(verdicts, &validate::Verdict::holds)}}
                           .dump(2, ' ', false, Json::error_handler_t::replace));
  }
};

}  // namespace

void add_validate(CLI::App& program) {
  CLI::App* command =
      program.add_subcommand("validate", "predict stored measurements again, and judge the errors");
  const auto validate = std::make_shared<Validate>(*command);
  command->callback([validate] { validate->run(); });
}

}  // namespace mop::cli
