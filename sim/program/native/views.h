// Operands of row-major matrices inside buffers.
#pragma once
#include "sim/program/builder.h"

namespace mop::program {

// (rows, cols) from element `first` of a buffer on; ld 0: rows follow one another.
inline Operand matrix(BufferId buffer, Type type, int64_t rows, int64_t cols, int64_t first = 0,
                      int64_t ld = 0) {
  View v;
  v.type = type;
  v.rows = rows;
  v.cols = cols;
  v.ld = ld == 0 ? cols : ld;
  v.offset = first * size_of(type);
  return {buffer, v};
}

inline Operand columns(Operand m, int64_t first, int64_t count) {
  m.view.offset += first * size_of(m.view.type);
  m.view.cols = count;
  return m;
}

inline Operand row_range(Operand m, int64_t first, int64_t count) {
  m.view.offset += first * m.view.ld * size_of(m.view.type);
  m.view.rows = count;
  return m;
}

// `count` of them, `stride` elements apart.
inline Operand many(Operand m, int64_t count, int64_t stride) {
  m.view.count = count;
  m.view.stride = stride;
  return m;
}

// Rank i of the operation's group starts i x `elements` further.
inline Operand by_rank(Operand m, int64_t elements) {
  m.view.rank_stride = elements * size_of(m.view.type);
  return m;
}

}  // namespace mop::program
