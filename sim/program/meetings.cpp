#include "sim/program/meetings.h"

#include <map>
#include <tuple>

namespace mop::program {

std::vector<Meeting> meetings(const StepProgram& program, const std::function<bool(const Op&)>& copied) {
  std::map<std::tuple<Stream, int64_t, int64_t>, Meeting> found;
  for (const Op& op : program.ops) {
    if (!is_collective(op.kind) || copied(op)) continue;
    const plan::Span span = program.groups[op.group].span();
    Meeting& meeting =
        found.try_emplace({op.stream, span.size, span.stride}, Meeting{op.stream, span}).first->second;
    (op.kind == OpKind::send_recv ? meeting.neighbours
     : is_pairwise(op.kind)       ? meeting.everyone
                                  : meeting.collective) = true;
  }
  std::vector<Meeting> all;
  for (const auto& [key, meeting] : found) all.push_back(meeting);
  return all;
}

}  // namespace mop::program
