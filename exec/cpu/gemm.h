// Matrix products on operands of any real type, in fp32.
#pragma once
#include "exec/cpu/tensor.h"
#include "exec/cpu/workspace.h"

namespace mop::cpu {

// Bytes of the workspace that one multiply takes.
int64_t multiply_bytes();

// c (m, n) = op(a) op(b) + bias, or += with accumulate; op transposes. bias: (1, n), or null data for none.
void multiply(const Matrix& a, bool transpose_a, const Matrix& b, bool transpose_b, const Run& bias,
              const Matrix& c, bool accumulate, Workspace& workspace);

}  // namespace mop::cpu
