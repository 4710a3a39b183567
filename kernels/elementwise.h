// Elementwise operations and reductions to one number, over (rows, cols) with strides. What takes several
// matrices takes them in any mix of bf16 and fp32.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "kernels/matrix.h"

namespace mop::kernels {

// c (+)= a + [b]; c may be a or b
struct AddArgs {
  ConstMatrix a, b;
  Matrix c;
  bool accumulate = false;
};
void add(const AddArgs& args, cudaStream_t stream);

// to = from, converted
struct CopyArgs {
  ConstMatrix from;
  Matrix to;
};
void copy(const CopyArgs& args, cudaStream_t stream);

// x = 0, of any type
struct ClearArgs {
  Matrix x;
};
void clear(const ClearArgs& args, cudaStream_t stream);

// y = x times *factor, of one type; y may be x
struct ScaleArgs {
  ConstMatrix x;
  Matrix y;
  const float* factor = nullptr;
};
void scale(const ScaleArgs& args, cudaStream_t stream);

// x(t, heads x replicas x width) -> y(t, heads x width), of one type
struct SumReplicasArgs {
  ConstMatrix x;
  Matrix y;
  int64_t replicas = 1, width = 0;
};
void sum_replicas(const SumReplicasArgs& args, cudaStream_t stream);

// y(1, n) (+)= the pieces' sum, in fp32 and in their order; each piece is n elements of `type`
inline constexpr int kMostPieces = 8;
struct SumPiecesArgs {
  std::array<const void*, kMostPieces> pieces{};
  int count = 1;
  Type type = Type::bf16;
  Matrix y;
  bool accumulate = false;
};
void sum_pieces(const SumPiecesArgs& args, cudaStream_t stream);

// *sum (+)= sum of x^2 / replicas, in fp64 and a fixed order; scratch: kSquareSumScratch bytes
struct SquareSumArgs {
  ConstMatrix x;
  double replicas = 1;
  double* sum = nullptr;
  bool accumulate = false;
  double* scratch = nullptr;
};
inline constexpr int64_t kSquareSumScratch = 528 * sizeof(double);
void square_sum(const SquareSumArgs& args, cudaStream_t stream);

// *factor = min(1, max_norm / (sqrt(*sum) + 1e-6)). A norm that is not finite: NaN, which tells adam to leave
// everything as it is, and *not_finite = 1.
struct ClipFactorArgs {
  const double* sum = nullptr;
  double max_norm = 1;
  float* factor = nullptr;
  int32_t* not_finite = nullptr;  // may be missing
};
void clip_factor(const ClipFactorArgs& args, cudaStream_t stream);

}  // namespace mop::kernels
