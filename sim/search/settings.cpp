#include "sim/search/settings.h"

#include <fmt/format.h>

#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/base/suggest.h"

namespace mop::search {

using predict::Scenario;

namespace {

plan::Precision parse_precision(const std::string& text) {
  for (const plan::Precision precision : {plan::Precision::bf16, plan::Precision::fp32})
    if (text == plan::name(precision)) return precision;
  throw UserError(fmt::format("precision is '{}': it takes bf16 or fp32", text));
}

bool parse_switch(const std::string& text, const char* name) {
  if (text == "on" || text == "true") return true;
  if (text == "off" || text == "false") return false;
  throw UserError(fmt::format("{} is '{}': it takes on or off", name, text));
}

}  // namespace

const std::vector<Setting>& settings() {
  static const std::vector<Setting> all{
      {"model", "", "NAME|PATH", "shipped model, or a Hugging Face config.json or its folder",
       [](Scenario& s, const std::string& text) {
         if (text.empty())
           throw UserError("no model is given; write --model kimi-k2, or the path of a config.json");
         s.model = model::read_config(text);
       }},
      {"cluster", "h200", "NAME|PATH", "shipped cluster, or the path of a cluster file",
       [](Scenario& s, const std::string& text) { s.cluster = cluster::read_cluster(text); }},
      {"nodes", "1", "N", "nodes of the cluster",
       [](Scenario& s, const std::string& text) { s.nodes = parse_count(text, "nodes"); }},
      {"gpus-per-node", "all", "N", "GPUs used of each node",
       [](Scenario& s, const std::string& text) {
         s.gpus_per_node = text == "all" ? 0 : parse_count(text, "gpus-per-node");
       }},
      {"context", "4096", "TOKENS", "tokens of one sequence: 4096, 128K, 1M",
       [](Scenario& s, const std::string& text) { s.workload.context = parse_count(text, "context"); }},
      {"sequences", "1", "N", "sequences of a micro-batch, for each group of GPUs that shares sequences",
       [](Scenario& s, const std::string& text) { s.workload.sequences = parse_count(text, "sequences"); }},
      {"accumulate", "1", "N", "micro-batches of an optimizer step",
       [](Scenario& s, const std::string& text) { s.workload.accumulate = parse_count(text, "accumulate"); }},
      {"precision", "bf16", "TYPE", "of weights and activations while they are computed with: bf16 or fp32",
       [](Scenario& s, const std::string& text) { s.workload.precision = parse_precision(text); }},
      {"balance-loss", "off", "on|off", "add the router's load-balancing loss, with the model's coefficient",
       [](Scenario& s, const std::string& text) {
         s.workload.balance_loss = parse_switch(text, "balance-loss");
       }},
      {"calibration", "measured", "NAME", "where speeds come from: measured, or paper (a fit to one table)",
       [](Scenario& s, const std::string& text) { s.calibration = cost::parse_calibration(text); }},
      {"routing", "balanced", "FORM",
       "balanced, zipf:1.2, hot:0.3@4 or histogram:FILE; then ,seed=7 ,independent",
       [](Scenario& s, const std::string& text) { s.workload.routing = plan::parse_routing(text); }},
      {"plan", "mop", "PLAN", "mop, fsdp2, fsdp2-best (all chosen), or with settings: fsdp2:ep=8,cp=2",
       [](Scenario& s, const std::string& text) { s.plan = parse_plan(text); }},
  };
  return all;
}

void set(Scenario& scenario, const std::string& name, const std::string& text) {
  const auto setting = std::ranges::find(settings(), name, &Setting::name);
  if (setting != settings().end())
    setting->set(scenario, text);
  else
    plan::set_knob(scenario.plan, name, text);
}

plan::Plan parse_plan(const std::string& text) {
  constexpr std::string_view kBest = "fsdp2-best";
  const std::string family = text.substr(0, text.find(':'));
  if (family != kBest && family != "fsdp2" && family != "mop") {
    const std::vector<std::string> known{"fsdp2", std::string(kBest), "mop"};
    throw UserError(unknown_name("plan", family, known));
  }
  if (family != kBest) return plan::parse_plan(text);
  plan::Plan plan = plan::parse_plan("fsdp2" + text.substr(kBest.size()));
  for (const plan::Knob& knob : plan::knobs())
    if (knob.fsdp2 && std::string_view(knob.values).starts_with("auto") && !sets(text, knob.name))
      knob.set(plan, "auto");
  return plan;
}

bool sets(const std::string& plan, const std::string& knob) {
  const size_t colon = plan.find(':');
  if (colon == std::string::npos) return false;
  return (',' + plan.substr(colon + 1)).find(',' + knob + '=') != std::string::npos;
}

bool has_knob(const plan::Plan& plan, const plan::Knob& knob) {
  return plan.family == plan::Family::mop ? knob.mop : knob.fsdp2;
}

}  // namespace mop::search
