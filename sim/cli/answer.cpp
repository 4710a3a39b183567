#include "sim/cli/answer.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "sim/base/quantity.h"
#include "sim/cli/app.h"
#include "sim/cli/text.h"
#include "sim/search/settings.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;
using predict::Named;
using predict::Prediction;
using predict::Scenario;

// "on" -> true, "128K" -> 131072, "1.3" -> 1.3, "inside" -> "inside"
Json typed(const std::string& text) {
  if (text == "on" || text == "off") return text == "on";
  double number = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (status != std::errc()) return text;
  if (end != text.data() + text.size()) return parse_count(text, "a plan setting");
  if (number == static_cast<double>(static_cast<int64_t>(number))) return static_cast<int64_t>(number);
  return number;
}

Json plan_object(const plan::Plan& plan) {
  Json json{{"family", plan::family_name(plan.family)}, {"text", plan::describe(plan)}};
  for (const plan::Knob& knob : plan::knobs())
    if (search::has_knob(plan, knob)) json[knob.name] = typed(knob.get(plan));
  return json;
}

Json bytes_object(std::span<const Named> rows) {
  Json json = Json::object();
  for (const Named& row : rows) json[row.name] = static_cast<int64_t>(row.value);
  return json;
}

Json object(std::span<const Named> rows) {
  Json json = Json::object();
  for (const Named& row : rows) json[row.name] = row.value;
  return json;
}

std::string plural(int64_t count, const char* what) {
  return fmt::format("{} {}{}", format_count(count), what, count == 1 ? "" : "s");
}

std::string of_capacity(int64_t used, int64_t capacity) {
  return fmt::format("{} of {} ({})", format_bytes(static_cast<double>(used)),
                     format_bytes(static_cast<double>(capacity)),
                     percent(static_cast<double>(used) / static_cast<double>(capacity)));
}

std::string breakdown(const char* title, std::span<const Named> rows, double total,
                      std::string (*format)(double)) {
  TextTable table({title, "", ""}, "lrr");
  for (const Named& row : rows) table.add({row.name, format(row.value), percent(row.value / total)});
  return "\n" + table.text();
}

// Names of files need not be UTF-8; JSON must be.
std::string dump(const Json& json, int indent = -1) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

std::string plan_json(const plan::Plan& plan) {
  return dump(plan_object(plan));
}

std::string answer_json(const Scenario& s, const Prediction& p) {
  const auto timed = [&](Json value) { return p.step_time ? std::move(value) : Json(); };
  const model::Parameters parameters = model::count_parameters(s.model);
  const Json json{
      {"model", s.model.name},
      {"cluster", s.cluster.name},
      {"nodes", s.nodes},
      {"gpus_per_node", s.used_per_node()},
      {"gpus", s.gpus()},
      {"context", s.workload.context},
      {"sequences", s.workload.sequences},
      {"accumulate", s.workload.accumulate},
      {"precision", plan::name(s.workload.precision)},
      {"balance_loss", s.workload.balance_loss},
      {"routing", plan::describe(s.workload.routing)},
      {"plan", plan_object(s.plan)},
      {"calibration", cost::name(s.calibration)},
      {"fits", p.fits},
      {"why_not", p.fits ? Json() : Json(p.why_not)},
      {"hbm_allocated_bytes", p.hbm_allocated},
      {"hbm_arena_bytes", p.hbm_arena},
      {"hbm_peak_bytes", p.hbm_peak},
      {"hbm_capacity_bytes", p.hbm_capacity},
      {"host_peak_bytes", p.host_peak},
      {"host_capacity_bytes", p.host_capacity},
      {"step_time_s", timed(p.step_time.value_or(0))},
      {"clock_hz", p.clock ? Json(*p.clock) : Json()},
      {"estimate_s", timed(p.estimate)},
      {"tokens_per_step", p.tokens_per_step},
      {"tokens_per_s_per_gpu", timed(p.tokens_per_s_per_gpu)},
      {"model_flops_per_token", p.model_flops_per_token},
      {"mfu", timed(p.mfu)},
      {"memory_by_component", bytes_object(p.memory)},
      {"host_memory_by_component", bytes_object(p.host_memory)},
      {"time_by_component", timed(object(p.time))},
      {"time_by_operation", timed(object(p.time_by_kind))},
      {"exposed_communication_s", timed(p.exposed_communication)},
      {"compute_busy_s", timed(p.compute_busy)},
      {"resource_use", timed(object(p.busy))},
      {"bound_by", p.bound_by},
      {"imbalance", p.imbalance},
      {"warnings", p.warnings},
      {"parameters_total", parameters.total},
      {"parameters_active", parameters.active},
      {"ops_per_rank", p.program_operations},
      {"ops_simulated", p.operations},
      {"rank_classes", p.classes},
      {"steady", p.steady},
      {"version", kVersion},
      {"wall_time_s", p.wall_time},
  };
  return dump(json);
}

