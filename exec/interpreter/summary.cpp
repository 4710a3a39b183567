#include "exec/interpreter/summary.h"

#include <algorithm>
#include <vector>

namespace mop::interpreter {

using program::kStreams;
using program::Stream;

StepSummary summarize(const program::StepProgram& program, std::span<const program::OpSpan> spans) {
  struct Edge {
    int64_t time;
    size_t stream;
    int change;
  };
  std::vector<Edge> edges;
  edges.reserve(2 * spans.size());
  for (const program::OpSpan& span : spans) {
    const auto stream = static_cast<size_t>(program.ops[span.op].stream);
    edges.push_back({span.start, stream, 1});
    edges.push_back({span.end, stream, -1});
  }
  std::ranges::sort(edges, {}, &Edge::time);

  StepSummary summary;
  std::array<int, kStreams> running{};
  constexpr auto kCompute = static_cast<size_t>(Stream::compute), kHost = static_cast<size_t>(Stream::host);
  for (size_t i = 0; i < edges.size(); ++i) {
    if (i > 0) {
      const int64_t elapsed = edges[i].time - edges[i - 1].time;
      const bool computing = running[kCompute] > 0;
      bool communicating = false;
      for (size_t s = 0; s < kStreams; ++s) {
        if (running[s] == 0) continue;
        summary.busy[s] += elapsed;
        if (!computing) summary.exposed[s] += elapsed;
        communicating |= s != kCompute && s != kHost;
      }
      if (computing)
        summary.compute_busy += elapsed;
      else if (communicating)
        summary.exposed_communication += elapsed;
    }
    running[edges[i].stream] += edges[i].change;
  }
  // A stream's spans come in the order in which it ran them.
  int64_t planned = -1;
  for (const program::OpSpan& span : spans) {
    const program::Op& op = program.ops[span.op];
    if (op.stream != Stream::compute) continue;
    if (planned >= 0) summary.planning_stall += std::max<int64_t>(0, span.start - planned);
    planned = op.kind == program::OpKind::plan_routing ? span.end : -1;
  }
  return summary;
}

}  // namespace mop::interpreter
