// What the paths of adam.h have in common: one update over elements that follow one another. No functions
// with bodies: the files that include this are compiled for different CPUs.
#pragma once
#include <cstdint>

namespace mop::host {

// g *= scale; m += one_minus_beta1 (g - m); v += one_minus_beta2 (g^2 - v);
// w -= decay w + step_size m / (sqrt(v) inverse_root + eps). One rounding for the changes, which are small
// beside what they change: a decay below fp32's spacing of 1 - decay is not lost.
struct AdamUpdate {
  float scale, one_minus_beta1, one_minus_beta2, decay, step_size, inverse_root, eps;
};

struct AdamSpan {
  int64_t n;
  float *master, *m, *v;  // no master: the weights are it
  const void* gradient;
  void* weights;
  bool narrow_gradient, narrow_weights;  // bf16, else fp32
};

void adam_portable(const AdamUpdate& update, const AdamSpan& span);
void adam_avx512(const AdamUpdate& update, const AdamSpan& span);

}  // namespace mop::host