std::string pretty(const std::string& json) {
  return dump(Json::parse(json), 2);
}

std::string pretty_array(std::span<const std::string> json_objects) {
  Json array = Json::array();
  for (const std::string& object : json_objects) array.push_back(Json::parse(object));
  return dump(array, 2);
}

store::Keys keys_of(const Scenario& s) {
  // The model and the cluster by content: a file of the same name may have changed.
  const model::ModelConfig& m = s.model;
  const model::Parameters parameters = model::count_parameters(m);
  const model::Flops flops = model::flops_per_token(m, s.workload.context);
  Json figures = Json::object();
  for (const auto& [name, figure] : s.cluster.figures) figures[name] = figure.value;
  const Json inputs{
      {"model", m.name},
      {"shape",
       {m.layers, m.hidden, m.vocab, m.heads, m.kv_heads, m.experts, m.top_k, m.expert_intermediate}},
      {"parameters", {parameters.total, parameters.active}},
      {"flops_per_token", flops.total()},
      {"cluster", s.cluster.name},
      {"figures", figures},
      {"nodes", s.nodes},
      {"gpus", s.gpus()},
      {"context", s.workload.context},
      {"sequences", s.workload.sequences},
      {"accumulate", s.workload.accumulate},
      {"precision", plan::name(s.workload.precision)},
      {"balance_loss", s.workload.balance_loss},
      {"routing", plan::describe(s.workload.routing)},
      {"routing_counts", s.workload.routing.counts},
      {"plan", plan_object(s.plan)},
      {"calibration", cost::name(s.calibration)},
      {"version", kVersion},
  };
  return store::keys_of(dump(inputs));
}

store::RunRecord record(const std::string& key, const Scenario& s, const Prediction& p,
                        const std::string& command_line, const std::string& sweep) {
  store::RunRecord r;
  r.kind = store::kPrediction;
  r.created = store::now_utc();
  r.version = kVersion;
  r.command = command_line;
  r.machine = s.cluster.name;
  r.sweep = sweep;
  r.key = key;
  r.scenario = keys_of(s).scenario;
  r.model = s.model.name;
  r.cluster = s.cluster.name;
  r.nodes = s.nodes;
  r.gpus = s.gpus();
  r.context = s.workload.context;
  r.sequences = s.workload.sequences;
  r.accumulate = s.workload.accumulate;
  r.plan_family = plan::family_name(s.plan.family);
  r.plan = plan::describe(s.plan);
  r.calibration = cost::name(s.calibration);
  r.fits = p.fits;
  r.hbm_allocated_bytes = p.hbm_allocated;
  r.hbm_peak_bytes = p.hbm_peak;
  r.hbm_capacity_bytes = p.hbm_capacity;
  r.host_peak_bytes = p.host_peak;
  r.host_capacity_bytes = p.host_capacity;
  r.tokens_per_step = p.tokens_per_step;
  r.model_flops_per_token = p.model_flops_per_token;
  r.bound_by = p.bound_by;
  r.detail = answer_json(s, p);
  if (p.step_time) {
    r.step_time_s = p.step_time;
    r.tokens_per_s_per_gpu = p.tokens_per_s_per_gpu;
    r.mfu = p.mfu;
    r.exposed_communication_s = p.exposed_communication;
  }
  return r;
}

