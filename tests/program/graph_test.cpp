// The step program as a Boost graph: independent algorithms agree with what the program claims of itself.
#include "sim/program/graph.h"

#include <gtest/gtest.h>

#include <boost/graph/topological_sort.hpp>
#include <boost/graph/transitive_closure.hpp>
#include <sstream>

#include "sim/program/arena.h"
#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

TEST(Graph, IssueOrderIsTopological) {
  for (const char* plan : {"fsdp2", "fsdp2:ep=2,cp=2,offload=on"}) {
    const Lowered l = lower_model("tiny-qwen3-moe", plan, 4, 512);
    const Graph graph = to_graph(l.program);
    std::vector<Graph::vertex_descriptor> order;
    EXPECT_NO_THROW(boost::topological_sort(graph, std::back_inserter(order)));  // throws on a cycle
    EXPECT_EQ(order.size(), l.program.ops.size());
    for (auto [edge, end] = boost::edges(graph); edge != end; ++edge)
      EXPECT_LT(boost::source(*edge, graph), boost::target(*edge, graph));
  }
}

// Within a step, the planner's clocks know exactly what the graph's transitive closure knows.
TEST(Graph, ClocksAgreeWithReachability) {
  const Lowered l = lower_model("tiny-qwen3-moe", mop_plan(2, 4, 2, 2, "optimizer=host"), 4, 512);
  const StepProgram& p = l.program;
  boost::adjacency_list<> closure;
  boost::transitive_closure(to_graph(p), closure);
  std::vector<std::vector<OpId>> users(p.buffers.size());
  for (OpId id = 0; id < p.ops.size(); ++id)
    for (const Use& use : p.uses_of(p.ops[id])) users[use.buffer].push_back(id);
  int compared = 0;
  for (BufferId a = 0; a < p.buffers.size(); a += 7)
    for (BufferId b = 0; b < p.buffers.size(); b += 11) {
      const auto plain = [&](BufferId x) {
        return !p.buffers[x].persistent && p.buffers[x].space == Space::hbm && p.buffers[x].bytes > 0 &&
               !users[x].empty();
      };
      if (a == b || !plain(a) || !plain(b)) continue;
      bool all = true;
      for (const OpId user : users[a]) all = all && boost::edge(user, users[b].front(), closure).second;
      EXPECT_EQ(ordered(p, a, b, 0), all) << p.buffer_name(a) << " before " << p.buffer_name(b);
      ++compared;
    }
  EXPECT_GT(compared, 100);
}

TEST(Graph, DotNamesEveryOperation) {
  const Lowered l = lower_model("tiny-qwen3-moe", "fsdp2", 2, 256);
  std::ostringstream out;
  write_dot(out, l.program);
  const std::string text = out.str();
  EXPECT_TRUE(text.starts_with("digraph"));
  for (OpId id = 0; id < l.program.ops.size(); ++id)
    EXPECT_NE(text.find(l.program.op_name(id)), std::string::npos);
}

}  // namespace
}  // namespace mop::program::testing
