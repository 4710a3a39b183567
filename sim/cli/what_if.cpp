#include "sim/validate/what_if.h"

#include <fmt/format.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cli/answer.h"
#include "sim/cli/commands.h"
#include "sim/cli/comparisons.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/search/planner.h"
#include "sim/search/settings.h"
#include "sim/validate/question.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;

// Settings of a scenario that may change; the order in which they are set.
constexpr const char* kChanged[] = {"cluster",   "nodes",      "gpus-per-node", "context",
                                    "sequences", "accumulate", "routing"};

struct WhatIf {
  std::string database = "results.db", format = "table", link_speed;
  int64_t from = 0;
  std::map<std::string, std::string> changes;
  std::vector<std::string> plan;

  explicit WhatIf(CLI::App& command) {
    command.add_option("--from", from, "id of the measured run (mop results --where kind=measurement)")
        ->type_name("ID")
        ->required();
    for (const char* name : kChanged)
      for (const search::Setting& setting : search::settings())
        if (std::string_view(setting.name) == name)
          command.add_option(fmt::format("--{}", name), changes[name], setting.help)
              ->type_name(setting.values)
              ->group("Change");
    command
        .add_option(
            "--plan", plan,
            "settings to change, like ulysses=2; or another plan, like mop:ep=4, whose auto is chosen")
        ->type_name("SETTING=VALUE|PLAN...")
        ->group("Change");
    command
        .add_option("--link-speed", link_speed,
                    "network between the nodes: a factor like x2, or the rate of each GPU like 100GB/s")
        ->type_name("xN|GB/s")
        ->group("Change");
    command.add_option("--db", database, "database with the measurements")
        ->type_name("FILE")
        ->default_str(database);
    command.add_option("--format", format, "table or json")->type_name("FORM")->default_str(format);
    command.footer(
        "Answers with the measured step times what the prediction changes by, and with the plain prediction. "
        "The error bar "
        "is\n"
        "how far predictions of similar measured runs scatter: of the same plan family and cluster, else of "
        "more.\n"
        "Example:\n"
        "  mop what-if --from 12 --context 32K\n"
        "  mop what-if --from 12 --nodes 4 --plan mop --link-speed x2\n"
        "  mop what-if --from 12 --plan ulysses=2 optimizer=host --format json");
  }

  // As many GPUs as before on nodes of another cluster, where --nodes says nothing else.
  void keep_gpus(predict::Scenario& s, int64_t before) const {
    s.gpus_per_node = 0;
    if (!changes.at("nodes").empty()) return;
    const int64_t node = s.cluster.gpus_per_node();
    if (before > node && before % node != 0)
      throw UserError(
          fmt::format("the run has {} GPUs, which are no whole nodes of {} with {} each; add --nodes", before,
                      s.cluster.name, node));
    s.nodes = std::max<int64_t>(1, before / node);
    s.gpus_per_node = std::min(before, node);
  }

  predict::Scenario changed(predict::Scenario s, std::vector<std::string>& said) const {
    const int64_t before = s.gpus();
    std::set<std::string> set;
    for (const char* name : kChanged) {
      const std::string& value = changes.at(name);
      if (value.empty()) continue;
      search::set(s, name, std::string_view(name) == "cluster" ? validate::locate(value) : value);
      said.push_back(fmt::format("{} {}", name, value));
    }
    if (!changes.at("cluster").empty() && changes.at("gpus-per-node").empty()) keep_gpus(s, before);
    if (!link_speed.empty()) {
      if (s.nodes == 1)
        throw UserError(
            "--link-speed changes the network between nodes, and there is one node; add --nodes N");
      validate::set_link_speed(s.cluster, link_speed);
      said.push_back("link speed " + link_speed);
    }
    for (const std::string& text : plan) {
      const size_t equals = text.find('='), colon = text.find(':');
      if (equals == std::string::npos || colon < equals) {
        s.plan = search::parse_plan(text);
        // What was measured ran with our kernels.
        if (s.plan.family == plan::Family::fsdp2 && !search::sets(text, "runtime"))
          s.plan.runtime = plan::Runtime::native;
      } else {
        if (!set.insert(text.substr(0, equals)).second)
          throw UserError(fmt::format("--plan changes {} twice", text.substr(0, equals)));
        plan::set_knob(s.plan, text.substr(0, equals), text.substr(equals + 1));
      }
      said.push_back("plan " + text);
    }
    if (said.empty())
      throw UserError(
          "nothing is changed; give --context, --nodes, --link-speed or --plan (see mop what-if --help)");
    try {
      predict::validate(s);
    } catch (const UserError& error) {
      throw UserError(fmt::format("{}; change it, too, or let the planner choose: --plan {}", error.what(),
                                  plan::family_name(s.plan.family)));
    }
    s.plan = search::choose(s);
    return s;
  }

  void run() const {
    check_format(format, {"table", "json"});
    const store::Store store(database, store::Access::kRead);
    const std::vector<store::RunRecord> found = store.query({.where = {fmt::format("id={}", from)}});
    if (found.empty() || found[0].kind != store::kMeasurement)
      throw UserError(fmt::format(
          "run {} is {} '{}'; mop results --where kind=measurement --columns id,model,plan lists those that "
          "can be started from",
          from, found.empty() ? "not in" : "a prediction in", database));
    std::vector<validate::Comparison> base = compare_all(store, found);
    if (!base[0].step_s)
      throw UserError(fmt::format("run {} cannot be predicted again: {}", from, base[0].why_not));
    std::vector<std::string> said;
    const predict::Scenario scenario = changed(base[0].scenario, said);
    const std::vector<validate::Comparison> others = compare_all(store, measurements(store, {}, true));
    const validate::WhatIf answer = validate::what_if(base[0], scenario, others);
    if (format == "json")
      print_json(base[0], scenario, answer, said);
    else
      print_text(base[0], scenario, answer, said);
  }

