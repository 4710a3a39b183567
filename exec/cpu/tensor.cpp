#include "exec/cpu/tensor.h"

#include <Eigen/Core>
#include <cstring>

namespace mop::cpu {
namespace {

using Bf16 = Eigen::bfloat16;

// Calls f with a null pointer to the element type.
template <typename F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::bf16:
      return f(static_cast<Bf16*>(nullptr));
    case Type::f32:
      return f(static_cast<float*>(nullptr));
    case Type::f64:
      return f(static_cast<double*>(nullptr));
    case Type::i32:
      return f(static_cast<int32_t*>(nullptr));
  }
  ensure(false, "an element type is one of four");
}

template <typename F>
void with_real(const Run& run, F f) {
  ensure(run.type != Type::i32, "a real operand is bf16, fp32 or fp64");
  with_type(run.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    f(reinterpret_cast<T*>(run.data));
  });
}

}  // namespace

void load(const Run& run, float* to) {
  with_real(run, [&](auto* from) {
    for (int64_t i = 0; i < run.n; ++i) to[i] = static_cast<float>(from[i]);
  });
}

void store(const float* from, const Run& run) {
  with_real(run, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    for (int64_t i = 0; i < run.n; ++i) to[i] = static_cast<T>(from[i]);
  });
}

void add(const float* from, const Run& run) {
  with_real(run, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    for (int64_t i = 0; i < run.n; ++i)
      to[i] = static_cast<T>(static_cast<Wide>(to[i]) + static_cast<Wide>(from[i]));
  });
}

void convert(const Run& from, const Run& to) {
  ensure(from.n == to.n, "what is converted keeps its length");
  if (from.type == to.type) {
    std::memmove(to.data, from.data, static_cast<size_t>(to.n * program::size_of(to.type)));
    return;
  }
  with_type(from.type, [&](auto* source_type) {
    with_type(to.type, [&](auto* target_type) {
      using Target = std::remove_pointer_t<decltype(target_type)>;
      const auto* source = reinterpret_cast<const std::remove_pointer_t<decltype(source_type)>*>(from.data);
      auto* target = reinterpret_cast<Target*>(to.data);
      for (int64_t i = 0; i < to.n; ++i) target[i] = static_cast<Target>(source[i]);
    });
  });
}

void clear(const Run& run) {
  std::memset(run.data, 0, static_cast<size_t>(run.n * program::size_of(run.type)));
}

std::span<int32_t> integers(const Operand& operand) {
  const program::View& v = operand.view;
  ensure(v.type == Type::i32, "ids, positions and counts are i32");
  ensure((v.rows == 1 || v.ld == v.cols) && (v.count == 1 || v.stride == v.rows * v.cols),
         "a vector of whole numbers is contiguous");
  return {reinterpret_cast<int32_t*>(operand.data), static_cast<size_t>(v.elements())};
}

double scalar(const Operand& operand) {
  ensure(operand.view.elements() == 1, "a scalar operand has one element");
  double value = 0;
  convert(row(operand, 0), {reinterpret_cast<std::byte*>(&value), 1, Type::f64});
  return value;
}

void set_scalar(const Operand& operand, double value, bool accumulate) {
  if (accumulate) value += scalar(operand);
  convert({reinterpret_cast<std::byte*>(&value), 1, Type::f64}, row(operand, 0));
}

Runs::Runs(const Operand& operand) : operand_(operand) {
  // Rows without gaps are one run.
  program::View& v = operand_.view;
  if (v.ld == v.cols || v.rows == 1) {
    v.cols *= v.rows;
    v.rows = 1;
    if (v.stride == v.cols || v.count == 1) {
      v.cols *= v.count;
      v.count = 1;
    }
  }
  start_row(0);
}

void Runs::start_row(int64_t r) {
  if (operand_.view.elements() == 0 || r == rows(operand_)) return;
  const Run run = row(operand_, r);
  at_ = run.data;
  left_in_row_ = run.n;
  next_row_ = r + 1;
}

}  // namespace mop::cpu
