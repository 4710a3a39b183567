#include "exec/weights/convert.h"

#include <Eigen/Core>
#include <bit>
#include <cstring>
#include <type_traits>

#include "sim/base/error.h"

namespace mop::weights {
namespace {

// The upper half of a float. Without a branch: the loops over it become vector instructions.
class Bf16 {
 public:
  Bf16() = default;
  explicit Bf16(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    // Half a step up, and cut off: a tie reaches the even neighbour.
    const uint32_t nearest = bits + 0x7fff + ((bits >> 16) & 1);
    // A NaN whose upper half is one too.
    const uint32_t quiet = bits | 0x400000;
    upper_ = static_cast<uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t{upper_} << 16); }

 private:
  uint16_t upper_ = 0;
};

// Calls f with a value of the element type.
template <typename F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::f16:
      return f(Eigen::half());
    case Type::bf16:
      return f(Bf16());
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
    const auto convert = [&](auto from_stride, auto to_stride) {
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(&element, from + i * from_stride * static_cast<int64_t>(sizeof element), sizeof element);
        out[i * to_stride] = static_cast<float>(element);
      }
    };
    // Strides that the compiler knows, where the loop can be fast.
    constexpr std::integral_constant<int64_t, 1> kOne;
    stride == 1 && out_stride == 1 ? convert(kOne, kOne) : convert(stride, out_stride);
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
