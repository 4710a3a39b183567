#include "sim/validate/suite.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/base/suggest.h"
#include "sim/search/settings.h"
#include "sim/validate/question.h"

namespace mop::validate {
namespace {

using Values = std::vector<std::pair<std::string, std::string>>;

bool is_knob(const std::string& key) {
  return std::ranges::any_of(plan::knobs(), [&](const plan::Knob& knob) { return key == knob.name; });
}

bool is_setting(const std::string& key) {
  return key != "nodes" && key != "gpus-per-node" &&  // mop run takes the number of GPUs
         std::ranges::any_of(search::settings(),
                             [&](const search::Setting& setting) { return key == setting.name; });
}

const std::vector<std::string> kOwn{"gpus", "data", "steps", "seed", "held-out"};

void check_key(const std::string& key) {
  if (is_knob(key) || is_setting(key) || std::ranges::find(kOwn, key) != kOwn.end()) return;
  std::vector<std::string> known = kOwn;
  for (const search::Setting& setting : search::settings())
    if (is_setting(setting.name)) known.emplace_back(setting.name);
  for (const plan::Knob& knob : plan::knobs()) known.emplace_back(knob.name);
  throw UserError(unknown_name("key", key, known));
}

void set(Values& values, const std::string& key, std::string value) {
  const auto found = std::ranges::find(values, key, &Values::value_type::first);
  if (found != values.end())
    found->second = std::move(value);
  else
    values.emplace_back(key, std::move(value));
}

SuiteRun make_run(const std::string& name, const Values& values) {
  SuiteRun run;
  run.name = name;
  predict::Scenario& s = run.scenario;
  for (const search::Setting& setting : search::settings())
    if (*setting.standard != '\0') setting.set(s, setting.standard);
  Values knobs;
  for (const auto& [key, value] : values) {
    if (key == "held-out") {
      if (value != "true" && value != "false")
        throw UserError(fmt::format("held-out is '{}'; write true or false", value));
      run.held_out = value == "true";
      continue;
    }
    if (key == "gpus") run.gpus = parse_count(value, "gpus");
    if (key == "steps") run.steps = parse_count(value, "steps");
    if (key == "model" || key == "cluster")
      search::set(s, key, locate(value));
    else if (is_setting(key))
      search::set(s, key, value);
    else if (is_knob(key))
      knobs.emplace_back(key, value);
    run.flags.emplace_back(key, value);
  }
  if (s.model.name.empty()) throw UserError("no model is given");
  for (const auto& [key, value] : knobs) plan::set_knob(s.plan, key, value);
  if (s.plan.family == plan::Family::fsdp2) s.plan.runtime = plan::Runtime::native;  // as mop run does
  const int64_t node = s.cluster.gpus_per_node();
  if (run.gpus > node && run.gpus % node != 0)
    throw UserError(fmt::format("gpus is {}: neither a part nor a multiple of a node of {}, which has {}",
                                run.gpus, s.cluster.name, node));
  s.nodes = std::max<int64_t>(1, run.gpus / node);
  s.gpus_per_node = std::min(run.gpus, node);
  predict::validate(s);
  return run;
}

}  // namespace

std::vector<SuiteRun> read_suite(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored))
    throw UserError(fmt::format("suite '{}': no such file", path));
  std::vector<CLI::ConfigItem> items;
  try {
    items = CLI::ConfigTOML().from_file(path);
  } catch (const CLI::Error& failure) {
    throw UserError(fmt::format("suite '{}' cannot be read: {}", path, failure.what()));
  }
  Values common;
  std::vector<std::pair<std::string, Values>> sections;
  for (const CLI::ConfigItem& item : items) {
    const std::string section = fmt::format("{}", fmt::join(item.parents, "."));
    try {
      if (item.name == "++") {  // the parser's mark of a section's begin
        if (std::ranges::find(sections, section, &std::pair<std::string, Values>::first) != sections.end())
          throw UserError("the name stands twice");
        sections.emplace_back(section, common);
        continue;
      }
      if (item.name == "--") continue;
      check_key(item.name);
      const std::string value = fmt::format("{}", fmt::join(item.inputs, ","));
      if (item.parents.empty())
        set(common, item.name, value);
      else
        set(sections.back().second, item.name, value);
    } catch (const UserError& error) {
      throw UserError(
          fmt::format("suite '{}'{}{}: {}", path, section.empty() ? "" : ", run ", section, error.what()));
    }
  }
  std::vector<SuiteRun> runs;
  for (const auto& [name, values] : sections) {
    try {
      runs.push_back(make_run(name, values));
    } catch (const UserError& error) {
      throw UserError(fmt::format("suite '{}', run {}: {}", path, name, error.what()));
    }
  }
  if (runs.empty())
    throw UserError(fmt::format("suite '{}' declares no run; write a section [name] for each", path));
  return runs;
}

std::pair<std::string, bool> parse_label(const std::string& label) {
  const bool held_out = label.starts_with(kHeldOut);
  return {held_out ? label.substr(kHeldOut.size()) : label, held_out};
}

std::string commands(const std::vector<SuiteRun>& runs, const std::string& database,
                     const std::string& traces) {
  std::string text = fmt::format("#!/usr/bin/env bash\nmkdir -p {}\n", traces);
  if (std::ranges::any_of(runs, [](const SuiteRun& run) { return run.scenario.nodes > 1; }))
    text +=
        "# on_nodes NODES GPUS COMMAND...: nodes emulated on one host, whose ranks reach other nodes through "
        "NCCL's network "
        "only\n"
        "on_nodes() (\n"
        "  nodes=$1 each=$2; shift 2\n"
        "  export WORLD_SIZE=$((nodes * each)) LOCAL_WORLD_SIZE=$each MASTER_ADDR=127.0.0.1 "
        "MASTER_PORT=${MASTER_PORT:-29617}\n"
        "  export TORCHELASTIC_RUN_ID=suite-$RANDOM NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1\n"
        "  pids= status=0\n"
        "  for rank in $(seq 0 $((nodes * each - 1))); do\n"
        "    node=$((rank / each))\n"
        "    RANK=$rank LOCAL_RANK=$((rank % each)) NCCL_HOSTID=node$node \\\n"
        "      CUDA_VISIBLE_DEVICES=$(seq -s, $((node * each)) $((node * each + each - 1))) \"$@\" &\n"
        "    pids=\"$pids $!\"\n"
        "  done\n"
        "  for pid in $pids; do wait $pid || status=$?; done\n"
        "  exit $status\n"
        ")\n";
  for (const SuiteRun& run : runs) {
    if (run.scenario.nodes > 1)
      text += fmt::format("on_nodes {} {} ", run.scenario.nodes, run.scenario.used_per_node());
    text += "mop run";
    for (const auto& [flag, value] : run.flags)
      if (flag != "gpus" || run.scenario.nodes == 1) text += fmt::format(" --{} {}", flag, value);
    text += fmt::format(" --db {} --label {} --trace {}/{}.trace.json\n", database, run.label(), traces,
                        run.name);
  }
  return text;
}

}  // namespace mop::validate
