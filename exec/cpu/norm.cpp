#include <algorithm>

#include "exec/cpu/operations.h"
#include "exec/cpu/rms.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {

void rms_norm(const Call& call, const Constants& constants, Workspace& workspace) {
  const Operand &x = required(call.in, 0), &weight = required(call.in, 1), &y = required(call.out, 0);
  const Operand residual = optional(call.in, 2), sum = optional(call.out, 1);
  const int64_t cols = x.view.cols, d = weight.view.cols;
  ensure(cols % d == 0 && y.view.cols == cols && rows(y) == rows(x), "a norm keeps the shape");
  float* const w = workspace.take<float>(d).data();
  float* const values = workspace.take<float>(cols).data();
  float* const more = workspace.take<float>(cols).data();
  load(row(weight, 0), w);
  for (int64_t r = 0; r < rows(x); ++r) {
    load(row(x, r), values);
    if (residual) {
      load(row(residual, r), more);
      for (int64_t i = 0; i < cols; ++i) values[i] += more[i];
    }
    if (sum) {
      store(values, row(sum, r));
      load(row(sum, r), values);  // the backward pass sees the sum as it is stored
    }
    for (int64_t i = 0; i < cols; i += d)
      rms_normalise(values + i, w, d, constants.model.norm_eps, values + i);
    store(values, row(y, r));
  }
}

void rms_norm_bwd(const Call& call, const Constants& constants, Workspace& workspace) {
  const Operand &dy = required(call.in, 0), &x = required(call.in, 1), &weight = required(call.in, 2);
  const Operand d_sum = optional(call.in, 3);
  const Operand &dx = required(call.out, 0), &d_weight = required(call.out, 1);
  const int64_t cols = x.view.cols, d = weight.view.cols;
  ensure(cols % d == 0 && rows(dy) == rows(x) && rows(dx) == rows(x) && dy.view.cols == cols &&
             dx.view.cols == cols,
         "a norm keeps the shape");
  float* const w = workspace.take<float>(d).data();
  float* const values = workspace.take<float>(cols).data();
  float* const gradient = workspace.take<float>(cols).data();
  double* const dw = workspace.take<double>(d).data();
  load(row(weight, 0), w);
  std::fill(dw, dw + d, 0.0);
  for (int64_t r = 0; r < rows(x); ++r) {
    load(row(x, r), values);
    load(row(dy, r), gradient);
    for (int64_t i = 0; i < cols; i += d)
      rms_normalise_bwd(gradient + i, values + i, w, d, constants.model.norm_eps, gradient + i, dw);
    if (d_sum) {
      load(row(d_sum, r), values);
      for (int64_t i = 0; i < cols; ++i) gradient[i] += values[i];
    }
    store(gradient, row(dx, r));
  }
  for (int64_t i = 0; i < d; ++i) w[i] = static_cast<float>(dw[i]);
  store(w, row(d_weight, 0), call.op->does.accumulate);
}

}  // namespace mop::cpu
