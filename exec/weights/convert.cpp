#include "exec/weights/convert.h"

#include <Eigen/Core>
#include <cstring>

#include "sim/base/error.h"

namespace mop::weights {
namespace {

// Calls f with a value of the element type.
template <typename F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::f16:
      return f(Eigen::half());
    case Type::bf16:
      return f(Eigen::bfloat16());
    case Type::f32:
      return f(float());
    case Type::f64:
      return f(double());
  }
  ensure(false, "an element type is one of four");
}

}  // namespace

int64_t size_of(Type type) {
  int64_t bytes = 0;
  with_type(type, [&](auto element) { bytes = sizeof element; });
  return bytes;
}

const char* name(Type type) {
  switch (type) {
    case Type::f16:
      return "F16";
    case Type::bf16:
      return "BF16";
    case Type::f32:
      return "F32";
    case Type::f64:
      return "F64";
  }
  ensure(false, "an element type is one of four");
  return nullptr;
}

std::optional<Type> type_of(const std::string& spelling) {
  for (const Type type : {Type::f16, Type::bf16, Type::f32, Type::f64})
    if (spelling == name(type)) return type;
  return {};
}

void to_float(Type type, const std::byte* from, int64_t stride, int64_t count, float* out,
              int64_t out_stride) {
  with_type(type, [&](auto element) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&element, from + i * stride * static_cast<int64_t>(sizeof element), sizeof element);
      out[i * out_stride] = static_cast<float>(element);
    }
  });
}

void from_float(Type type, const float* from, int64_t count, std::byte* out) {
  with_type(type, [&](auto element) {
    for (int64_t i = 0; i < count; ++i) {
      element = static_cast<decltype(element)>(from[i]);
      std::memcpy(out + i * static_cast<int64_t>(sizeof element), &element, sizeof element);
    }
  });
}

}  // namespace mop::weights
