#include "sim/program/graph.h"

#include <fmt/format.h>

#include <array>
#include <boost/graph/graphviz.hpp>

namespace mop::program {

Graph to_graph(const StepProgram& program) {
  Graph graph(program.ops.size());
  std::array<OpId, kStreams> last;
  last.fill(kNoOp);
  for (OpId id = 0; id < program.ops.size(); ++id) {
    OpId& before = last[static_cast<size_t>(program.ops[id].stream)];
    if (before != kNoOp) boost::add_edge(before, id, graph);
    before = id;
  }
  for (const Dependency& d : program.dependencies)
    if (d.distance == 0) boost::add_edge(d.from, d.to, graph);
  return graph;
}

void write_dot(std::ostream& out, const StepProgram& program) {
  const Graph graph = to_graph(program);
  boost::write_graphviz(out, graph, [&](std::ostream& o, Graph::vertex_descriptor v) {
    const Op& op = program.ops[v];
    o << fmt::format("[label=\"{}\", style=filled, colorscheme=set312, fillcolor={}]",
                     program.op_name(static_cast<OpId>(v)), static_cast<int>(op.stream) + 1);
  });
}

}  // namespace mop::program
