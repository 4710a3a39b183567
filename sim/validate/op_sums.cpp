#include "sim/validate/op_sums.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "sim/base/error.h"

namespace mop::validate {
namespace {

using Json = nlohmann::ordered_json;
using program::Op;
using Kind = std::tuple<program::Component, program::OpKind, program::Stream>;

struct Sum {
  double seconds = 0, lasted = 0, count = 0;
};

// Of values that stand for `members` ranks each.
double median(std::vector<std::pair<double, int64_t>> values) {
  std::ranges::sort(values);
  int64_t all = 0, below = 0;
  for (const auto& value : values) all += value.second;
  for (size_t i = 0; i < values.size(); ++i) {
    below += values[i].second;
    if (2 * below == all) return (values[i].first + values[i + 1].first) / 2;
    if (2 * below > all) return values[i].first;
  }
  return 0;
}

std::string name_of(const Kind& kind) {
  return fmt::format("{} {}", program::name(std::get<0>(kind)), program::name(std::get<1>(kind)));
}

}  // namespace

OpSums sum_operations(std::span<const program::RankTimeline> ranks, std::span<const int64_t> members) {
  std::vector<std::map<Kind, Sum>> by_rank(ranks.size());
  std::map<Kind, Sum> together;                               // collectives
  std::map<std::pair<program::OpId, int>, int64_t> shortest;  // of a collective's operation and execution
  for (size_t r = 0; r < ranks.size(); ++r) {
    std::map<program::OpId, int> executions;
    for (const program::OpSpan& span : ranks[r].spans) {
      const Op& op = ranks[r].program->ops[span.op];
      Sum& sum = by_rank[r][{op.component, op.kind, op.stream}];
      sum.seconds += static_cast<double>(span.busy) * 1e-9;
      sum.lasted += static_cast<double>(span.end - span.start) * 1e-9;
      ++sum.count;
      if (!program::is_collective(op.kind)) continue;
      const auto [found, first] = shortest.try_emplace({span.op, executions[span.op]++}, span.busy);
      if (!first) found->second = std::min(found->second, span.busy);
    }
  }
  for (const auto& [execution, busy] : shortest) {
    const Op& op = ranks.front().program->ops[execution.first];
    Sum& sum = together[{op.component, op.kind, op.stream}];
    sum.seconds += static_cast<double>(busy) * 1e-9;
    ++sum.count;
  }
  std::map<Kind, Sum> kinds;
  for (const auto& sums : by_rank)
    for (const auto& entry : sums) kinds.insert(entry);
  OpSums result;
  for (const auto& [kind, any] : kinds) {
    std::vector<std::pair<double, int64_t>> seconds, lasted, counts;
    for (size_t r = 0; r < ranks.size(); ++r) {
      const int64_t alike = members.empty() ? 1 : members[r];
      const Sum own = by_rank[r][kind];
      seconds.emplace_back(own.seconds, alike);
      lasted.emplace_back(own.lasted, alike);
      counts.emplace_back(own.count, alike);
    }
    OpSum sum{name_of(kind), program::name(std::get<2>(kind)), median(std::move(seconds)),
              median(std::move(counts))};
    if (const auto found = together.find(kind); found != together.end()) {
      result.wait += std::max(0.0, median(std::move(lasted)) - found->second.seconds);
      sum.seconds = found->second.seconds;
      sum.count = found->second.count;
    }
    result.operations.push_back(std::move(sum));
  }
  std::ranges::stable_sort(result.operations, std::ranges::greater(), &OpSum::seconds);
  return result;
}

std::string to_json(const OpSums& sums) {
  Json operations = Json::array(), streams = Json::object();
  for (const OpSum& sum : sums.operations) {
    operations.push_back(
        {{"name", sum.name}, {"stream", sum.stream}, {"seconds", sum.seconds}, {"count", sum.count}});
    streams[sum.stream] = streams.value(sum.stream, 0.0) + sum.seconds;
  }
  return Json{{"of",
               "seconds of one step in which kernels or copies ran: the median over ranks; collectives: the "
               "shortest over ranks"},
              {"intervals", sums.intervals},
              {"step_s", sums.step},
              {"collective_wait_s", sums.wait},
              {"streams", streams},
              {"by_kind", operations}}
      .dump();
}

OpSums op_sums_of(const std::string& text) {
  OpSums sums;
  try {
    const Json json = Json::parse(text);
    sums.step = json.at("step_s");
    sums.wait = json.at("collective_wait_s");
    sums.intervals = json.value("intervals", "events");
    for (const Json& one : json.at("by_kind"))
      sums.operations.push_back({one.at("name"), one.at("stream"), one.at("seconds"), one.at("count")});
  } catch (const Json::exception& error) {
    throw UserError(
        fmt::format("a record's operation sums cannot be read ({}); measure again", error.what()));
  }
  return sums;
}

}  // namespace mop::validate
