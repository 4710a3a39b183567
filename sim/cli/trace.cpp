#include "sim/cli/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"

namespace mop::cli {
namespace {

using engine::Time;
using program::OpId;

std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump();
}

double microseconds(Time t) {
  return static_cast<double>(t) / 1000;
}

// Events one a line. `buffer` keeps writes large.
class TraceFile {
 public:
  explicit TraceFile(const std::string& path) : path_(path), file_(path) {
    if (!file_) fail();
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
    if (!file_) fail();
  }

 private:
  [[noreturn]] void fail() const {
    throw UserError(fmt::format("timeline '{}' cannot be written: {}", path_, std::strerror(errno)));
  }
  std::string path_;
  std::ofstream file_;
  bool first_ = true;
};

// What an operation moves or computes; routed operations at the capacity of a round.
std::string arguments(const program::StepProgram& program, const program::Op& op) {
  const program::Shape& shape = program.shape(op);
  std::string text =
      fmt::format("\"phase\": \"{}\", \"component\": \"{}\"", name(op.phase), name(op.component));
  const char* at_most = op.routed == program::Routed::no ? "" : "_at_most";
  if (const double bytes = program::hbm_bytes(op.kind, shape); bytes > 0)
    text += fmt::format(", \"bytes{}\": {:.0f}", at_most, bytes);
  if (const double work = program::flops(op.kind, shape); work > 0)
    text += fmt::format(", \"flops{}\": {:.0f}", at_most, work);
  return text;
}

struct Life {
  Time begin = std::numeric_limits<Time>::max(), end = std::numeric_limits<Time>::min();
};

// Live bytes over time: a buffer lives from the start of the first of its uses to the end of the last.
void count_memory(TraceFile& file, uint32_t pid, const program::StepProgram& program,
                  const std::vector<OpId>& op_of_task, const std::vector<engine::Span>& spans, Time origin) {
  std::vector<Life> lives(program.buffers.size());
  for (size_t task = 0; task < spans.size(); ++task) {
    const program::Op& op = program.ops[op_of_task[task]];
    for (uint32_t u = op.uses; u < op.uses + op.use_count; ++u) {
      Life& life = lives[program.uses[u].buffer];
      life.begin = std::min(life.begin, spans[task].start);
      life.end = std::max(life.end, spans[task].end);
    }
  }
  for (const program::Space space : {program::Space::hbm, program::Space::host}) {
    int64_t bytes = 0;
    std::map<Time, int64_t> changes;
    for (size_t b = 0; b < lives.size(); ++b) {
      const program::Buffer& buffer = program.buffers[b];
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
    const char* counter = space == program::Space::hbm ? "HBM, live bytes" : "host memory, live bytes";
    for (const auto& [time, change] : changes) {
      bytes += change;
      file.event(R"({{"ph": "C", "pid": {}, "name": "{}", "ts": {:.3f}, "args": {{"bytes": {}}}}})", pid,
                 counter, microseconds(time - origin), bytes);
    }
  }
}

}  // namespace

void write_trace(const std::string& path, const predict::Scenario& scenario,
                 const predict::Details& details) {
  Time origin = std::numeric_limits<Time>::max();
  for (const engine::RankReport& rank : details.report.ranks)
    for (const engine::Span& span : rank.spans) origin = std::min(origin, span.start);

  TraceFile file(path);
  for (uint32_t pid = 0; pid < details.fold.classes.size(); ++pid) {
    const predict::RankClass& ranks = details.fold.classes[pid];
    const program::StepProgram& program = details.program(ranks.kind);
    const std::vector<OpId>& op_of_task = details.schedules[ranks.kind].op_of_task;
    const std::vector<engine::Span>& spans = details.report.ranks[pid].spans;
    ensure(spans.size() == op_of_task.size(), "every task has a span");

    const std::string alike = ranks.members > 1 ? fmt::format(" and {} alike", ranks.members - 1) : "";
    file.event(R"({{"ph": "M", "pid": {}, "name": "process_name", "args": {{"name": {}}}}})", pid,
               quoted(fmt::format("rank {}{}, {} {}", ranks.rank, alike, scenario.model.name,
                                  plan::family_name(scenario.plan.family))));
    file.event(R"({{"ph": "M", "pid": {}, "name": "process_sort_index", "args": {{"sort_index": {}}}}})", pid,
               pid);
    std::array<std::vector<uint32_t>, program::kStreams> tasks;
    for (uint32_t task = 0; task < spans.size(); ++task)
      tasks[static_cast<size_t>(program.ops[op_of_task[task]].stream)].push_back(task);
    for (int stream = 0; stream < program::kStreams; ++stream) {
      std::vector<uint32_t>& here = tasks[static_cast<size_t>(stream)];
      if (here.empty()) continue;
      std::ranges::stable_sort(here, {}, [&](uint32_t task) { return spans[task].start; });
      file.event(R"({{"ph": "M", "pid": {}, "tid": {}, "name": "thread_name", "args": {{"name": "{}"}}}})",
                 pid, stream, program::name(static_cast<program::Stream>(stream)));
      file.event(
          R"({{"ph": "M", "pid": {}, "tid": {}, "name": "thread_sort_index", "args": {{"sort_index": {}}}}})",
          pid, stream, stream);
      for (const uint32_t task : here) {
        const program::Op& op = program.ops[op_of_task[task]];
        file.event(
            R"({{"ph": "X", "pid": {}, "tid": {}, "name": {}, "cat": "{}", "ts": {:.3f}, "dur": {:.3f}, "args": {{{}}}}})",
            pid, stream, quoted(program.op_name(op_of_task[task])), program::name(op.kind),
            microseconds(spans[task].start - origin), microseconds(spans[task].end - spans[task].start),
            arguments(program, op));
      }
    }
    count_memory(file, pid, program, op_of_task, spans, origin);
  }
  file.close();
}

}  // namespace mop::cli
