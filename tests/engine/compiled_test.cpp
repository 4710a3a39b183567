#include "sim/engine/compiled.h"

#include <gtest/gtest.h>

#include "tests/engine/program.h"

namespace mop::engine {
namespace {

TEST(Compiled, DropsWhatStreamOrderImplies) {
  Program program;
  const uint32_t a = program.task(0, 1), b = program.task(0, 1, {a}), c = program.task(1, 1, {a, b});
  program.task(1, 1, {b, c});
  program.carry(b, a);
  program.carry(a, b);
  const CompiledGraph graph = compile(program.graph, 0);
  EXPECT_EQ(graph.successors.size(), 1u);  // b -> c
  EXPECT_EQ(graph.successors[0].task(), c);
  EXPECT_EQ(graph.waits, (std::vector<uint8_t>{0, 0, 1, 0}));
}

TEST(Compiled, DropsWhatOtherEdgesImply) {
  Program program;
  const uint32_t a = program.task(3, 1), b = program.task(5, 1, {a}), c = program.task(7, 1, {b});
  program.task(9, 1, {a, b, c, c});
  const CompiledGraph graph = compile(program.graph, 0);
  EXPECT_EQ(graph.waits, (std::vector<uint8_t>{0, 1, 1, 1}));
  EXPECT_EQ(graph.stream_names, (std::vector<uint8_t>{3, 5, 7, 9}));
}

TEST(Compiled, KeepsTheLatestCarriedEdgeOfAStream) {
  Program program;
  const uint32_t a = program.task(0, 1), b = program.task(0, 1), c = program.task(1, 1),
                 d = program.task(1, 1);
  program.carry(a, c);
  program.carry(b, c);
  program.carry(a, d);  // c has waited for it
  const CompiledGraph graph = compile(program.graph, 0);
  EXPECT_EQ(graph.waits, (std::vector<uint8_t>{0, 0, 1, 0}));
  EXPECT_EQ(graph.first_waits, (std::vector<uint8_t>{0, 0, 0, 0}));
}

TEST(Compiled, SegmentsEndAtBlockingTasks) {
  Program program;
  for (int i = 0; i < 4; ++i) program[program.task(0, 1)].launch_ns = 10;
  program[1].blocks_launch = true;
  const CompiledGraph graph = compile(program.graph, 0);
  ASSERT_EQ(graph.segments.size(), 2u);
  EXPECT_EQ(graph.segments[1].opener, 1u);
  EXPECT_EQ(graph.tasks[1].launch, 20);
  EXPECT_EQ(graph.tasks[3].launch, 20);
  EXPECT_EQ(graph.tasks[3].segment, 1u);
}

TEST(Compiled, ResourcesHaveNames) {
  EXPECT_STREQ(name(Resource::sm), "sm");
  EXPECT_STREQ(name(Resource::root_up), "root_up");
  EXPECT_STREQ(name(Resource::cores), "cores");
}

}  // namespace
}  // namespace mop::engine
