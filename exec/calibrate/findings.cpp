#include "exec/calibrate/findings.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/base/median.h"

namespace mop::calibrate {
namespace {

using Json = nlohmann::json;

constexpr double kPiece = 0.25;

Json json_of(const Reading& r) {
  return {r.value, r.low, r.high};
}
// The value is part of what was measured: a window's mean may lie beside all its pieces, as what is left of
// it after the last whole piece counts in the mean alone.
Reading within(double value, double low, double high) {
  return {value, std::min(low, 1.0), std::max(high, 1.0)};
}
Reading reading_from(const Json& json) {
  return within(json.at(0).get<double>(), json.at(1).get<double>(), json.at(2).get<double>());
}

// low, high: of what was measured.
Reading between(double value, double low, double high) {
  return value > 0 ? within(value, low / value, high / value) : Reading{value, 1, 1};
}

}  // namespace

Reading reading_of(std::vector<double> values) {
  ensure(!values.empty(), "something was measured");
  std::ranges::sort(values);
  return between(median(values), values.front(), values.back());
}

Reading slowest(const std::vector<std::vector<double>>& rates) {
  std::vector<double> all, medians;
  for (const std::vector<double>& own : rates)
    if (!own.empty()) medians.push_back(median(own)), all.insert(all.end(), own.begin(), own.end());
  ensure(!all.empty(), "something was measured");
  return between(std::ranges::min(medians), std::ranges::min(all), std::ranges::max(all));
}

Rates rates_of(const std::vector<double>& seconds, double amount) {
  Rates rates;
  double all = 0, piece = 0;
  int runs = 0;
  for (const double one : seconds) {
    all += one, piece += one, ++runs;
    if (piece < kPiece) continue;
    rates.shown.push_back(amount * runs / piece);
    piece = 0, runs = 0;
  }
  if (seconds.empty()) return rates;
  rates.mean = {amount * static_cast<double>(seconds.size()) / all};
  if (rates.shown.empty()) rates.shown = rates.mean;
  return rates;
}

Reading mean_of(const Rates& rates) {
  ensure(!rates.mean.empty() && !rates.shown.empty(), "something was measured");
  return between(median(rates.mean), std::ranges::min(rates.shown), std::ranges::max(rates.shown));
}

void Findings::add(Findings more) {
  if (machine.empty()) machine = more.machine, libraries = more.libraries;
  cut_short.insert(cut_short.end(), more.cut_short.begin(), more.cut_short.end());
  unsupported.insert(unsupported.end(), more.unsupported.begin(), more.unsupported.end());
  figures.merge(more.figures);
  tables.merge(more.tables);
  seconds.merge(more.seconds);
}

std::string to_json(const Findings& findings) {
  Json json{{"machine", findings.machine},     {"libraries", findings.libraries},
            {"cut_short", findings.cut_short}, {"unsupported", findings.unsupported},
            {"figures", Json::object()},       {"tables", Json::object()},
            {"seconds", findings.seconds}};
  for (const auto& [name, figure] : findings.figures)
    json["figures"][name] = {{"what", figure.what}, {"reading", json_of(figure.reading)}};
  for (const auto& [name, table] : findings.tables) {
    Json points = Json::array();
    for (const auto& [at, reading] : table.points)
      points.push_back({{"at", at}, {"reading", json_of(reading)}});
    json["tables"][name] = {{"what", table.what}, {"points", points}};
  }
  return json.dump();
}

Findings from_json(const std::string& text) {
  try {
    const Json json = Json::parse(text);
    Findings f{json.at("machine"), json.at("libraries"), json.at("cut_short"), json.at("unsupported"), {}, {},
               json.at("seconds")};
    for (const auto& [name, figure] : json.at("figures").items())
      f.figures[name] = {reading_from(figure.at("reading")), figure.at("what")};
    for (const auto& [name, table] : json.at("tables").items()) {
      f.tables[name].what = table.at("what");
      for (const Json& point : table.at("points"))
        f.tables[name].points.emplace_back(point.at("at").get<std::vector<double>>(),
                                           reading_from(point.at("reading")));
    }
    return f;
  } catch (const Json::exception& error) {
    throw InternalError(std::string("the benchmarks' findings are no such JSON: ") + error.what());
  }
}

}  // namespace mop::calibrate
