// Root-mean-square normalisation of one vector: y = w x / sqrt(mean(x^2) + eps).
#pragma once
#include <cmath>
#include <cstdint>

namespace mop::cpu {

inline double rms_inverse(const float* x, int64_t d, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < d; ++i) squares += static_cast<double>(x[i]) * x[i];
  return 1 / std::sqrt(squares / static_cast<double>(d) + eps);
}

// y may be x.
inline void rms_normalise(const float* x, const float* w, int64_t d, double eps, float* y) {
  const double inverse = rms_inverse(x, d, eps);
  for (int64_t i = 0; i < d; ++i) y[i] = static_cast<float>(w[i] * (x[i] * inverse));
}

// dx from dy, and the part of this vector added to dw. dx may be dy.
inline void rms_normalise_bwd(const float* dy, const float* x, const float* w, int64_t d, double eps,
                              float* dx, double* dw) {
  const double inverse = rms_inverse(x, d, eps);
  double projection = 0;  // mean of dy w x_hat
  for (int64_t i = 0; i < d; ++i) projection += static_cast<double>(dy[i]) * w[i] * (x[i] * inverse);
  projection /= static_cast<double>(d);
  for (int64_t i = 0; i < d; ++i) {
    const double x_hat = x[i] * inverse, gradient = dy[i];
    dw[i] += gradient * x_hat;
    dx[i] = static_cast<float>(inverse * (gradient * w[i] - x_hat * projection));
  }
}

}  // namespace mop::cpu
