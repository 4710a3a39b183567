#include "exec/cpu/gemm.h"

#include <Eigen/Core>

#include "exec/cpu/operations.h"

namespace mop::cpu {
namespace {

// Products are cut into tiles: of C in rows and columns, and of the inner dimension.
constexpr int64_t kRows = 256, kColumns = 256, kDepth = 512;

using Tile = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Map = Eigen::Map<Tile, 0, Eigen::OuterStride<>>;
using ConstMap = Eigen::Map<const Tile, 0, Eigen::OuterStride<>>;

// Elements [row, row + rows) x [col, col + cols) as fp32: in place, or converted into `scratch`.
ConstMap tile(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols, float* scratch) {
  if (m.type == Type::f32) {
    return {reinterpret_cast<const float*>(m.part(row, col, cols).data), rows, cols,
            Eigen::OuterStride<>(m.ld)};
  }
  for (int64_t r = 0; r < rows; ++r) load(m.part(row + r, col, cols), scratch + r * cols);
  return {scratch, rows, cols, Eigen::OuterStride<>(cols)};
}

}  // namespace

int64_t multiply_bytes() {
  return Workspace::size<float>(kRows * kDepth) + Workspace::size<float>(kDepth * kColumns) +
         Workspace::size<float>(kRows * kColumns) + Workspace::size<float>(kColumns);
}

void multiply(const Matrix& a, bool transpose_a, const Matrix& b, bool transpose_b, const Run& bias,
              const Matrix& c, bool accumulate, Workspace& workspace) {
  const int64_t m = c.rows, n = c.cols, depth = transpose_a ? a.rows : a.cols;
  ensure((transpose_a ? a.cols : a.rows) == m && (transpose_b ? b.rows : b.cols) == n &&
             (transpose_b ? b.cols : b.rows) == depth,
         "a product's matrices fit together");
  ensure(bias.data == nullptr || bias.n == n, "a bias is as wide as the product");

  const Workspace::Scope scope(workspace);
  float* const a_scratch = workspace.take<float>(kRows * kDepth).data();
  float* const b_scratch = workspace.take<float>(kDepth * kColumns).data();
  float* const c_scratch = workspace.take<float>(kRows * kColumns).data();
  float* const bias_scratch = workspace.take<float>(kColumns).data();

  for (int64_t col = 0; col < n; col += kColumns) {
    const int64_t cols = std::min(kColumns, n - col);
    if (bias.data != nullptr) load(bias.part(col, cols), bias_scratch);
    for (int64_t row = 0; row < m; row += kRows) {
      const int64_t rows = std::min(kRows, m - row);
      Map sum(c_scratch, rows, cols, Eigen::OuterStride<>(cols));
      sum.setZero();
      if (bias.data != nullptr) sum.rowwise() = Eigen::Map<const Eigen::RowVectorXf>(bias_scratch, cols);
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t ks = std::min(kDepth, depth - k);
        const ConstMap left =
            transpose_a ? tile(a, k, row, ks, rows, a_scratch) : tile(a, row, k, rows, ks, a_scratch);
        const ConstMap right =
            transpose_b ? tile(b, col, k, cols, ks, b_scratch) : tile(b, k, col, ks, cols, b_scratch);
        if (transpose_a && transpose_b) {
          sum.noalias() += left.transpose() * right.transpose();
        } else if (transpose_a) {
          sum.noalias() += left.transpose() * right;
        } else if (transpose_b) {
          sum.noalias() += left * right.transpose();
        } else {
          sum.noalias() += left * right;
        }
      }
      for (int64_t r = 0; r < rows; ++r) store(c_scratch + r * cols, c.part(row + r, col, cols), accumulate);
    }
  }
}

void gemm(const Call& call, Workspace& workspace) {
  const program::Does& does = call.op->does;
  const Operand &a = required(call.in, 0), &b = required(call.in, 1), &c = required(call.out, 0);
  const Operand bias = optional(call.in, 2);
  ensure(a.view.count == c.view.count && b.view.count == c.view.count, "a gemm has as many A, B and C");
  for (int64_t i = 0; i < c.view.count; ++i) {
    multiply(matrix(a, i), does.transpose_a, matrix(b, i), does.transpose_b,
             bias ? row(bias, rows(bias) == 1 ? 0 : i) : Run{}, matrix(c, i), does.accumulate, workspace);
  }
}

void column_sum(const Call& call) {
  const Operand &x = required(call.in, 0), &sum = required(call.out, 0);
  ensure(x.view.cols == sum.view.cols && x.view.count == rows(sum), "a column sum has one row a matrix");
  Piece piece;
  std::array<double, kPiece> sums;
  for (int64_t i = 0; i < x.view.count; ++i) {
    const Matrix from = matrix(x, i);
    for (int64_t col = 0; col < from.cols; col += kPiece) {
      const int64_t n = std::min(kPiece, from.cols - col);
      sums.fill(0);
      for (int64_t r = 0; r < from.rows; ++r) {
        load(from.part(r, col, n), piece.data());
        for (int64_t j = 0; j < n; ++j) sums[static_cast<size_t>(j)] += piece[static_cast<size_t>(j)];
      }
      for (int64_t j = 0; j < n; ++j)
        piece[static_cast<size_t>(j)] = static_cast<float>(sums[static_cast<size_t>(j)]);
      store(piece.data(), row(sum, i).part(col, n), call.op->does.accumulate);
    }
  }
}

}  // namespace mop::cpu
