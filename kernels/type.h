// Element types of operands.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mop::kernels {

enum class Type : uint8_t { bf16, f32, f64, i32 };

constexpr size_t size_of(Type type) {  // bytes
  return type == Type::bf16 ? 2 : type == Type::f64 ? 8 : 4;
}

}  // namespace mop::kernels
