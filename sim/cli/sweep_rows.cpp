#include "sim/cli/sweep_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "sim/base/quantity.h"
#include "sim/cli/text.h"
#include "sim/store/columns.h"

namespace mop::cli {
namespace {

constexpr std::array kQuestion{"model",     "cluster",    "nodes",       "gpus",       "context",
                               "sequences", "accumulate", "calibration", "plan_family"};
constexpr std::array kDetail{"routing", "precision", "balance_loss"};  // of the question, in the JSON only
constexpr std::array kAnswer{"plan",
                             "fits",
                             "hbm_allocated_bytes",
                             "hbm_peak_bytes",
                             "hbm_capacity_bytes",
                             "host_peak_bytes",
                             "host_capacity_bytes",
                             "step_time_s",
                             "tokens_per_step",
                             "tokens_per_s_per_gpu",
                             "model_flops_per_token",
                             "mfu",
                             "exposed_communication_s",
                             "bound_by",
                             "key"};

std::string quoted(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string result = "\"";
  for (const char c : text) result.append(c == '"' ? 2 : 1, c);
  result += '"';
  return result;
}

std::string text_of(const nlohmann::json& value) {
  if (value.is_null()) return "";
  return value.is_string() ? value.get<std::string>() : value.dump();
}

}  // namespace

std::string sweep_csv(std::span<const store::RunRecord> rows, std::span<const std::string> swept_knobs) {
  std::string text;
  const auto add = [&text](const std::string& field) { text.append(quoted(field)).append(","); };
  const auto end_line = [&text] { text.back() = '\n'; };
  for (const char* name : kQuestion) add(name);
  for (const char* name : kDetail) add(name);
  for (const std::string& knob : swept_knobs) add(knob);
  for (const char* name : kAnswer) add(name);
  end_line();
  for (const store::RunRecord& row : rows) {
    const nlohmann::json detail = nlohmann::json::parse(row.detail);
    for (const char* name : kQuestion) add(store::to_text(store::value_of(row, store::column(name))));
    for (const char* name : kDetail) add(text_of(detail.at(name)));
    for (const std::string& knob : swept_knobs) add(text_of(detail.at("plan").value(knob, nlohmann::json())));
    for (const char* name : kAnswer) add(store::to_text(store::value_of(row, store::column(name))));
    end_line();
  }
  return text;
}

std::string fastest_table(std::span<const store::RunRecord> rows, size_t most) {
  std::vector<const store::RunRecord*> best;
  for (const store::RunRecord& row : rows)
    if (row.fits) best.push_back(&row);
  std::ranges::stable_sort(best, [](const auto* a, const auto* b) {
    return a->tokens_per_s_per_gpu.value_or(0) > b->tokens_per_s_per_gpu.value_or(0);
  });
  best.resize(std::min(best.size(), most));
  TextTable table({"nodes", "context", "sequences", "accumulate", "routing", "HBM/GPU", "step",
                   "tokens/s/GPU", "MFU", "plan"},
                  "rrrrlrrrrl");
  for (const store::RunRecord* row : best)
    table.add({std::to_string(row->nodes), format_count(row->context), std::to_string(row->sequences),
               std::to_string(row->accumulate), text_of(nlohmann::json::parse(row->detail).at("routing")),
               format_bytes(static_cast<double>(row->hbm_peak_bytes.value_or(0))),
               format_seconds(row->step_time_s.value_or(0)),
               fmt::format("{:.1f}", row->tokens_per_s_per_gpu.value_or(0)), percent(row->mfu.value_or(0)),
               row->plan});
  return table.text();
}

}  // namespace mop::cli
