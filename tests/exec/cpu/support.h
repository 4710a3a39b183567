// Running one kernel on random operands: odd layouts whose padding has to survive, and references in fp64.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "exec/cpu/kernels.h"
#include "exec/cpu/workspace.h"
#include "sim/base/error.h"

namespace mop::cpu {

using program::Does;
using program::OpKind;
using program::Type;
using Values = std::vector<double>;

inline std::mt19937& rng() {
  static std::mt19937 generator(20240917);
  return generator;
}
inline int64_t uniform(int64_t low, int64_t high) {  // inclusive
  return std::uniform_int_distribution<int64_t>(low, high)(rng());
}
inline Values normal(int64_t n, double scale = 1) {
  std::normal_distribution<double> distribution(0, scale);
  Values values(static_cast<size_t>(n));
  for (double& value : values) value = distribution(rng());
  return values;
}

double round_to(double value, Type type);  // to nearest, ties to even

// An operand with its memory: `count` matrices of (rows, cols) with random gaps between and around them.
class Tensor {
 public:
  Tensor() = default;  // missing
  Tensor(int64_t rows, int64_t cols, Type type = Type::f32, int64_t count = 1);
  static Tensor of(int64_t rows, int64_t cols, const Values& values, Type type = Type::f32,
                   int64_t count = 1);
  static Tensor random(int64_t rows, int64_t cols, Type type = Type::f32, int64_t count = 1,
                       double scale = 1) {
    return of(rows, cols, normal(rows * cols * count, scale), type, count);
  }
  static Tensor contiguous(int64_t rows, int64_t cols, const Values& values, Type type = Type::f32);

  const program::View& view() const { return view_; }
  int64_t size() const { return view_.elements(); }
  Values values() const;
  void set(const Values& values);
  double at(int64_t i) const;  // element i in order
  Operand operand();
  bool gaps_intact() const;  // nothing but elements was written

 private:
  Tensor(const program::View& view, int64_t first);
  int64_t position(int64_t i) const;  // bytes
  std::vector<std::byte> memory_;
  program::View view_;
};

struct Setting {
  model::ModelConfig model;
  model::Rope rope;
  interpreter::Step step;
  int index = 0, size = 1;
  int16_t layer = 0;
  int64_t round = 0;
  program::Shape shape;
  plan::LeastLoadedOptions least_loaded;
  int64_t round_rows = 0;
  int spill_slots = 0;

  Setting() { model.norm_eps = 1e-5; }
};

// Runs the operation in a Workspace of workspace_bytes; checks that reads keep their values (unless they
// share memory with an output) and that gaps are intact.
void run_op(OpKind kind, const Does& does, std::vector<Tensor*> in, std::vector<Tensor*> out,
            const Setting& setting = {});
// How many allocations the last run_op's kernel made.
int64_t allocations_of_last_run();

// Every element within `tolerance` x scale of what is wanted, plus a rounding where it is bf16; the scale is
// the largest wanted value or 1.
void expect_close(const Tensor& got, const Values& want, double tolerance = 2e-5);

// (f(x + h) - f(x - h)) / 2 h for every element of x.
Values numeric_gradient(const std::function<double(const Values&)>& f, const Values& x, double h = 1e-5);

inline double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
inline Values plus(Values a, const Values& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

inline constexpr Type kReals[] = {Type::f32, Type::bf16};

}  // namespace mop::cpu