  static std::string why_no_bar(const validate::ErrorBar& error) {
    return fmt::format("no error bar: {} other measured run{} of {} (it takes {})", error.runs,
                       error.runs == 1 ? "" : "s", error.chosen, validate::kFewest);
  }

  void print_text(const validate::Comparison& base, const predict::Scenario& s,
                  const validate::WhatIf& answer, const std::vector<std::string>& said) const {
    const store::RunRecord& m = base.measured;
    const predict::Prediction& p = answer.changed;
    fmt::print("run {}{}{}: {} on {} GPUs of {}, context {}, plan {}\nchanged: ", from,
               m.label.empty() ? "" : " ", m.label, m.model, m.gpus, base.scenario.cluster.name,
               format_count(m.context), m.plan);
    for (size_t i = 0; i < said.size(); ++i) fmt::print("{}{}", i > 0 ? ", " : "", said[i]);
    fmt::print("\nthen: on {} GPUs of {}, {} tokens a step instead of {}, plan {}\n\n", s.gpus(),
               s.cluster.name, format_count(answer.changed.tokens_per_step), format_count(m.tokens_per_step),
               plan::describe(s.plan));
    if (!base.on_gpus)
      fmt::print("warning: run {} is of the CPU backend: its times say nothing of a cluster\n\n", from);
    const auto speed = [](double tokens, double step, int64_t gpus) {
      return fmt::format("{:.1f}", tokens / step / static_cast<double>(gpus));
    };
    TextTable table({"", "step", "tokens/s/GPU", "HBM/GPU", "host/node"}, "lrrrr");
    const auto tokens = static_cast<double>(m.tokens_per_step), then = static_cast<double>(p.tokens_per_step);
    table.add({"base, measured", format_seconds(answer.base_measured_s),
               speed(tokens, answer.base_measured_s, m.gpus),
               format_bytes(static_cast<double>(m.hbm_peak_bytes.value_or(0))),
               format_bytes(static_cast<double>(m.host_peak_bytes.value_or(0)))});
    table.add({"base, predicted", format_seconds(answer.base_predicted_s),
               speed(tokens, answer.base_predicted_s, m.gpus),
               format_bytes(static_cast<double>(base.hbm_bytes)),
               format_bytes(static_cast<double>(base.host_bytes))});
    const std::string hbm = format_bytes(static_cast<double>(p.hbm_peak)),
                      host = format_bytes(static_cast<double>(p.host_peak));
    if (!p.step_time) {
      table.add({"changed, predicted", "-", "-", hbm, host});
      fmt::print("{}\nthe changed run does not fit: {}\n", table.text(), p.why_not);
      return;
    }
    table.add(
        {"changed, predicted", format_seconds(*p.step_time), speed(then, *p.step_time, s.gpus()), hbm, host});
    table.add({"changed, from the measured base", format_seconds(*answer.anchored_s),
               speed(then, *answer.anchored_s, s.gpus()), "", ""});
    fmt::print("{}\nstep {} of the measured one", table.text(),
               fmt::format("{:.3f} times", *p.step_time / answer.base_predicted_s));
    if (const auto bar = answer.error.bar; bar)
      fmt::print(
          ": {} to {} (± {}, one standard deviation of measured over predicted, mean {:.3f}, over {} other "
          "runs of {})\n",
          format_seconds(*answer.anchored_s * (1 - *bar)), format_seconds(*answer.anchored_s * (1 + *bar)),
          percent(*bar), answer.error.bias, answer.error.runs, answer.error.chosen);
    else
      fmt::print("\n{}\n", why_no_bar(answer.error));
    fmt::print("{}", warnings_text(p.warnings));
  }

  void print_json(const validate::Comparison& base, const predict::Scenario& s,
                  const validate::WhatIf& answer, const std::vector<std::string>& said) const {
    const auto value = [](const std::optional<double>& number) { return number ? Json(*number) : Json(); };
    const auto& bar = answer.error.bar;
    Json error{{"runs", answer.error.runs},
               {"chosen", answer.error.chosen},
               {"relative", value(bar)},
               {"mean_measured_over_predicted", answer.error.bias}};
    if (bar && answer.anchored_s) {
      error["low_s"] = *answer.anchored_s * (1 - *bar);
      error["high_s"] = *answer.anchored_s * (1 + *bar);
    }
    if (!bar) error["why_none"] = why_no_bar(answer.error);
    fmt::print("{}\n", Json{{"from", from},
                            {"changes", said},
                            {"base_measured_s", answer.base_measured_s},
                            {"base_predicted_s", answer.base_predicted_s},
                            {"changed_predicted_s", value(answer.changed.step_time)},
                            {"changed_from_measured_s", value(answer.anchored_s)},
                            {"error_bar", error},
                            {"backend", base.on_gpus ? "cuda" : "cpu"},
                            {"fits", answer.changed.fits},
                            {"why_not", answer.changed.fits ? Json() : Json(answer.changed.why_not)},
                            {"changed", Json::parse(answer_json(s, answer.changed))}}
                           .dump(2));
  }
};

}  // namespace

void add_what_if(CLI::App& program) {
  CLI::App* command =
      program.add_subcommand("what-if", "a measured run with one thing changed, with an error bar");
  const auto what_if = std::make_shared<WhatIf>(*command);
  command->callback([what_if] { what_if->run(); });
}

}  // namespace mop::cli
