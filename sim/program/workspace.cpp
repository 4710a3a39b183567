#include "sim/program/workspace.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace mop::program {
namespace {

// Of the operands that are written, or read.
int64_t bytes_of(const StepProgram& program, const Op& op, bool written, size_t from = 0) {
  int64_t bytes = 0;
  for (const Use& use : program.operands(op).subspan(from))
    if (use.buffer != kNoBuffer && use.write == written)
      bytes += (use.view.elements() * size_of(use.view.type) + 255) / 256 * 256;
  return bytes;
}

int64_t attention_workspace(const StepProgram& program, const Op& op) {
  const auto a = AttentionShape::of(program.shape(op));
  const int64_t rows = a.batch * a.q_len;
  // Gradients of keys and values, where queries share them: a head of each for every head of queries, before
  // they are summed.
  const int64_t shared = a.heads != a.kv_heads ? 2 * rows * a.heads * (a.qk_dim + a.v_dim) : 0;
  const int64_t added = op.does.accumulate ? 2 * rows * a.kv_heads * (a.qk_dim + a.v_dim) : 0;
  return 4 * rows * a.heads * (a.qk_dim + 1) + shared + added;
}

}  // namespace

int64_t exchange_workspace(const StepProgram& program, const Op& op) {
  switch (op.does.exchange) {
    case Exchange::columns_to_rows:
    case Exchange::dispatch:
      return bytes_of(program, op, true);
    case Exchange::rows_to_columns:
      return bytes_of(program, op, false);
    case Exchange::combine:
      return bytes_of(program, op, false, 1);  // behind the plan
    default:
      return 0;
  }
}

int64_t reduction_workspace(const StepProgram& program, const Op& op) {
  const auto operands = program.operands(op);
  const View &in = operands.front().view, &out = operands.back().view;
  const bool direct = in.type == out.type && out.dense() && !op.does.accumulate;
  return direct ? 0 : out.elements() * size_of(in.type);
}

int64_t workspace_bytes(const StepProgram& program, const std::function<bool(const Op&)>& copied) {
  std::array<int64_t, kStreams> most{};
  for (const Op& op : program.ops) {
    int64_t bytes = 0;
    if (op.kind == OpKind::all_to_all)
      bytes = exchange_workspace(program, op);
    else if (op.kind == OpKind::reduce_scatter && !copied(op))
      bytes = reduction_workspace(program, op);
    else if (op.kind == OpKind::attention_bwd)
      bytes = attention_workspace(program, op);
    else if (op.kind == OpKind::gemm || op.kind == OpKind::grouped_gemm)
      bytes = kProductWorkspace;
    int64_t& of_stream = most[static_cast<size_t>(op.stream)];
    of_stream = std::max(of_stream, bytes);
  }
  return std::accumulate(most.begin(), most.end(), int64_t{0});
}

}  // namespace mop::program
