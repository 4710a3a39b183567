// Matrix products of experts: each has its rows of the round and its own weights.
#include "exec/cpu/gemm.h"
#include "exec/cpu/routing.h"

namespace mop::cpu {
namespace {

Matrix rows_between(const Operand& operand, int64_t first, int64_t last) {
  Matrix m = matrix(operand);
  ensure(operand.view.count == 1 && last <= m.rows, "the rows of a round fit into its buffers");
  m.data += first * m.ld * program::size_of(m.type);
  m.rows = last - first;
  return m;
}

// Of own experts and slots, the matrix that belongs to this expert.
Matrix of_expert(const Operand& own, const Operand& spilled, int64_t own_index, int64_t slot) {
  const Operand& all = own_index >= 0 ? own : spilled;
  const int64_t index = own_index >= 0 ? own_index : slot;
  ensure(all && index < all.view.count, "every expert that computes has its weights in place");
  return matrix(all, index);
}

void weight_gradients(const Call& call, Workspace& workspace) {
  const Operand &a = required(call.in, 0), &b = required(call.in, 1), &rounds = required(call.in, 2);
  const Operand &own = required(call.out, 0), spilled = optional(call.out, 1);
  const auto multiply_rows = [&](int64_t first, int64_t last, int64_t own_index, int64_t slot, bool adds) {
    multiply(rows_between(a, first, last), true, rows_between(b, first, last), false, Run{},
             of_expert(own, spilled, own_index, slot), adds, workspace);
  };
  for_each_expert_gradient(call, rounds, multiply_rows);
}

}  // namespace

void grouped_gemm(const Call& call, Workspace& workspace) {
  const program::Does& does = call.op->does;
  if (does.transpose_a) return weight_gradients(call, workspace);
  const Operand &a = required(call.in, 0), &rounds = required(call.in, 1), &own = required(call.in, 2),
                &c = required(call.out, 0);
  const Operand spilled = optional(call.in, 3), bias = optional(call.in, 4),
                spilled_bias = optional(call.in, 5);
  for_each_expert(call, rounds, [&](int64_t first, int64_t last, int64_t own_index, int64_t slot) {
    const Run bias_row = bias ? of_expert(bias, spilled_bias, own_index, slot).row(0) : Run{};
    multiply(rows_between(a, first, last), false, of_expert(own, spilled, own_index, slot), does.transpose_b,
             bias_row, rows_between(c, first, last), false, workspace);
  });
}

void expert_bias_bwd(const Call& call) {
  const Operand &dy = required(call.in, 0), &rounds = required(call.in, 1);
  const Operand weights = optional(call.in, 2);
  const Operand &own = required(call.out, 0), spilled = optional(call.out, 1);
  Piece piece;
  std::array<double, kPiece> sums;
  const auto sum_rows = [&](int64_t first, int64_t last, int64_t own_index, int64_t slot, bool adds) {
    const Matrix from = rows_between(dy, first, last);
    const Run to = of_expert(own, spilled, own_index, slot).row(0);
    for (int64_t col = 0; col < from.cols; col += kPiece) {
      const int64_t n = std::min(kPiece, from.cols - col);
      sums.fill(0);
      for (int64_t r = 0; r < from.rows; ++r) {
        float weight = 1;
        if (weights) load(routed_row(weights, first + r), &weight);
        load(from.part(r, col, n), piece.data());
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) sums[i] += static_cast<double>(weight) * piece[i];
      }
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) piece[i] = static_cast<float>(sums[i]);
      store(piece.data(), to.part(col, n), adds);
    }
  };
  for_each_expert_gradient(call, rounds, sum_rows);
}

}  // namespace mop::cpu
