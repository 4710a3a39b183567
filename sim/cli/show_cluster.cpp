#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "sim/base/quantity.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;

// Names of figures end in their unit (cluster.h).
const char* unit_of(const std::string& name) {
  if (name.ends_with("_flops")) return "FLOP/s";
  if (name.ends_with("_bw")) return "B/s";
  if (name.ends_with("_bytes")) return "B";
  if (name.ends_with("_ns")) return "ns";
  if (name.find("_rate") != std::string::npos) return "1/s";
  return "";
}

std::string readable(const std::string& name, double value) {
  const std::string unit = unit_of(name);
  if (unit == "FLOP/s") return fmt::format("{:.1f} TFLOP/s", value / 1e12);
  if (unit == "B/s") return fmt::format("{:.1f} GB/s", value / 1e9);
  if (unit == "B") return format_bytes(value);
  if (unit == "ns") return format_seconds(value * 1e-9);
  if (unit == "1/s") return fmt::format("{:.2f} G/s", value / 1e9);
  return fmt::format("{:g}", value);
}

void print_json(const cluster::ClusterModel& cluster) {
  Json json{{"cluster", cluster.name},
            {"description", cluster.description},
            {"gpus_per_node", cluster.gpus_per_node()}};
  for (const auto& [name, figure] : cluster.figures)
    json["figures"][name] = {{"value", figure.value},
                             {"unit", unit_of(name)},
                             {"source", cluster::name(figure.source)},
                             {"where", figure.where}};
  json["tables"] = Json::object();
  for (const auto& [name, table] : cluster.tables)
    json["tables"][name] = {{"source", cluster::name(table.source)}, {"where", table.where}};
  fmt::print("{}\n", json.dump(2));
}

void print_text(const cluster::ClusterModel& cluster) {
  fmt::print("{}: {}\n\n", cluster.name, cluster.description);
  TextTable figures({"figure", "value", "source", "where"}, "lrll");
  for (const auto& [name, figure] : cluster.figures)
    figures.add({name, readable(name, figure.value), cluster::name(figure.source), figure.where});
  TextTable tables({"table", "source", "where"}, "lll");
  for (const auto& [name, table] : cluster.tables)
    tables.add({name, cluster::name(table.source), table.where});
  fmt::print("{}\n{}", figures.text(), tables.text());
}

}  // namespace

void add_show_cluster(CLI::App& show) {
  CLI::App* command = show.add_subcommand("cluster", "every speed and size, and where it comes from");
  command->footer("Example:\n  mop show cluster --cluster h200");
  const auto flags = std::make_shared<Flags>(*command, Flags::Values::one, std::vector<std::string>{"mop"});
  command->callback([flags] {
    flags->read_file();
    const predict::Scenario s = flags->scenario({"model"});
    (flags->json() ? print_json : print_text)(s.cluster);
  });
}

}  // namespace mop::cli
