#include "sim/program/landing.h"

#include <algorithm>

namespace mop::program {

bool by_copy_engines(const StepProgram& program, const Op& op) {
  if (!is_collective(op.kind) || op.stream != Stream::gather) return false;
  const auto operands = program.operands(op);
  const auto written = std::ranges::find(operands, true, &Use::write);
  if (written == operands.end()) return false;
  const View& to = written->view;
  if (op.kind == OpKind::all_gather) return to.rank_stride == 0;
  return lands(op, program.groups[op.group].span()) && to.dense();
}

}  // namespace mop::program
