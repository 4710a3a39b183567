// Dense products by cuBLASLt.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "kernels/type.h"

namespace mop::kernels {

// C(m, n) = op(A) op(B) [+ bias] [+ C]; all matrices are row-major, `ld` elements between rows as they are
// stored; op is the transpose. `count` products, `stride` elements between their matrices. Sums run in fp32.
// Types: A and B bf16, C bf16 or fp32; or all of them fp32 (without TF32). The bias has one element a column
// of C.
struct MatmulShape {
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldc = 0;
  bool transpose_a = false, transpose_b = false;
  bool accumulate = false;  // adds to C
  bool bias = false;
  Type in = Type::bf16, out = Type::bf16, bias_type = Type::bf16;
  int64_t count = 1, stride_a = 0, stride_b = 0, stride_c = 0;
  int64_t stride_bias = 0;  // 0: the products share one

  auto operator<=>(const MatmulShape&) const = default;
};

// One object a device and host thread: it owns the library's handle and a plan for each shape that it has
// seen.
class Matmul {
 public:
  // What run() takes as a workspace.
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;

  // Throws if the cuBLASLt that is loaded is older than the one this was built against.
  Matmul();
  ~Matmul();
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  // Plans the shape, so that its first run() does nothing but launch. Throws if the library has no kernel for
  // it.
  void prepare(const MatmulShape& shape);

  // C = A B on the stream. Operands on a 16-byte boundary run by the plan that prepare() made; others are
  // planned at their first run. workspace: kWorkspaceBytes on a 256-byte boundary, not shared with work on
  // other streams.
  void run(const MatmulShape& shape, const void* a, const void* b, const void* bias, void* c, void* workspace,
           cudaStream_t stream);

  // The same without a bias, for rows that are not the same number twice, an expert's: m, or k where A is
  // transposed. They share the plans of few numbers, at most a quarter larger; choosing one anew takes the
  // host longer than most products.
  void run_rows(const MatmulShape& shape, const void* a, const void* b, void* c, void* workspace,
                cudaStream_t stream);
  // The number of rows whose plan run_rows takes: up, by less than a quarter.
  static int64_t planned_rows(int64_t rows);

 private:
  struct Layouts;
  struct Plan;
  struct Key {
    MatmulShape shape;
    int64_t alignment;  // bytes, of all operands
    auto operator<=>(const Key&) const = default;
  };
  const Plan& plan(const Key& key);

  void* handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace mop::kernels