std::string headline(const Scenario& s) {
  return fmt::format(
      "{} on {} x {} GPUs of {} ({}), calibration {}\ncontext {}, {} a group, {} a step, {} routing, {}{}\n",
      s.model.name, s.nodes, s.used_per_node(), s.cluster.name, plural(s.gpus(), "GPU"),
      cost::name(s.calibration), format_count(s.workload.context), plural(s.workload.sequences, "sequence"),
      fmt::format("{} micro-batch{}", s.workload.accumulate, s.workload.accumulate == 1 ? "" : "es"),
      plan::describe(s.workload.routing), plan::name(s.workload.precision),
      s.workload.balance_loss ? ", balance loss" : "");
}

std::string answer_text(const Scenario& s, const Prediction& p) {
  std::string text = headline(s) + fmt::format("plan {}\n\n", plan::describe(s.plan));
  TextTable facts({"fits", p.fits ? "yes" : "no: " + p.why_not}, "ll");
  facts.add({"HBM a GPU", of_capacity(p.hbm_peak, p.hbm_capacity)});
  facts.add({"host a node", of_capacity(p.host_peak, p.host_capacity)});
  if (p.step_time) {
    std::string step = format_seconds(*p.step_time);
    if (p.estimate > 0)
      step += fmt::format(" (closed-form estimate {}, {:+.0f} %: without {}launches and waits)",
                          format_seconds(p.estimate), 100 * (p.estimate / *p.step_time - 1),
                          s.plan.native() ? "memory-bound kernels, " : "");
    facts.add({"step time", step});
    if (p.clock)
      facts.add({"clock", fmt::format("{:.2f} of {:.2f} GHz, within {:.0f} W", *p.clock * 1e-9,
                                      s.cluster["largest_clock_hz"] * 1e-9, s.cluster["power_limit_w"])});
    facts.add(
        {"throughput", fmt::format("{:.1f} tokens/s/GPU, MFU {}", p.tokens_per_s_per_gpu, percent(p.mfu))});
  }
  facts.add({"tokens", fmt::format("{} a step", format_count(p.tokens_per_step))});
  if (p.step_time) {
    facts.add({"communication", fmt::format("{} exposed", format_seconds(p.exposed_communication))});
    facts.add({"imbalance", fmt::format("{:.2f} (rows of the fullest rank over the mean, before balancing)",
                                        p.imbalance)});
  }
  facts.add({"bound by", p.bound_by});
  text += facts.text();
  text += breakdown("HBM of the fullest GPU", p.memory, static_cast<double>(p.hbm_peak), format_bytes);
  if (!p.host_memory.empty())
    text += breakdown("host memory of the fullest node", p.host_memory, static_cast<double>(p.host_peak),
                      format_bytes);
  if (p.step_time) {
    text += breakdown("time on the critical path", p.time, *p.step_time, format_seconds);
    TextTable use({"resource, busiest GPU or node", "use"}, "lr");
    for (const Named& row : p.busy) use.add({row.name, percent(row.value)});
    text += "\n" + use.text();
    text += fmt::format("\n{} operations simulated in {} ({})\n", p.operations, format_seconds(p.wall_time),
                        fmt::format("{} rank class{}", p.classes, p.classes == 1 ? "" : "es"));
  }
  return text + warnings_text(p.warnings);
}

std::string warnings_text(std::span<const std::string> warnings) {
  constexpr size_t most = 6;
  std::vector<std::string> distinct;
  for (const std::string& warning : warnings)
    if (std::ranges::find(distinct, warning) == distinct.end()) distinct.push_back(warning);
  std::string text;
  for (size_t i = 0; i < std::min(most, distinct.size()); ++i)
    text += fmt::format("warning: {}\n", distinct[i]);
  if (distinct.size() > most)
    text += fmt::format("warning: and {} more, which --format json lists\n", distinct.size() - most);
  return text.empty() ? text : "\n" + text;
}

}  // namespace mop::cli
