#include "sim/predict/timelines.h"

#include <fmt/format.h>

#include "sim/base/error.h"

namespace mop::predict {

std::vector<program::RankTimeline> timelines(const Scenario& scenario, const Details& details) {
  std::vector<program::RankTimeline> all;
  for (size_t i = 0; i < details.fold.classes.size(); ++i) {
    const RankClass& ranks = details.fold.classes[i];
    const std::vector<program::OpId>& op_of_task = details.schedules[ranks.kind].op_of_task;
    const std::vector<engine::Span>& spans = details.report.ranks[i].spans;
    ensure(spans.size() == op_of_task.size(), "every task has a span");
    const std::string alike = ranks.members > 1 ? fmt::format(" and {} alike", ranks.members - 1) : "";
    program::RankTimeline& timeline = all.emplace_back();
    timeline.title = fmt::format("rank {}{}, {} {}", ranks.rank, alike, scenario.model.name,
                                 plan::family_name(scenario.plan.family));
    timeline.program = &details.program(ranks.kind);
    timeline.spans.reserve(spans.size());
    for (size_t task = 0; task < spans.size(); ++task) {
      const program::OpId op = op_of_task[task];
      const engine::Span& span = spans[task];
      // The turns of an exchange and of what follows it are one operation.
      if (task > 0 && op == op_of_task[task - 1] && timeline.program->ops[op].region == 0) {
        timeline.spans.back().end = span.end;
        timeline.spans.back().busy += span.busy;
      } else {
        timeline.spans.push_back({op, span.start, span.end, span.busy});
      }
    }
  }
  return all;
}

}  // namespace mop::predict
