#include "sim/validate/bounds.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>
#include <tuple>

#include "sim/base/error.h"
#include "sim/base/median.h"
#include "sim/base/quantity.h"
#include "sim/base/suggest.h"

namespace mop::validate {
namespace {

struct Name {
  const char* name;
  double Bounds::*member;
};
constexpr Name kNames[] = {{"hbm", &Bounds::hbm},
                           {"host", &Bounds::host},
                           {"step-mean", &Bounds::step_mean},
                           {"step-worst", &Bounds::step_worst},
                           {"ratio", &Bounds::ratio},
                           {"ranking", &Bounds::ranking},
                           {"op", &Bounds::operation}};

bool timed(const Comparison& c) {
  return c.on_gpus && c.step_s && c.measured.step_time_s;
}

std::string title(const Comparison& c) {
  return fmt::format(
      "#{} {}", c.measured.id.value_or(0),
      c.measured.label.empty() ? c.measured.model + " " + c.measured.plan_family : c.measured.label);
}

// The largest value, and whose it is.
class Worst {
 public:
  void add(double value, const std::string& whose) {
    if (verdict_.count++ == 0 || value > verdict_.value) verdict_.value = value, whose_ = whose;
  }
  Verdict verdict(const char* name, double bound, const char* one, const char* many) {
    verdict_.name = name;
    verdict_.bound = bound;
    verdict_.of = verdict_.count == 0 ? fmt::format("no {}", one)
                                      : fmt::format("worst of {} {}: {}", verdict_.count,
                                                    verdict_.count == 1 ? one : many, whose_);
    return verdict_;
  }

