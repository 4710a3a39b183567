// What must hold of any machine, tried on many.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "sim/engine/engine.h"
#include "tests/engine/random_machine.h"
#include "tests/engine/reference.h"

namespace mop::engine {
namespace {

Report run_steps(const Machine& machine, int steps) {
  return run(machine, {.max_steps = steps, .tolerance = -1});
}

void expect_sound(const Machine& machine, const Report& report) {
  // The path covers the window without holes.
  Time at = report.step_end.back(), sum = 0;
  for (const Stretch& stretch : report.critical_path) {
    ASSERT_EQ(stretch.end, at);
    ASSERT_LT(stretch.start, stretch.end);
    at = stretch.start;
    sum += stretch.end - stretch.start;
  }
  ASSERT_EQ(sum, report.step_time);
  // Order of streams and edges; nothing runs faster than alone; nothing is used beyond its capacity.
  for (size_t r = 0; r < machine.ranks.size(); ++r) {
    const TaskGraph& graph = machine.graphs[machine.ranks[r].graph];
    const RankReport& rank = report.ranks[r];
    std::vector<Time> free(kMaxStreams, 0);
    for (size_t t = 0; t < graph.tasks.size(); ++t) {
      const Span& span = rank.spans[t];
      ASSERT_GE(span.busy, graph.demands[graph.tasks[t].demand].duration);
      ASSERT_LE(span.busy, span.end - span.start);
      ASSERT_GE(span.start, free[graph.tasks[t].stream]);
      free[graph.tasks[t].stream] = span.end;
    }
    for (const Edge& edge : graph.edges) {
      if (edge.steps == 1) continue;
      ASSERT_LE(rank.spans[edge.from].end, rank.spans[edge.to].start);
    }
    for (const __int128 used : rank.used)
      ASSERT_TRUE(used >= 0 && used <= __int128{report.step_time} * kFull);
    ASSERT_LE(rank.compute_busy + rank.exposed_communication, report.step_time);
  }
}

Draw shape(int trial, std::mt19937& random) {
  Draw draw;
  draw.nodes = 1 + static_cast<uint32_t>(random() % 2);
  draw.classes = 1 + static_cast<uint32_t>(random() % 2);
  draw.ranks_of_class = 1 + static_cast<uint32_t>(random() % (8 / draw.classes));
  draw.streams = 2 + static_cast<uint32_t>(random() % 5);
  draw.contention = trial % 5 > 1;
  draw.launches = trial % 3 != 0;
  draw.carried = trial % 2 != 0;
  draw.meetings = trial % 7 != 0;
  return draw;
}

TEST(Random, AgreesWithTheSlowSimulator) {
  double worst = 0;
  for (int trial = 0; trial < 300; ++trial) {
    SCOPED_TRACE(trial);
    std::mt19937 random(static_cast<uint32_t>(1000 + trial));
    Draw what = shape(trial, random);
    what.tasks = 6 + static_cast<uint32_t>(random() % 20);
    what.ranks_of_class = std::min(what.ranks_of_class, 3u);
    const Pair pair = draw(what, random);
    const Machine& machine = trial % 2 ? pair.folded : pair.unfolded;
    const Report report = run_steps(machine, 3);
    expect_sound(machine, report);
    const ReferenceResult expected = simulate_slowly(machine, 3);
    // Each event rounds up to the next ns and rates round down to 2^-20.
    const auto allowed = [](double time) { return 60 + 1e-4 * time; };
    for (size_t s = 0; s < 3; ++s) {
      ASSERT_NEAR(double(report.step_end[s]), expected.step_end[s], allowed(expected.step_end[s]));
      worst = std::max(worst, std::abs(double(report.step_end[s]) - expected.step_end[s]));
    }
    for (size_t r = 0; r < machine.ranks.size(); ++r) {
      for (size_t t = 0; t < report.ranks[r].spans.size(); ++t) {
        ASSERT_NEAR(double(report.ranks[r].spans[t].start), expected.start[r][t],
                    allowed(expected.end[r][t]));
        ASSERT_NEAR(double(report.ranks[r].spans[t].end), expected.end[r][t], allowed(expected.end[r][t]));
        ASSERT_NEAR(double(report.ranks[r].spans[t].busy), expected.busy[r][t], allowed(expected.end[r][t]));
      }
    }
  }
  RecordProperty("worst_step_end_ns", std::to_string(worst));
}

TEST(Random, FoldedEqualsUnfoldedExactly) {
  for (int trial = 0; trial < 300; ++trial) {
    SCOPED_TRACE(trial);
    std::mt19937 random(static_cast<uint32_t>(trial));
    Draw what = shape(trial, random);
    what.tasks = 20 + static_cast<uint32_t>(random() % 100);
    if (trial % 4 == 0) what.classes = 1, what.ranks_of_class = 8;
    const Pair pair = draw(what, random);
    const Report folded = run_steps(pair.folded, 4), unfolded = run_steps(pair.unfolded, 4);
    expect_sound(pair.folded, folded);
    expect_sound(pair.unfolded, unfolded);
    ASSERT_EQ(folded.step_end, unfolded.step_end);
    ASSERT_EQ(unfolded.tasks > 0, folded.tasks > 0);
    for (size_t r = 0; r < unfolded.ranks.size(); ++r) {
      const RankReport &one = folded.ranks[r / what.ranks_of_class], &each = unfolded.ranks[r];
      ASSERT_EQ(one.compute_busy, each.compute_busy);
      ASSERT_EQ(one.exposed_communication, each.exposed_communication);
      ASSERT_TRUE(one.used == each.used);
      for (size_t t = 0; t < one.spans.size(); ++t) {
        ASSERT_EQ(one.spans[t].start, each.spans[t].start);
        ASSERT_EQ(one.spans[t].end, each.spans[t].end);
        ASSERT_EQ(one.spans[t].busy, each.spans[t].busy);
      }
    }
  }
}

TEST(Random, TheOrderOfRanksDoesNotMatter) {
  for (int trial = 0; trial < 100; ++trial) {
    SCOPED_TRACE(trial);
    std::mt19937 random(static_cast<uint32_t>(trial));
    Draw what = shape(trial, random);
    what.classes = 3;
    const Machine machine = draw(what, random).unfolded;
    std::vector<size_t> order(machine.ranks.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    Machine shuffled = machine;
    for (size_t i = 0; i < order.size(); ++i) shuffled.ranks[i] = machine.ranks[order[i]];
    const Report one = run_steps(machine, 3), other = run_steps(shuffled, 3);
    ASSERT_EQ(one.step_end, other.step_end);
    for (size_t i = 0; i < order.size(); ++i) {
      const RankReport &a = one.ranks[order[i]], &b = other.ranks[i];
      ASSERT_TRUE(a.used == b.used);
      for (size_t t = 0; t < a.spans.size(); ++t) ASSERT_EQ(a.spans[t].end, b.spans[t].end);
    }
  }
}

TEST(Random, TheSameMachineGivesTheSameReport) {
  std::mt19937 random(5);
  const Machine machine =
      draw({.nodes = 2, .classes = 2, .ranks_of_class = 4, .tasks = 200}, random).unfolded;
  const Report one = run(machine), other = run(machine);
  EXPECT_EQ(one.step_end, other.step_end);
  EXPECT_EQ(one.events, other.events);
  ASSERT_EQ(one.critical_path.size(), other.critical_path.size());
  for (size_t i = 0; i < one.critical_path.size(); ++i) {
    EXPECT_EQ(one.critical_path[i].rank, other.critical_path[i].rank);
    EXPECT_EQ(one.critical_path[i].task, other.critical_path[i].task);
  }
}

}  // namespace
}  // namespace mop::engine
