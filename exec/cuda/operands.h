// The program's operands as the kernels take them.
#pragma once
#include "exec/interpreter/call.h"
#include "kernels/matrix.h"
#include "sim/base/error.h"

namespace mop::cuda {

using interpreter::Operand;

inline kernels::Type type_of(program::Type type) {
  return static_cast<kernels::Type>(type);
}

inline kernels::Matrix matrix(const Operand& o) {
  if (!o) return {};
  ensure(o.view.count == 1, "an operand is one matrix");
  return {o.data, type_of(o.view.type), o.view.rows, o.view.cols, o.view.ld};
}

template <typename T>
T* pointer(const Operand& o) {
  return reinterpret_cast<T*>(o.data);
}

inline int64_t bytes_of(const Operand& o) {
  return o.view.elements() * program::size_of(o.view.type);
}

// The first `rows` rows.
inline kernels::Matrix rows_of(const Operand& o, int64_t rows) {
  kernels::Matrix m = matrix(o);
  m.rows = rows;
  return m;
}

}  // namespace mop::cuda
