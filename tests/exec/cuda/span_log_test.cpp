// Operations, waits and events of random steps, as the streams get them. Needs no GPU.
#include "exec/cuda/span_log.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>

namespace mop::cuda {
namespace {

using program::OpKind;
using program::Stream;

// What a stream gets: operations by their number, events by theirs, waits.
struct Entry {
  char what;  // 'o', 'e', 'w'
  size_t number;
  bool operator==(const Entry&) const = default;
};

struct Step {
  std::array<std::vector<Entry>, program::kStreams> queues;
  std::vector<program::Op> ops;
  std::vector<std::optional<size_t>> span_of;  // by operation

  std::vector<Entry>& of(Stream stream) { return queues[static_cast<size_t>(stream)]; }
  // Where an entry is; a failure if it is not there once.
  size_t at(Stream stream, Entry entry) {
    std::vector<size_t> found;
    for (size_t i = 0; i < of(stream).size(); ++i)
      if (of(stream)[i] == entry) found.push_back(i);
    EXPECT_EQ(found.size(), 1U) << entry.what << entry.number;
    return found.empty() ? 0 : found[0];
  }
};

void run(SpanLog& log, Step& step, std::mt19937& random, int actions) {
  log.clear();
  const auto below = [&](unsigned n) { return static_cast<unsigned>(random() % n); };
  for (int i = 0; i < actions; ++i) {
    const unsigned action = below(10);
    if (action == 0) {  // the compute stream waits
      log.end_run();
      step.of(Stream::compute).push_back({'w', 0});
    } else if (action == 1) {  // the host waits for a plan
      log.end_run();
    } else {
      program::Op op{};
      constexpr std::array kOthers{Stream::gather, Stream::dispatch, Stream::h2d, Stream::host};
      op.stream = below(4) == 0 ? kOthers[below(4)] : Stream::compute;
      op.kind = op.stream == Stream::compute && below(6) == 0 ? OpKind::plan_routing : OpKind::gemm;
      const size_t id = step.ops.size();
      step.ops.push_back(op);
      step.span_of.push_back(log.begin(static_cast<program::OpId>(id), op));
      step.of(op.stream).push_back({'o', id});
      log.end();
    }
  }
  log.end_run();
}

TEST(SpanLog, EventsAreAroundWhatTheyTime) {
  std::mt19937 random(5);
  for (const bool each : {false, true})
    for (const bool alone : {false, true})
      for (int draw = 0; draw < 60; ++draw) {
        Step step;
        SpanLog log(1000, [&](size_t event, Stream stream) { step.of(stream).push_back({'e', event}); });
        log.set(each, alone);
        run(log, step, random, 80);
        size_t events = 0;
        for (size_t id = 0; id < step.ops.size(); ++id) {
          const program::Op& op = step.ops[id];
          const std::optional<size_t> span = step.span_of[id];
          if (each || log.alone(op)) {
            ASSERT_TRUE(span.has_value()) << "operation " << id;
          }
          if (!span) continue;
          const SpanLog::Span& found = log.spans()[*span];
          EXPECT_EQ(found.op, id);
          const size_t begin = step.at(op.stream, {'e', 2 * found.run}),
                       end = step.at(op.stream, {'e', 2 * found.run + 1}),
                       own = step.at(op.stream, {'o', id});
          EXPECT_LT(begin, own);
          EXPECT_LT(own, end);
          for (size_t i = begin; i < end; ++i)
            EXPECT_NE(step.of(op.stream)[i].what, 'w') << "a wait within a run";
          if (log.alone(op)) {
            EXPECT_TRUE(log.has_events(*span));
            EXPECT_EQ(end, begin + 2);
          }
          events += log.has_events(*span) ? 2 : 0;
        }
        size_t recorded = 0;
        for (const auto& queue : step.queues)
          for (const Entry& entry : queue) recorded += entry.what == 'e';
        EXPECT_EQ(recorded, events);
        if (!each && !alone) {
          EXPECT_LT(recorded, 2 * step.ops.size());
        }
      }
}

// What has no span is within another one's events, but for what comes when there are no more.
TEST(SpanLog, EveryOperationOfTheComputeStreamIsWithinARun) {
  std::mt19937 random(6);
  for (int draw = 0; draw < 60; ++draw) {
    Step step;
    SpanLog log(1000, [&](size_t event, Stream stream) { step.of(stream).push_back({'e', event}); });
    run(log, step, random, 80);
    int open = 0;
    for (const Entry& entry : step.of(Stream::compute)) {
      if (entry.what == 'e') open += entry.number % 2 == 0 ? 1 : -1;
      if (entry.what == 'o') {
        EXPECT_EQ(open, 1) << "operation " << entry.number;
      }
    }
    EXPECT_EQ(open, 0);
  }
}

TEST(SpanLog, NoMoreSpansThanItHasRoomFor) {
  std::mt19937 random(7);
  for (const size_t most : {size_t{0}, size_t{1}, size_t{7}}) {
    Step step;
    size_t largest = 0, recorded = 0;
    SpanLog log(most, [&](size_t event, Stream) { largest = std::max(largest, event), ++recorded; });
    for (const bool each : {false, true}) {
      log.set(each, false);
      run(log, step, random, 60);
      EXPECT_EQ(log.spans().size(), most);
    }
    EXPECT_LE(recorded, 4 * most);
    EXPECT_LE(largest, 2 * most);
  }
}

}  // namespace
}  // namespace mop::cuda
