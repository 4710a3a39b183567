#include "sim/program/landing.h"

#include <algorithm>

namespace mop::program {

bool by_copy_engines(const StepProgram& program, const Op& op) {
  if (!is_collective(op.kind) || !by_copy_engines(op, program.groups[op.group].span())) return false;
  const auto operands = program.operands(op);
  const auto written = std::ranges::find(operands, true, &Use::write);
  if (written == operands.end()) return false;
  const View& to = written->view;
  return op.kind == OpKind::all_gather ? to.rank_stride == 0 : to.dense();
}

}  // namespace mop::program
