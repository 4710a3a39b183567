#include "exec/cuda/span_log.h"

#include <utility>

namespace mop::cuda {

using program::Stream;

SpanLog::SpanLog(size_t most, std::function<void(size_t event, Stream stream)> record)
    : most_(most), record_(std::move(record)) {
  spans_.reserve(most);
}

void SpanLog::set(bool each, bool each_alone) {
  each_ = each, each_alone_ = each_alone;
}

bool SpanLog::alone(const program::Op& op) const {
  return op.stream != Stream::compute || op.kind == program::OpKind::plan_routing || each_alone_;
}

std::optional<size_t> SpanLog::add(program::OpId id, std::optional<size_t> run) {
  if (spans_.size() == most_) return {};
  spans_.push_back({id, run.value_or(spans_.size())});
  return spans_.size() - 1;
}

std::optional<size_t> SpanLog::begin(program::OpId id, const program::Op& op) {
  const bool own = alone(op);
  if (own && op.stream == Stream::compute) end_run();
  if (!own && run_) return each_ ? add(id, run_) : std::nullopt;
  const std::optional<size_t> span = add(id, {});
  if (span) record_(2 * *span, op.stream);
  (own ? alone_ : run_) = span;
  alone_stream_ = op.stream;
  return span;
}

void SpanLog::end() {
  if (const auto span = std::exchange(alone_, {})) record_(2 * *span + 1, alone_stream_);
}

void SpanLog::end_run() {
  if (const auto span = std::exchange(run_, {})) record_(2 * *span + 1, Stream::compute);
}

void SpanLog::clear() {
  spans_.clear();
  run_.reset();
  alone_.reset();
}

}  // namespace mop::cuda
