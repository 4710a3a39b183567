// Rotary position embedding, with the norm of q or k before it fused in, and the keys of latent attention.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/matrix.h"

namespace mop::kernels {

// Elements [first, first + rotated) of each head of `width` are rotated. Pair i, (x, y), becomes (x cos - y
// sin, y cos + x sin) by entries (position, i) of the tables (positions, rotated / 2); its elements are (2i,
// 2i + 1) if interleaved, else (i, i + rotated / 2).
struct Rotation {
  int64_t width = 0, first = 0, rotated = 0;
  bool interleaved = false;
  const float *cos = nullptr, *sin = nullptr;
};

inline constexpr int64_t kWidestRopeNorm = 8192;

// y = rotated x (t, heads x width); with w (1, d) every d columns are first normalised, as rms_norm.
// positions (tokens) of i32: row r has that of r mod tokens. x, w and y are of one type; y may be x. d and
// width: at most 8192.
struct RopeArgs {
  ConstMatrix x, w;
  Matrix y;
  const int32_t* positions = nullptr;
  int64_t tokens = 0;
  Rotation rotation;
  float eps = 0;
};
void rope(const RopeArgs& args, cudaStream_t stream);

// x: what entered rope, with w only; dw (1, d) (+)= the weight's gradient. dx may be dy.
struct RopeBwdArgs {
  ConstMatrix dy, x, w;
  Matrix dx, dw;
  const int32_t* positions = nullptr;
  int64_t tokens = 0;
  Rotation rotation;
  float eps = 0;
  bool accumulate = false;   // dw
  float* scratch = nullptr;  // rms_norm_bwd_scratch of (rows, cols, d), with w only
};
void rope_bwd(const RopeBwdArgs& args, cudaStream_t stream);

// kv(t, heads x (nope + value)), k_rope(t, rotary) -> k(t, heads x (nope + rotary)), v(t, heads x value), of
// one type.
struct MlaKeysArgs {
  ConstMatrix kv, k_rope;
  Matrix k, v;
  int64_t nope = 0, value = 0, rotary = 0;
};
void mla_keys(const MlaKeysArgs& args, cudaStream_t stream);

// dk, dv -> dkv, dk_rope(t, rotary) (+)= sum over the heads; rotary at most 256
struct MlaKeysBwdArgs {
  ConstMatrix dk, dv;
  Matrix dkv, dk_rope;
  int64_t nope = 0, value = 0, rotary = 0;
  bool accumulate = false;  // dk_rope
};
void mla_keys_bwd(const MlaKeysBwdArgs& args, cudaStream_t stream);

}  // namespace mop::kernels
