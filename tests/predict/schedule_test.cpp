// From a program and the rows at hand to tasks: what is borrowed and given back moves once, in its own
// direction.
#include "sim/predict/schedule.h"

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "sim/cost/cost.h"
#include "sim/predict/loads.h"
#include "sim/program/lower.h"
#include "tests/predict/support.h"

namespace mop::predict::testing {
namespace {

using program::Exchange;
using program::Op;
using program::OpKind;

// Every layer in three rounds of equal size.
class ThreeRounds : public ::testing::Test {
 protected:
  ThreeRounds() {
    load.rounds = 3;
    load.computed = load.sent = 12000;
    load.experts = 17;
    load.spilled_in = 1;
    load.spilled_out = 3;
    const plan::Layout layout = plan::layout(s.plan, s.gpus());
    const std::vector<program::ExpertLoad> loads(static_cast<size_t>(s.model.layers), load);
    p = program::lower({s.model, parameters, s.plan, layout, s.workload, 0, loads});
    schedule = make_schedule(
        p, loads, *cost::make_cost_model(s.calibration, s.cluster, s.plan, s.gpus(), s.used_per_node()));
  }

  // Gradients that are added take longer than those that are written.
  static Scenario scenario() {
    Scenario made =
        make("qwen3-30b-a3b", "h200", 1, mop_plan(8, 8, 1, 8, "spill-slots=4,round-rows=4096"), 4096);
    const std::vector<std::vector<double>> slow{{2048, 1536, 16, 256, 1e13}};
    const char* const name = "native_grouped_matmul_added";
    made.cluster.tables[name] = {cluster::Table(name, 2, 2, slow), cluster::Source::measured, "made up"};
    return made;
  }
  const Scenario s = scenario();
  const model::Parameters parameters = model::count_parameters(s.model);
  program::ExpertLoad load;
  program::StepProgram p;
  Schedule schedule;
};

TEST_F(ThreeRounds, SpilledExpertsMoveOnceEachWay) {
  const int64_t expert = 2 * parameters.layers[0].expert;
  std::vector<int64_t> round(p.ops.size(), 0);
  int borrowed = 0, returned = 0;
  for (size_t t = 0; t < schedule.graph.tasks.size(); ++t) {
    const program::OpId id = schedule.op_of_task[t];
    const Op& op = p.ops[id];
    const int64_t now = round[id]++;
    if (op.routed != program::Routed::spill) continue;
    const auto duration = schedule.graph.demands[schedule.graph.tasks[t].demand].duration;
    const program::Shape shape = routed_shape(p, op, load, now);
    ASSERT_EQ(op.kind, OpKind::all_to_all);
    const bool back = op.does.exchange == Exchange::spill_gradients;
    const bool moves = now == (back ? 2 : 0);
    EXPECT_EQ(duration > 0, moves) << p.op_name(id) << " in round " << now;
    EXPECT_EQ(shape.v[0], !moves ? 0 : back ? expert : 3 * expert);
    EXPECT_EQ(shape.v[1], !moves ? 0 : back ? 3 * expert : expert);
    if (moves) ++(back ? returned : borrowed);
  }
  EXPECT_EQ(borrowed, 2 * s.model.layers);  // forward and backward
  EXPECT_EQ(returned, s.model.layers);
}

TEST_F(ThreeRounds, GradientsAreWrittenThenAddedTo) {
  std::map<program::OpId, std::vector<engine::Time>> durations;
  for (size_t t = 0; t < schedule.graph.tasks.size(); ++t)
    if (const program::OpId id = schedule.op_of_task[t]; p.ops[id].kind == OpKind::grouped_gemm)
      durations[id].push_back(schedule.graph.demands[schedule.graph.tasks[t].demand].duration);
  int gradients = 0;
  for (const auto& [id, of] : durations) {
    ASSERT_EQ(of.size(), 3);
    EXPECT_EQ(of[1], of[2]);
    EXPECT_EQ(of[1] > of[0], p.ops[id].does.transpose_a);
    gradients += p.ops[id].does.transpose_a;
  }
  EXPECT_EQ(gradients, 2 * s.model.layers);
}

TEST_F(ThreeRounds, GradientsAreWrittenOfExpertsWithoutRowsToo) {
  const int64_t own = s.model.experts / s.plan.expert;
  load.experts = 2;
  load.touched = own / 4;
  load.spilled_in = 1;
  int gradients = 0;
  for (Op op : p.ops) {
    if (op.kind != OpKind::grouped_gemm) continue;
    const bool gradient = op.does.transpose_a;
    gradients += gradient ? 1 : 0;
    for (const bool adds : {false, true}) {
      op.does.accumulate = adds;
      EXPECT_EQ(routed_shape(p, op, load, adds ? 1 : 0).v[4], gradient && !adds ? own + 1 : load.touched);
    }
  }
  EXPECT_EQ(gradients, 2 * s.model.layers);
  // Of a rank that has no row at all they are all that there is.
  load = {};
  const auto cost = cost::make_cost_model(s.calibration, s.cluster, s.plan, s.gpus(), s.used_per_node());
  for (const Op& op : p.ops)
    if (op.kind == OpKind::grouped_gemm) {
      const program::Shape shape = routed_shape(p, op, load, 0);
      const double zeros = static_cast<double>(2 * (own - 1) * shape.v[1] * shape.v[2]);
      const auto least = static_cast<engine::Time>(zeros / s.cluster["hbm_peak_bw"] * 1e9);
      EXPECT_EQ(cost->price(op, shape, nullptr).demand.duration > least, op.does.transpose_a);
    }
}

// A kernel has priority by its stream, whatever the same one has on another.
TEST(Schedule, KernelsOfOtherStreamsGoFirst) {
  const Scenario s = make("olmoe-1b-7b", "h200x4", 1, mop_plan(1, 4, 1, 4), 4096, 8);
  const plan::Layout layout = plan::layout(s.plan, s.gpus());
  const std::vector<program::ExpertLoad> loads = expert_loads(s, layout, 0).front();
  const program::StepProgram p =
      program::lower({s.model, model::count_parameters(s.model), s.plan, layout, s.workload, 0, loads});
  const auto cost = cost::make_cost_model(s.calibration, s.cluster, s.plan, s.gpus(), s.used_per_node());
  const Schedule schedule = make_schedule(p, loads, *cost);
  uint32_t first = 0, last = UINT32_MAX;  // the highest weight on the compute stream, the lowest of others
  for (size_t t = 0; t < schedule.graph.tasks.size(); ++t) {
    const Op& op = p.ops[schedule.op_of_task[t]];
    if (op.kind != OpKind::square_sum) continue;
    const uint32_t weight = schedule.graph.demands[schedule.graph.tasks[t].demand].weight;
    if (op.stream == program::Stream::compute)
      first = std::max(first, weight);
    else
      last = std::min(last, weight);
  }
  ASSERT_GT(first, 0U);
  ASSERT_LT(last, UINT32_MAX);
  EXPECT_GT(last, 8 * first);
}

}  // namespace
}  // namespace mop::predict::testing
