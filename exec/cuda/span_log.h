// Which operations of a step have times, and between which events. An event's time is written to the host,
// which takes as long as many a kernel while states travel: operations of the compute stream that wait for no
// other stream and for no plan are a run with two events around all of it. The streams are whoever records.
#pragma once
#include <cstddef>
#include <functional>
#include <optional>
#include <vector>

#include "sim/program/program.h"

namespace mop::cuda {

class SpanLog {
 public:
  struct Span {
    program::OpId op = 0;
    size_t run =
        0;  // the span whose events are around it: its own, or that of the first operation of its run
  };
  // Event 2 i begins span i, 2 i + 1 ends it; `record` puts one on a stream. most: spans; what comes beyond
  // them has none.
  SpanLog(size_t most, std::function<void(size_t event, program::Stream stream)> record);

  // Whether each operation has a span, in place of the first one of a run; and whether it has events of its
  // own.
  void set(bool each, bool each_alone);
  bool alone(const program::Op& op) const;  // whether it has events of its own

  // Around the launch of an operation. The number of its span, if it has one.
  std::optional<size_t> begin(program::OpId id, const program::Op& op);
  void end();
  // Before the compute stream waits, before the host waits for it, and behind the step.
  void end_run();
  void clear();

  const std::vector<Span>& spans() const { return spans_; }  // since clear, in the order of launches
  bool has_events(size_t span) const { return spans_[span].run == span; }

 private:
  std::optional<size_t> add(program::OpId id, std::optional<size_t> run);

  size_t most_;
  std::function<void(size_t, program::Stream)> record_;
  std::vector<Span> spans_;
  bool each_ = false, each_alone_ = false;
  std::optional<size_t> run_;    // not ended
  std::optional<size_t> alone_;  // being launched
  program::Stream alone_stream_ = program::Stream::compute;
};

}  // namespace mop::cuda
