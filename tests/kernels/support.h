// Matrices with gaps on the device, and how tests compare them with fp64 references.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "kernels/matrix.h"
#include "tests/kernels/device_array.h"

namespace mop::kernels {

class OnDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  }
  std::mt19937 random{7};

  int64_t number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  }
};

// How a matrix lies in memory: elements between rows beyond its columns, and before it. The defaults let
// kernels use wide accesses if the columns do.
struct Layout {
  int64_t gap = 0, shift = 0;
};

// (rows, cols) whose surroundings must stay as they are.
class DeviceMatrix {
 public:
  DeviceMatrix(const Values& values, int64_t rows, int64_t cols, Type type, Layout layout = {})
      : rows_(rows),
        cols_(cols),
        ld_(cols + layout.gap),
        shift_(layout.shift),
        type_(type),
        array_(spread(values), type) {}
  static DeviceMatrix poisoned(int64_t rows, int64_t cols, Type type, Layout layout = {}) {
    return {Values(static_cast<size_t>(rows * cols), DeviceArray::kPoison), rows, cols, type, layout};
  }

  Matrix view() const { return {array_.get(shift_), type_, rows_, cols_, ld_}; }
  operator Matrix() const { return view(); }
  operator ConstMatrix() const { return view(); }
  Values values() const {
    const Values all = array_.values();
    Values inside;
    std::vector<bool> seen(all.size());
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < cols_; ++c) {
        const auto at = static_cast<size_t>(shift_ + r * ld_ + c);
        inside.push_back(all[at]);
        seen[at] = true;
      }
    }
    for (size_t i = 0; i < all.size(); ++i)
      if (!seen[i] && all[i] != DeviceArray::kPoison) {
        ADD_FAILURE() << "element " << i << " outside of the matrix was written: " << all[i];
        break;
      }
    return inside;
  }

 private:
  Values spread(const Values& values) const {
    Values all(static_cast<size_t>(shift_ + rows_ * ld_ + 16), DeviceArray::kPoison);
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < cols_; ++c)
        all[static_cast<size_t>(shift_ + r * ld_ + c)] = values[static_cast<size_t>(r * cols_ + c)];
    return all;
  }
  int64_t rows_, cols_, ld_, shift_;
  Type type_;
  DeviceArray array_;
};

template <class T>
class DeviceVector {
 public:
  explicit DeviceVector(const std::vector<T>& values) : n_(values.size()), bytes_(values.size() * sizeof(T)) {
    if (n_ > 0)
      check(cudaMemcpy(bytes_.get(), values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "test data");
  }
  T* get() const { return static_cast<T*>(bytes_.get()); }
  std::vector<T> values() const {
    std::vector<T> out(n_);
    check(cudaDeviceSynchronize(), "test");
    if (n_ > 0)
      check(cudaMemcpy(out.data(), bytes_.get(), n_ * sizeof(T), cudaMemcpyDeviceToHost), "test data");
    return out;
  }

 private:
  size_t n_;
  DeviceBytes bytes_;
};

inline DeviceVector<float> device_floats(const Values& values) {
  return DeviceVector<float>(std::vector<float>(values.begin(), values.end()));
}
inline Values as_values(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

// Scratch memory full of NaN, so that whatever reads what nothing wrote shows.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    check(cudaMemset(bytes_.get(), 0xff, bytes_.size()), "test memory");
  }
  template <class T>
  T* get() const {
    return static_cast<T*>(bytes_.get());
  }

 private:
  DeviceBytes bytes_;
};

// Gradients of y = w x / rms, the norm of as many elements as w has: dx, which holds dy, and what dw gets.
inline void through_rms_norm(Values& dx, Values& dw, const Values& x, const Values& w, double eps) {
  const auto d = static_cast<double>(w.size());
  for (size_t first = 0; first < x.size(); first += w.size()) {
    double squares = 0, along = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      squares += x[first + i] * x[first + i];
      along += dx[first + i] * w[i] * x[first + i];
    }
    const double rms = std::sqrt(squares / d + eps);
    for (size_t i = 0; i < w.size(); ++i) {
      dw[i] += dx[first + i] * x[first + i] / rms;
      dx[first + i] = dx[first + i] * w[i] / rms - x[first + i] * along / (d * rms * rms * rms);
    }
  }
}

// Every element within `tolerance` of its size or of the typical one, whichever is more.
inline void expect_close(const Values& actual, const Values& expected, double tolerance, const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  double squares = 0;
  for (const double e : expected) squares += e * e;
  const double typical = expected.empty() ? 0 : std::sqrt(squares / static_cast<double>(expected.size()));
  for (size_t i = 0; i < actual.size(); ++i) {
    const double allowed = tolerance * std::max(std::abs(expected[i]), typical) + 1e-30;
    ASSERT_LE(std::abs(actual[i] - expected[i]), allowed)
        << what << "[" << i << "] is " << actual[i] << ", not " << expected[i];
  }
}

// One rounding to the type of what was computed in fp32.
inline double tolerance(Type type) {
  return type == Type::bf16 ? 4.5e-3 : 2e-5;
}

inline constexpr std::array kTypes{Type::bf16, Type::f32};
inline const char* name(Type type) {
  return type == Type::bf16 ? "bf16" : "f32";
}

inline double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}

}  // namespace mop::kernels
