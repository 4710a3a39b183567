#include "sim/program/timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"

namespace mop::program {
namespace {

std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump();
}

double microseconds(int64_t nanoseconds) {
  return static_cast<double>(nanoseconds) / 1000;
}

[[noreturn]] void fail(const std::string& path) {
  throw UserError(fmt::format("timeline '{}' cannot be written: {}", path, std::strerror(errno)));
}

// Events one a line. `buffer` keeps writes large.
class TraceFile {
 public:
  explicit TraceFile(const std::string& path) : path_(path), file_(path) {
    if (!file_) fail(path_);
    file_ << "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [";
  }
  template <typename... Args>
  void event(fmt::format_string<Args...> format, Args&&... args) {
    file_ << (first_ ? "\n" : ",\n") << fmt::format(format, std::forward<Args>(args)...);
    first_ = false;
  }
  void close() {
    file_ << "\n]}\n";
    file_.close();
    if (!file_) fail(path_);
  }

 private:
  std::string path_;
  std::ofstream file_;
  bool first_ = true;
};

// What an operation moves or computes; routed operations at the capacity of a round.
std::string arguments(const StepProgram& program, const Op& op) {
  const Shape& shape = program.shape(op);
  std::string text =
      fmt::format("\"phase\": \"{}\", \"component\": \"{}\"", name(op.phase), name(op.component));
  const char* at_most = op.routed == Routed::no ? "" : "_at_most";
  if (const double bytes = hbm_bytes(op.kind, shape); bytes > 0)
    text += fmt::format(", \"bytes{}\": {:.0f}", at_most, bytes);
  if (const double work = flops(op.kind, shape); work > 0)
    text += fmt::format(", \"flops{}\": {:.0f}", at_most, work);
  return text;
}

struct Life {
  int64_t begin = std::numeric_limits<int64_t>::max(), end = std::numeric_limits<int64_t>::min();
};

// Live bytes over time: a buffer lives from the start of the first of its uses to the end of the last.
void count_memory(TraceFile& file, uint32_t pid, const RankTimeline& rank, int64_t origin) {
  const StepProgram& program = *rank.program;
  std::vector<Life> lives(program.buffers.size());
  for (const OpSpan& span : rank.spans) {
    const Op& op = program.ops[span.op];
    for (const Use& use : program.uses_of(op)) {
      Life& life = lives[use.buffer];
      life.begin = std::min(life.begin, span.start);
      life.end = std::max(life.end, span.end);
    }
  }
  for (const Space space : {Space::hbm, Space::host}) {
    int64_t bytes = 0;
    std::map<int64_t, int64_t> changes;
    for (size_t b = 0; b < lives.size(); ++b) {
      const Buffer& buffer = program.buffers[b];
      if (buffer.space != space) continue;
      if (buffer.persistent) {
        bytes += buffer.bytes;
      } else if (lives[b].begin <= lives[b].end) {
        changes[lives[b].begin] += buffer.bytes;
        changes[lives[b].end] -= buffer.bytes;
      }
    }
    if (bytes == 0 && changes.empty()) continue;
    changes.try_emplace(origin, 0);
    const char* counter = space == Space::hbm ? "HBM, live bytes" : "host memory, live bytes";
    for (const auto& [time, change] : changes) {
      bytes += change;
      file.event(R"({{"ph": "C", "pid": {}, "name": "{}", "ts": {:.3f}, "args": {{"bytes": {}}}}})", pid,
                 counter, microseconds(time - origin), bytes);
    }
  }
}

}  // namespace

void check_timeline(const std::string& path) {
  if (!std::ofstream(path, std::ios::app)) fail(path);
}

void write_timeline(const std::string& path, std::span<const RankTimeline> ranks) {
  int64_t origin = std::numeric_limits<int64_t>::max();
  for (const RankTimeline& rank : ranks)
    for (const OpSpan& span : rank.spans) origin = std::min(origin, span.start);

  TraceFile file(path);
  for (uint32_t pid = 0; pid < ranks.size(); ++pid) {
    const StepProgram& program = *ranks[pid].program;
    file.event(R"({{"ph": "M", "pid": {}, "name": "process_name", "args": {{"name": {}}}}})", pid,
               quoted(ranks[pid].title));
    file.event(R"({{"ph": "M", "pid": {}, "name": "process_sort_index", "args": {{"sort_index": {}}}}})", pid,
               pid);
    std::array<std::vector<OpSpan>, kStreams> streams;
    for (const OpSpan& span : ranks[pid].spans)
      streams[static_cast<size_t>(program.ops[span.op].stream)].push_back(span);
    for (int stream = 0; stream < kStreams; ++stream) {
      std::vector<OpSpan>& here = streams[static_cast<size_t>(stream)];
      if (here.empty()) continue;
      std::ranges::stable_sort(here, {}, &OpSpan::start);
      file.event(R"({{"ph": "M", "pid": {}, "tid": {}, "name": "thread_name", "args": {{"name": "{}"}}}})",
                 pid, stream, name(static_cast<Stream>(stream)));
      file.event(
          R"({{"ph": "M", "pid": {}, "tid": {}, "name": "thread_sort_index", "args": {{"sort_index": {}}}}})",
          pid, stream, stream);
      for (const OpSpan& span : here) {
        const Op& op = program.ops[span.op];
        const bool waited = span.busy < span.end - span.start;
        file.event(
            R"({{"ph": "X", "pid": {}, "tid": {}, "name": {}, "cat": "{}", "ts": {:.3f}, "dur": {:.3f}, "args": {{{}{}}}}})",
            pid, stream, quoted(program.op_name(span.op)), name(op.kind), microseconds(span.start - origin),
            microseconds(span.end - span.start), arguments(program, op),
            waited ? fmt::format(", \"busy_us\": {:.3f}", microseconds(span.busy)) : "");
      }
    }
    count_memory(file, pid, ranks[pid], origin);
  }
  file.close();
}

}  // namespace mop::program
