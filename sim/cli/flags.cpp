#include "sim/cli/flags.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/Config.hpp>
#include <algorithm>
#include <filesystem>

#include "sim/base/error.h"
#include "sim/base/suggest.h"
#include "sim/search/settings.h"

namespace mop::cli {
namespace {

const char* family_of(const plan::Knob& knob) {
  return knob.fsdp2 && knob.mop ? "Plan settings of both families"
         : knob.mop             ? "Plan settings of mop"
                                : "Plan settings of fsdp2";
}

bool ranged(Flags::Values values, const std::string& name) {
  if (name == "model" || name == "cluster" || name == "gpus-per-node" || name == "calibration") return false;
  return values == Flags::Values::all || (values == Flags::Values::contexts && name == "context");
}

}  // namespace

Flags::Flags(CLI::App& command, Values values, std::vector<std::string> plans, Knobs knobs)
    : command_(&command), plans_(std::move(plans)) {
  for (const search::Setting& setting : search::settings()) {
    const std::string flag = fmt::format("--{}", setting.name);
    if (std::string_view(setting.name) == "plan") {
      CLI::Option* option = command.add_option(flag, plans_, setting.help);
      option->type_name(setting.values)
          ->default_str(fmt::format("{}", fmt::join(plans_, " ")))
          ->group("Scenario");
      option->expected(1, values == Values::one ? 1 : 1000);
      continue;
    }
    std::string& text = settings_[setting.name] = setting.standard;
    const bool lists = ranged(values, setting.name);
    command
        .add_option(flag, text,
                    lists ? fmt::format("{}; list or range, a,b or a..b", setting.help) : setting.help)
        ->type_name(setting.values)
        ->default_str(setting.standard)
        ->group("Scenario");
  }
  command
      .add_option("--config", file_,
                  "scenario file (TOML) with any of these flags as keys; flags win over it")
      ->type_name("FILE")
      ->group("Scenario");
  command.add_option("--format", format_, "table or json")
      ->default_str(format_)
      ->type_name("FORM")
      ->group("Answer");
  command.add_option("--db", database_, "database that keeps the answers; '' keeps none")
      ->default_str(database_)
      ->type_name("FILE")
      ->group("Answer");
  command.add_flag("--no-store", no_store_, "keep nothing")->group("Answer");
  for (const plan::Knob& knob : plan::knobs())
    command.add_option(fmt::format("--{}", knob.name), knob_texts_[knob.name], knob.help)
        ->type_name(fmt::format("({})", knob.values))
        ->group(knobs == Knobs::listed ? family_of(knob) : "");
}

void Flags::read_file() {
  if (!file_.empty()) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(file_, error))
      throw UserError(fmt::format("scenario file '{}': no such file", file_));
    std::vector<CLI::ConfigItem> items;
    try {
      items = CLI::ConfigTOML().from_file(file_);
    } catch (const CLI::Error& failure) {
      throw UserError(fmt::format("scenario file '{}' cannot be read: {}", file_, failure.what()));
    }
    for (const CLI::ConfigItem& item : items) {
      if (!item.parents.empty())
        throw UserError(fmt::format("scenario file '{}' has a section [{}]; write its keys without one",
                                    file_, item.parents[0]));
      CLI::Option* option = item.name == "config" || item.name == "help"
                                ? nullptr
                                : command_->get_option_no_throw("--" + item.name);
      if (option == nullptr) {
        std::vector<std::string> known;
        for (const CLI::Option* o : command_->get_options()) known.push_back(o->get_lnames().front());
        std::erase_if(known, [](const std::string& name) { return name == "config" || name == "help"; });
        throw UserError(fmt::format("scenario file '{}': {}; its keys are the flags of the command", file_,
                                    unknown_of_many("key", item.name, known)));
      }
      if (option->count() > 0) continue;  // the flag wins
      from_file_.insert(item.name);
      // A value with commas arrives in pieces.
      if (option->get_expected_max() <= 1)
        option->add_result(fmt::format("{}", fmt::join(item.inputs, ",")));
      else
        option->add_result(item.inputs);
      try {
        option->run_callback();
      } catch (const CLI::Error&) {
        throw UserError(fmt::format("scenario file '{}': {} cannot be '{}'", file_, item.name,
                                    fmt::join(item.inputs, ",")));
      }
    }
  }
  check_format(format_, {"table", "json"});
  for (const auto& [name, value] : knob_texts_)
    if (command_->get_option("--" + name)->count() > 0) knobs_[name] = value;
}

bool Flags::given(const std::string& setting) const {
  return command_->get_option("--" + setting)->count() > 0;
}

bool Flags::typed(const std::string& setting) const {
  return given(setting) && !from_file_.contains(setting);
}

const std::string& Flags::text(const std::string& setting) const {
  return settings_.at(setting);
}

predict::Scenario Flags::scenario(const std::vector<std::string>& except) const {
  predict::Scenario scenario;
  for (const search::Setting& setting : search::settings()) {
    if (std::string_view(setting.name) == "plan" || std::ranges::find(except, setting.name) != except.end())
      continue;
    setting.set(scenario, settings_.at(setting.name));
  }
  scenario.plan = search::parse_plan(plans_.front());
  if (std::ranges::find(except, "plan") == except.end())
    for (const auto& [name, value] : knobs_)
      if (counts(plans_.front(), name)) plan::set_knob(scenario.plan, name, value);
  return scenario;
}

plan::Plan Flags::plan(const std::string& text) const {
  plan::Plan plan = search::parse_plan(text);
  for (const auto& [name, value] : knobs_)
    if (const plan::Knob& knob = plan::knob(name); search::has_knob(plan, knob) && counts(text, name))
      knob.set(plan, value);
  return plan;
}

bool Flags::counts(const std::string& plan, const std::string& knob) const {
  if (!search::sets(plan, knob)) return true;
  const bool plan_of_file = from_file_.contains("plan"), knob_of_file = from_file_.contains(knob);
  if (plan_of_file == knob_of_file)
    throw UserError(fmt::format("{0} stands in plan '{1}' and as --{0}; write it once", knob, plan));
  return plan_of_file;
}

void Flags::check_knobs() const {
  for (const auto& [name, value] : knobs_) {
    const plan::Knob& knob = plan::knob(name);
    if (std::ranges::none_of(
            plans_, [&](const std::string& p) { return search::has_knob(search::parse_plan(p), knob); }))
      throw UserError(fmt::format("plan setting {} belongs to {}, and no plan given is of that family", name,
                                  knob.mop ? "mop" : "fsdp2"));
  }
}

std::optional<store::Store> Flags::open_store() const {
  if (no_store_ || database_.empty()) return std::nullopt;
  return store::Store(database_, store::Access::kWrite);
}

std::string unknown_of_many(std::string_view what, std::string_view name,
                            std::span<const std::string> known) {
  const std::string message = unknown_name(what, name, known);
  return message.substr(0, message.find("; known:"));
}

void check_format(const std::string& format, const std::vector<std::string>& known) {
  if (std::ranges::find(known, format) == known.end()) throw UserError(unknown_name("format", format, known));
}

}  // namespace mop::cli
