#include "sim/search/sweep.h"

#include <fmt/format.h>

#include <algorithm>
#include <mutex>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/search/parallel.h"
#include "sim/search/planner.h"
#include "sim/search/settings.h"

namespace mop::search {
namespace {

constexpr size_t kMostPoints = 1'000'000;

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> items;
  for (size_t comma; (comma = text.find(',')) != std::string_view::npos; text.remove_prefix(comma + 1))
    items.push_back(text.substr(0, comma));
  items.push_back(text);
  return items;
}

Outcome answer(size_t index, const std::function<predict::Scenario(size_t)>& question) {
  Outcome outcome;
  outcome.index = index;
  try {
    outcome.scenario = question(index);
    outcome.scenario.plan = choose(outcome.scenario);
    outcome.prediction = predict::predict(outcome.scenario);
  } catch (const UserError& error) {
    outcome.why_not = error.what();
  }
  return outcome;
}

}  // namespace

std::vector<std::string> expand_range(std::string_view text, std::string_view what) {
  std::vector<std::string> values;
  for (const std::string_view item : split(text)) {
    const size_t dots = item.find("..");
    if (item.empty()) throw UserError(fmt::format("{} is '{}': a value of the list is empty", what, text));
    if (dots == std::string_view::npos) {
      values.emplace_back(item);
      continue;
    }
    const int64_t first = parse_count(item.substr(0, dots), what),
                  last = parse_count(item.substr(dots + 2), what);
    if (first > last)
      throw UserError(fmt::format("{} is '{}': the range falls; write {}..{}", what, item, format_count(last),
                                  format_count(first)));
    int64_t value = first;
    for (; value < last; value *= 2) {
      values.push_back(format_count(value));
      if (value > last / 2) break;
    }
    if (value != last)
      throw UserError(fmt::format(
          "{} is '{}': a range doubles, and {} is not reached by doubling {}; list the values "
          "instead: {},...,{}",
          what, item, format_count(last), format_count(first), format_count(first), format_count(last)));
    values.push_back(format_count(last));
  }
  return values;
}

std::vector<std::string> split_routings(std::string_view text) {
  std::vector<std::string> routings;
  for (const std::string_view item : split(text)) {
    const bool option = item.starts_with("seed=") || item == "independent";
    if (option && !routings.empty())
      routings.back().append(",").append(item);
    else
      routings.emplace_back(item);
  }
  return routings;
}

size_t count_points(const Sweep& sweep) {
  size_t count = 1;
  for (const Axis& axis : sweep.axes) {
    // A knob is tried on both families: whether a point's plan has it is not known here.
    const bool is_setting = std::ranges::find(settings(), axis.name, &Setting::name) != settings().end();
    for (const std::string& value : axis.values) {
      predict::Scenario scenario = sweep.base;
      if (is_setting)
        set(scenario, axis.name, value);
      else
        plan::knob(axis.name).set(scenario.plan, value);
    }
    count *= axis.values.size();
    if (count > kMostPoints)
      throw UserError(fmt::format("the sweep has more than {} combinations; shorten a range", kMostPoints));
  }
  return count;
}

predict::Scenario point(const Sweep& sweep, size_t index) {
  predict::Scenario scenario = sweep.base;
  std::vector<size_t> at(sweep.axes.size());
  for (size_t a = sweep.axes.size(); a-- > 0; index /= sweep.axes[a].values.size())
    at[a] = index % sweep.axes[a].values.size();
  for (size_t a = 0; a < at.size(); ++a) {
    const Axis& axis = sweep.axes[a];
    const auto knob = std::ranges::find(plan::knobs(), axis.name, &plan::Knob::name);
    if (knob == plan::knobs().end() || has_knob(scenario.plan, *knob))
      set(scenario, axis.name, axis.values[at[a]]);
  }
  return scenario;
}

void run(size_t count, unsigned jobs, const std::atomic<bool>& stop,
         const std::function<predict::Scenario(size_t)>& question,
         const std::function<void(std::vector<Outcome>&& finished, size_t done)>& take) {
  std::mutex mutex;
  std::vector<Outcome> finished;  // guarded by it
  size_t done = 0;
  parallel(
      count, jobs, stop,
      [&](size_t index) {
        Outcome outcome = answer(index, question);
        const std::lock_guard lock(mutex);
        finished.push_back(std::move(outcome));
      },
      [&] {
        std::vector<Outcome> batch;
        {
          const std::lock_guard lock(mutex);
          batch.swap(finished);
        }
        done += batch.size();
        if (!batch.empty()) take(std::move(batch), done);
      });
}

}  // namespace mop::search
