// Products of experts: each has its rows of a matrix, and weights of its own.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/matmul.h"
#include "kernels/matrix.h"

namespace mop::kernels {

// The rows [first, last) of one expert, and which matrix is its own: number `own` of the rank's own experts',
// or `slot` of the borrowed ones' (the other is -1).
struct ExpertGroup {
  int32_t first, last;
  int32_t own, slot;
};

// One row-major matrix an expert, or (rows 1) one vector: `ld` elements between rows, `stride` between
// matrices. spilled may be missing if no expert is borrowed.
struct ExpertMatrices {
  void* own = nullptr;
  void* spilled = nullptr;
  int64_t ld = 0, stride = 0, spilled_stride = 0;
  explicit operator bool() const { return own != nullptr || spilled != nullptr; }
};

class GroupedMatmul {
 public:
  static constexpr int kMostGroups = 512;  // with rows in one call, and as many without
  // Measured on an H200: rows from which a weight gradient is faster by the library.
  static constexpr int64_t kLongGradient = 4096;
  static constexpr int64_t kTileRows = 128, kTileColumns = 256;  // of C, what a multiprocessor works on
  static constexpr double kFull = 0.9;  // of whole waves of tiles, what a product has at least that fills it

  // Experts share a grouped kernel, but for those of so many rows that a cuBLAS call for each is faster.
  // `by_expert`: such a call for all of them, the reference. They are taken anyway for what the grouped
  // kernels do not do: fp32 operands, and matrices or widths off a 16-byte boundary.
  explicit GroupedMatmul(bool by_expert = false);

  // What a call takes as its workspace, on a 256-byte boundary, not shared with work on other streams.
  size_t workspace_bytes() const;

  // C(R, n) = A(R, k) op(W_e) [+ bias_e], rows by expert; rows outside of all groups are not touched. op(W)
  // is (k, n); transpose: W is stored as (n, k). All operands are of one type, bf16 or fp32.
  void multiply(std::span<const ExpertGroup> groups, const ConstMatrix& a, const ExpertMatrices& w,
                bool transpose, const ExpertMatrices& bias, const Matrix& c, void* workspace,
                cudaStream_t stream);

  // The same for one expert with every number of rows, up to A's, that has a kernel or a plan of its own:
  // what a product is first run with is loaded then, which waits for all that the device has been given,
  // copies included. C is written; it stays zero where A is.
  void prepare_multiply(const ConstMatrix& a, const ExpertMatrices& w, bool transpose,
                        const ExpertMatrices& bias, const Matrix& c, void* workspace, cudaStream_t stream);

  // dW_e(m, n) = A_e^T B_e, of A(R, m) and B(R, n), added to what is there with accumulate. Experts without
  // rows: zero, or as it was. type: of dW, that of A and B or fp32.
  void weight_gradient(std::span<const ExpertGroup> groups, const ConstMatrix& a, const ConstMatrix& b,
                       const ExpertMatrices& dw, Type type, bool accumulate, void* workspace,
                       cudaStream_t stream);
  // dW, of one expert, is written.
  void prepare_weight_gradient(const ConstMatrix& a, const ConstMatrix& b, const ExpertMatrices& dw,
                               Type type, void* workspace, cudaStream_t stream);

 private:
  enum class By : uint8_t { rows, kernel, library };  // who computes an expert that either could
  void multiply(By by, std::span<const ExpertGroup> groups, const ConstMatrix& a, const ExpertMatrices& w,
                bool transpose, const ExpertMatrices& bias, const Matrix& c, void* workspace,
                cudaStream_t stream);

  bool by_expert_;
  Matmul library_;
  int processors_ = 0;  // of the device
};

}  // namespace mop::kernels
