#include "sim/store/columns.h"

#include <fmt/format.h>

#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/suggest.h"

namespace mop::store {
namespace {

template <class T>
inline constexpr bool is_optional = false;
template <class T>
inline constexpr bool is_optional<std::optional<T>> = true;

}  // namespace

std::span<const Column> columns() {
#define MOP_COLUMN(name) \
  { #name, &RunRecord::name }
  static const std::vector<Column> all = {
      MOP_COLUMN(id),
      MOP_COLUMN(kind),
      MOP_COLUMN(created),
      MOP_COLUMN(version),
      MOP_COLUMN(command),
      MOP_COLUMN(machine),
      MOP_COLUMN(sweep),
      MOP_COLUMN(key),
      MOP_COLUMN(scenario),
      MOP_COLUMN(model),
      MOP_COLUMN(cluster),
      MOP_COLUMN(nodes),
      MOP_COLUMN(gpus),
      MOP_COLUMN(context),
      MOP_COLUMN(sequences),
      MOP_COLUMN(accumulate),
      MOP_COLUMN(plan_family),
      MOP_COLUMN(plan),
      MOP_COLUMN(calibration),
      MOP_COLUMN(fits),
      MOP_COLUMN(hbm_allocated_bytes),
      MOP_COLUMN(hbm_peak_bytes),
      MOP_COLUMN(hbm_capacity_bytes),
      MOP_COLUMN(host_peak_bytes),
      MOP_COLUMN(host_capacity_bytes),
      MOP_COLUMN(step_time_s),
      MOP_COLUMN(tokens_per_step),
      MOP_COLUMN(tokens_per_s_per_gpu),
      MOP_COLUMN(model_flops_per_token),
      MOP_COLUMN(mfu),
      MOP_COLUMN(exposed_communication_s),
      MOP_COLUMN(bound_by),
      MOP_COLUMN(detail),
      MOP_COLUMN(label),
  };
#undef MOP_COLUMN
  return all;
}

const Column& column(std::string_view name) {
  const auto found = std::ranges::find(columns(), name, &Column::name);
  if (found != columns().end()) return *found;
  std::vector<std::string> names;
  for (const Column& known : columns()) names.push_back(known.name);
  throw UserError(unknown_name("column", name, names));
}

Value value_of(const RunRecord& record, const Column& column) {
  return std::visit(
      [&](auto field) -> Value {
        const auto& held = record.*field;
        using Held = std::remove_cvref_t<decltype(held)>;
        if constexpr (std::is_same_v<Held, bool>) {
          return int64_t{held};
        } else if constexpr (is_optional<Held>) {
          return held ? Value(*held) : Value();
        } else {
          return held;
        }
      },
      column.field);
}

void set_value(RunRecord& record, const Column& column, const Value& value) {
  std::visit(
      [&](auto field) {
        auto& held = record.*field;
        using Held = std::remove_cvref_t<decltype(held)>;
        if constexpr (std::is_same_v<Held, bool>) {
          held = std::get<int64_t>(value) != 0;
        } else if constexpr (is_optional<Held>) {
          held.reset();
          if (value.index() != 0) held = std::get<typename Held::value_type>(value);
        } else {
          held = std::get<Held>(value);
        }
      },
      column.field);
}

std::string to_text(const Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  if (const auto* whole = std::get_if<int64_t>(&value)) return fmt::format("{}", *whole);
  if (const auto* real = std::get_if<double>(&value)) return fmt::format("{}", *real);
  return "";
}

}  // namespace mop::store
