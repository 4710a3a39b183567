#include <fmt/format.h>

#include <iostream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cli/commands.h"
#include "sim/cli/comparisons.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/store/columns.h"
#include "sim/store/csv.h"
#include "sim/store/store.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;

// A column's value for people: sizes and times with their units.
std::string readable(const store::RunRecord& record, const std::string& name) {
  const store::Value value = store::value_of(record, store::column(name));
  if (std::holds_alternative<std::monostate>(value)) return "-";
  if (name == "fits") return record.fits ? "yes" : "no";
  if (const int64_t* whole = std::get_if<int64_t>(&value)) {
    if (name.ends_with("_bytes")) return format_bytes(static_cast<double>(*whole));
    return name == "context" || name == "tokens_per_step" ? format_count(*whole) : std::to_string(*whole);
  }
  if (const double* real = std::get_if<double>(&value)) {
    if (name.ends_with("_s")) return format_seconds(*real);
    return name == "mfu" ? percent(*real) : fmt::format("{:.6g}", *real);
  }
  return store::to_text(value);
}

Json json_of(const store::RunRecord& record, const std::vector<std::string>& columns) {
  Json json = Json::object();
  for (const std::string& name : columns) {
    const store::Value value = store::value_of(record, store::column(name));
    if (name == "detail")
      json[name] = Json::parse(record.detail);
    else if (name == "fits")
      json[name] = record.fits;
    else
      std::visit(
          [&](const auto& held) {
            if constexpr (std::is_same_v<std::decay_t<decltype(held)>, std::monostate>)
              json[name] = nullptr;
            else
              json[name] = held;
          },
          value);
  }
  return json;
}

struct Results {
  std::string database = "results.db", format = "table";
  std::vector<std::string> where, order, columns;
  int64_t limit = 0;
  bool compare = false;

  explicit Results(CLI::App& command) {
    command.add_option("--db", database, "database")->type_name("FILE")->default_str(database);
    command.add_option("--where", where, "conditions that all hold: model=kimi-k2 'context>=128K' fits=1")
        ->type_name("CONDITION...");
    command.add_option("--order", order, "columns, the first decides; -mfu: largest first")
        ->type_name("COLUMN...")
        ->delimiter(',');
    CLI::Option* chosen = command.add_option("--columns", columns, "columns to print; 'all' for every one");
    chosen->type_name("COLUMN...")->delimiter(',');
    command.add_option("--limit", limit, "most rows; 0: all")->type_name("N")->default_str("0");
    command
        .add_flag("--compare", compare,
                  "measurements beside the predictions that were stored with them, and the errors")
        ->excludes(chosen);
    command.add_option("--format", format, "table, json or csv")->type_name("FORM")->default_str(format);
    command.footer(
        "Example:\n"
        "  mop results --where model=kimi-k2 'context>=128K' fits=1 --order=-tokens_per_s_per_gpu --limit "
        "10\n"
        "  mop results --where sweep=sweep --format csv > rows.csv\n"
        "  mop results --compare --where model=gpt-oss-20b --order=-id");
  }

  void run() {
    check_format(format, {"table", "json", "csv"});
    if (compare) return print_compared();
    if (columns.size() == 1 && columns[0] == "all") {
      columns.clear();
      for (const store::Column& column : store::columns())
        if (format == "json" || column.name != "detail") columns.push_back(column.name);
    } else if (columns.empty()) {
      columns = {"kind",
                 "model",
                 "cluster",
                 "gpus",
                 "context",
                 "plan",
                 "fits",
                 "hbm_peak_bytes",
                 "step_time_s",
                 "tokens_per_step",
                 "tokens_per_s_per_gpu",
                 "mfu",
                 "bound_by"};
    }
    for (const std::string& name : columns) store::column(name);
    const bool detail = std::ranges::find(columns, "detail") != columns.end();
    const std::vector<store::RunRecord> records =
        store::Store(database, store::Access::kRead).query({where, order, limit, detail});
    if (format == "csv") {
      store::write_csv(std::cout, records, columns);
    } else if (format == "json") {
      Json array = Json::array();
      for (const store::RunRecord& record : records) array.push_back(json_of(record, columns));
      fmt::print("{}\n", array.dump(2));
    } else {
      TextTable table(columns, std::string(columns.size(), 'l'));
      for (const store::RunRecord& record : records) {
        std::vector<std::string> row;
        for (const std::string& name : columns) row.push_back(readable(record, name));
        table.add(row);
      }
      fmt::print("{}{} record{}\n", table.text(), records.size(), records.size() == 1 ? "" : "s");
    }
  }

  // As it was predicted then; mop validate predicts again.
  void print_compared() const {
    if (format == "csv") throw UserError("--compare prints a table or json; give --format json");
    const store::Store store(database, store::Access::kRead);
    std::vector<std::string> measured = where;
    measured.push_back(fmt::format("kind={}", store::kMeasurement));
    const std::vector<store::RunRecord> records = store.query({measured, order, limit, false});
    TextTable table({"id", "run", "plan", "GPUs", "context", "step", "predicted", "error", "GPU memory",
                     "predicted", "error", "host", "predicted", "error"},
                    "rllrrrrrrrrrrr");
    Json array = Json::array();
    for (const store::RunRecord& m : records) {
      const std::optional<store::RunRecord> p = prediction_beside(store, m);
      std::vector<std::string> row{std::to_string(m.id.value_or(0)), m.label.empty() ? m.model : m.label,
                                   m.plan_family, std::to_string(m.gpus), format_count(m.context)};
      Json json{{"id", m.id.value_or(0)}, {"label", m.label}, {"model", m.model},
                {"plan", m.plan},         {"gpus", m.gpus},   {"context", m.context}};
      for (const char* name : {"step_time_s", "hbm_peak_bytes", "host_peak_bytes"}) {
        const double is = number(m, name), said = p ? number(*p, name) : kUnknown;
        // Of the CPU backend only arenas are known, which leave out what a GPU's libraries take.
        const bool alike = m.cluster != "cpu" || std::string_view(name) != "hbm_peak_bytes";
        const double error = alike && said == is ? 0 : alike && is > 0 ? said / is - 1 : kUnknown;
        row.push_back(readable(m, name));
        row.push_back(p ? readable(*p, name) : "-");
        row.push_back(signed_percent(error));
        json[name] = json_of(m, {name})[name];
        json[fmt::format("predicted_{}", name)] = p ? json_of(*p, {name})[name] : Json();
        json[fmt::format("{}_error", name)] = error;  // what is not known becomes null
      }
      table.add(std::move(row));
      array.push_back(std::move(json));
    }
    if (format == "json")
      fmt::print("{}\n", array.dump(2));
    else
      fmt::print("{}{} measurement{}\n", table.text(), records.size(), records.size() == 1 ? "" : "s");
  }

  static constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  static double number(const store::RunRecord& record, const char* name) {
    const store::Value value = store::value_of(record, store::column(name));
    if (const int64_t* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
    if (const double* real = std::get_if<double>(&value)) return *real;
    return kUnknown;
  }
};

}  // namespace

void add_results(CLI::App& program) {
  CLI::App* command = program.add_subcommand("results", "list and query what was stored");
  const auto results = std::make_shared<Results>(*command);
  command->callback([results] { results->run(); });
}

}  // namespace mop::cli
