// Operands as the kernels see them: runs of contiguous elements whose type is known at run time. Kernels load
// pieces of runs as fp32, compute, and store them in the operand's type, bf16 rounded to nearest even.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <tuple>

#include "exec/interpreter/call.h"
#include "sim/base/error.h"

namespace mop::cpu {

using interpreter::Call;
using interpreter::Operand;
using program::Type;

// Contiguous elements.
struct Run {
  std::byte* data = nullptr;
  int64_t n = 0;
  Type type = Type::f32;
  Run part(int64_t first, int64_t count) const {
    return {data + first * program::size_of(type), count, type};
  }
};

// Elements of a run as fp32 and back, converted; not i32, whose values fp32 does not hold. add: stored +
// from.
void load(const Run& run, float* to);
void store(const float* from, const Run& run);
void add(const float* from, const Run& run);
inline void store(const float* from, const Run& run, bool accumulate) {
  accumulate ? add(from, run) : store(from, run);
}
// Converts between any two types; equal lengths.
void convert(const Run& from, const Run& to);
void clear(const Run& run);

// One matrix of an operand: (rows, cols), `ld` elements from row to row.
struct Matrix {
  std::byte* data = nullptr;
  int64_t rows = 0, cols = 0, ld = 0;
  Type type = Type::f32;
  Run row(int64_t r) const { return part(r, 0, cols); }
  Run part(int64_t r, int64_t col, int64_t count) const {
    return {data + (r * ld + col) * program::size_of(type), count, type};
  }
};
inline Matrix matrix(const Operand& operand, int64_t index = 0) {
  const program::View& v = operand.view;
  return {operand.data + index * v.stride * program::size_of(v.type), v.rows, v.cols, v.ld, v.type};
}

// Rows of all matrices of an operand, one after the other.
inline int64_t rows(const Operand& operand) {
  return operand.view.count * operand.view.rows;
}
inline Run row(const Operand& operand, int64_t r) {
  return matrix(operand, r / operand.view.rows).row(r % operand.view.rows);
}

// Operand i, which has to be there; or, if it is optional, a null one.
inline const Operand& required(std::span<const Operand> operands, size_t i) {
  ensure(i < operands.size() && operands[i], "an operation has the operands that ops.h lists");
  return operands[i];
}
inline Operand optional(std::span<const Operand> operands, size_t i) {
  return i < operands.size() ? operands[i] : Operand{};
}

// A vector of whole numbers: (1, n) or contiguous rows.
std::span<int32_t> integers(const Operand& operand);
// A (1, 1) operand of any type.
double scalar(const Operand& operand);
void set_scalar(const Operand& operand, double value, bool accumulate = false);

// Walks over an operand's elements in order, as runs.
class Runs {
 public:
  explicit Runs(const Operand& operand);
  int64_t contiguous() const { return left_in_row_; }  // elements from here on; 0: at the end
  Run next(int64_t n) {                                // at most contiguous()
    const Run run{at_, n, operand_.view.type};
    at_ += n * program::size_of(operand_.view.type);
    left_in_row_ -= n;
    if (left_in_row_ == 0) start_row(next_row_);
    return run;
  }

 private:
  void start_row(int64_t r);

  Operand operand_;
  std::byte* at_ = nullptr;
  int64_t left_in_row_ = 0, next_row_ = 0;
};

// Kernels convert this many elements at a time, on the stack.
inline constexpr int64_t kPiece = 512;
using Piece = std::array<float, kPiece>;

// Calls f(runs...) with pieces of at most kPiece elements, in order; the operands have equally many elements.
template <typename F, typename... Operands>
void for_each_piece(F f, const Operands&... operands) {
  std::array<Runs, sizeof...(operands)> walks{Runs(operands)...};
  const auto step = [&] {
    int64_t n = kPiece;
    for (const Runs& walk : walks) n = std::min(n, walk.contiguous());
    return n;
  };
  while (const int64_t n = step()) std::apply([&](auto&... walk) { f(walk.next(n)...); }, walks);
  for (const Runs& walk : walks) ensure(walk.contiguous() == 0, "operands have equally many elements");
}

}  // namespace mop::cpu
