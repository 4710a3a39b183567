#include "exec/cpu/workspace.h"

#include <algorithm>

#include "exec/cpu/gemm.h"
#include "exec/cpu/operations.h"
#include "exec/cpu/routing.h"
#include "sim/base/error.h"

namespace mop::cpu {
namespace {

int64_t row_bytes(const program::StepProgram& program, const program::Op& op) {
  int64_t sum = 0;
  for (uint32_t u = op.uses; u < op.uses + op.use_count; ++u)
    sum += Workspace::size<double>(program.uses[u].view.cols);
  return sum;
}

int64_t bytes(const program::StepProgram& program, const program::Op& op) {
  using enum program::OpKind;
  switch (op.kind) {
    case gemm:
      return multiply_bytes();
    case sort:
    case grouped_gemm:
    case topk:
    case topk_bwd:
    case balance_loss:
      return routed_bytes(program, op);
    case attention_fwd:
    case attention_bwd: {
      const auto shape = program::AttentionShape::of(program.shape(op));
      return attention_bytes(shape.qk_dim, shape.v_dim);
    }
    // A row of every operand.
    case rms_norm:
    case rms_norm_bwd:
    case rope:
    case rope_bwd:
    case mla_keys_bwd:
    case embedding_bwd:
      return row_bytes(program, op);
    default:
      return 0;
  }
}

}  // namespace

Workspace::Workspace(int64_t bytes)
    : memory_(std::make_unique<std::byte[]>(static_cast<size_t>(bytes + kAlignment))), bytes_(bytes) {
  void* start = memory_.get();
  size_t space = static_cast<size_t>(bytes + kAlignment);
  start_ = static_cast<std::byte*>(std::align(kAlignment, static_cast<size_t>(bytes), start, space));
}

std::byte* Workspace::take_bytes(int64_t bytes) {
  ensure(bytes <= bytes_ - used_, "a workspace is as large as workspace_bytes says");
  std::byte* const result = start_ + used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return result;
}

int64_t workspace_bytes(const program::StepProgram& program) {
  int64_t most = 0;
  for (const program::Op& op : program.ops) most = std::max(most, bytes(program, op));
  return most;
}

}  // namespace mop::cpu
