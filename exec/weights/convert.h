// Element types of checkpoints and their conversion from and to fp32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace mop::weights {

enum class Type : uint8_t { f16, bf16, f32, f64 };
int64_t size_of(Type type);   // bytes
const char* name(Type type);  // as safetensors spells it, "BF16"
std::optional<Type> type_of(const std::string& spelling);

// `count` elements, `stride` elements of the type from one to the next, to out[0], out[out_stride], ...
// `from` may be unaligned.
void to_float(Type type, const std::byte* from, int64_t stride, int64_t count, float* out,
              int64_t out_stride);

// The way back, contiguous: rounded to nearest, ties to even; NaN stays NaN.
void from_float(Type type, const float* from, int64_t count, std::byte* out);

}  // namespace mop::weights