 private:
  Verdict verdict_;
  std::string whose_;
};

const Comparison* best_of(const PlanSet& set, const char* family) {
  const auto found =
      std::ranges::find_if(set.plans, [&](const Comparison* c) { return c->measured.plan_family == family; });
  return found == set.plans.end() ? nullptr : *found;
}

}  // namespace

Bounds parse_bounds(const std::string& text) {
  Bounds bounds;
  std::set<std::string> given;
  for (size_t at = 0; at < text.size();) {
    const size_t next = std::min(text.find(',', at), text.size());
    const std::string part = text.substr(at, next - at);
    at = next + 1;
    const size_t equals = part.find('=');
    const std::string name = part.substr(0, equals);
    const auto found = std::ranges::find_if(kNames, [&](const Name& one) { return name == one.name; });
    if (found == std::end(kNames)) {
      std::vector<std::string> known;
      for (const Name& one : kNames) known.emplace_back(one.name);
      throw UserError(unknown_name("bound", name, known));
    }
    if (!given.insert(name).second) throw UserError(fmt::format("bound {} is given twice", name));
    std::string number = equals == std::string::npos ? "" : part.substr(equals + 1);
    if (number.ends_with('%')) number.pop_back();
    double percent = 0;
    const auto [end, status] = std::from_chars(number.data(), number.data() + number.size(), percent);
    if (status != std::errc() || end != number.data() + number.size() || !std::isfinite(percent) ||
        percent < 0)
      throw UserError(fmt::format("bound '{}' is no percentage; write it like {}=5%", part, name));
    bounds.*found->member = percent / 100;
  }
  return bounds;
}

std::string describe(const Bounds& bounds) {
  std::vector<std::string> parts;
  for (const Name& one : kNames)
    parts.push_back(fmt::format("{}={:.10g}%", one.name, 100 * bounds.*one.member));
  return fmt::format("{}", fmt::join(parts, ","));
}

StepErrors step_errors(std::span<const Comparison> comparisons, bool held_out_only) {
  StepErrors errors;
  for (const Comparison& c : comparisons) {
    if (!timed(c) || (held_out_only && !c.held_out)) continue;
    const double error = std::abs(c.step_error());
    errors.mean += error;
    errors.worst = std::max(errors.worst, error);
    ++errors.count;
  }
  if (errors.count > 0) errors.mean /= static_cast<double>(errors.count);
  return errors;
}

std::vector<PlanSet> plan_sets(std::span<const Comparison> comparisons) {
  std::map<std::string, std::vector<const Comparison*>> by_question;
  for (const Comparison& c : comparisons) {
    if (!timed(c)) continue;
    const plan::Workload& w = c.scenario.workload;
    by_question[fmt::format("{} on {} x {} GPUs of {}, context {}, {} tokens a step, {} routing, {}{}",
                            c.measured.model, c.measured.nodes, c.scenario.used_per_node(),
                            c.scenario.cluster.name, format_count(w.context),
                            format_count(c.measured.tokens_per_step), c.stated_routing,
                            plan::name(w.precision), w.balance_loss ? ", balance loss" : "")]
        .push_back(&c);
  }
  std::vector<PlanSet> sets;
  for (auto& [question, plans] : by_question) {
    std::ranges::stable_sort(plans, {}, [](const Comparison* c) { return *c->measured.step_time_s; });
    const bool several = std::ranges::any_of(
        plans, [&](const Comparison* c) { return c->measured.plan != plans[0]->measured.plan; });
    if (several) sets.push_back({question, std::move(plans)});
  }
  return sets;
}

double KindErrors::median() const {
  return mop::median(errors);
}

std::vector<KindErrors> kind_errors(std::span<const Comparison> comparisons) {
  std::map<std::string, KindErrors> all;
  for (const Comparison& c : comparisons) {
    if (!timed(c) || c.measured_step_s <= 0) continue;
    std::map<std::string, std::pair<double, double>> kinds;  // measured, predicted
    for (const OpDifference& op : c.operations) {
      if (op.stream.empty()) continue;
      auto& [measured, predicted] = kinds[op.name.substr(op.name.find(' ') + 1)];
      measured += op.measured;
      predicted += op.predicted;
    }
    for (const auto& [kind, seconds] : kinds)
      if (seconds.first > kShare * c.measured_step_s)
        all[kind].errors.push_back(std::abs(relative_error(seconds.second, seconds.first)));
  }
  std::vector<KindErrors> result;
  for (auto& [kind, errors] : all) {
    std::ranges::sort(errors.errors);
    result.push_back({kind, std::move(errors.errors)});
  }
  std::ranges::stable_sort(result, std::ranges::greater(), &KindErrors::median);
  return result;
}

std::vector<Verdict> judge(std::span<const Comparison> comparisons, const Bounds& bounds) {
  std::vector<Verdict> verdicts;
  Verdict predicted{"predicted", "", 0, 0, comparisons.size()};
  Worst hbm, host, step, ratio, ranking, operation;
  const bool any_held_out =
      std::ranges::any_of(comparisons, [](const Comparison& c) { return timed(c) && c.held_out; });
  for (const Comparison& c : comparisons) {
    if (!c.predicted()) ++predicted.value;
    if (c.hbm_bytes > 0 && c.measured.hbm_peak_bytes) hbm.add(std::abs(c.hbm_error()), title(c));
    if (c.hbm_bytes > 0 && c.measured.host_peak_bytes) host.add(std::abs(c.host_error()), title(c));
    if (timed(c) && (c.held_out || !any_held_out)) step.add(std::abs(c.step_error()), title(c));
  }
  predicted.of =
      fmt::format("runs of {} that could not be predicted, or were predicted not to fit", comparisons.size());
  for (const PlanSet& set : plan_sets(comparisons)) {
    if (const Comparison* mop = best_of(set, "mop"), *fsdp2 = best_of(set, "fsdp2");
        mop != nullptr && fsdp2 != nullptr)
      ratio.add(std::abs(relative_error(*mop->step_s / *fsdp2->step_s,
                                        *mop->measured.step_time_s / *fsdp2->measured.step_time_s)),
                set.question);
    const Comparison* chosen =
        *std::ranges::min_element(set.plans, {}, [](const Comparison* c) { return *c->step_s; });
    ranking.add(*chosen->measured.step_time_s / *set.plans[0]->measured.step_time_s - 1, set.question);
  }
  for (const KindErrors& kind : kind_errors(comparisons))
    operation.add(kind.median(), fmt::format("{} (median of {})", kind.kind, kind.errors.size()));
  const StepErrors steps = step_errors(comparisons, any_held_out);
  const char* of_runs = any_held_out ? "held-out runs" : "runs on GPUs";
  verdicts.push_back(predicted);
  verdicts.push_back(hbm.verdict("hbm", bounds.hbm, "run", "runs"));
  verdicts.push_back(host.verdict("host", bounds.host, "run", "runs"));
  verdicts.push_back({"step-mean",
                      steps.count == 0 ? fmt::format("no {}", of_runs)
                                       : fmt::format("mean of {} {}{}", steps.count, of_runs,
                                                     any_held_out ? "" : ", none held out"),
                      bounds.step_mean, steps.mean, steps.count});
  verdicts.push_back(
      step.verdict("step-worst", bounds.step_worst, any_held_out ? "held-out run" : "run on GPUs", of_runs));
  verdicts.push_back(
      ratio.verdict("ratio", bounds.ratio, "set of mop and fsdp2 plans", "sets of mop and fsdp2 plans"));
  verdicts.push_back(ranking.verdict("ranking", bounds.ranking, "set of plans", "sets of plans"));
  verdicts.push_back(operation.verdict("op", bounds.operation, "kind of operation", "kinds of operations"));
  return verdicts;
}

}  // namespace mop::validate
