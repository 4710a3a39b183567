#include "kernels/matmul.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "kernels/check.h"
#include "kernels/elementwise.h"

namespace mop::kernels {
namespace {

constexpr int64_t kAlignment = 16;  // bytes: what the fastest kernels ask for

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw CudaError(std::string("cuBLASLt: ") + what + ": " + cublasLtGetStatusString(status));
}

cudaDataType_t cuda_type(Type type) {
  if (type == Type::bf16) return CUDA_R_16BF;
  if (type == Type::f32) return CUDA_R_32F;
  throw CudaError("matmul: operands are bf16 or fp32");
}

std::string text(const MatmulShape& s) {
  return "(m, n, k) = (" + std::to_string(s.m) + ", " + std::to_string(s.n) + ", " + std::to_string(s.k) +
         ")" + (s.transpose_a ? ", A transposed" : "") + (s.transpose_b ? ", B transposed" : "") +
         (s.accumulate ? ", accumulating" : "") +
         (s.count > 1 ? ", " + std::to_string(s.count) + " products" : "");
}

int64_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return std::min<int64_t>(kAlignment,
                           static_cast<int64_t>(address & -address) | (address == 0 ? kAlignment : 0));
}

template <class Pointer>
Pointer element(Pointer data, Type type, int64_t i) {
  using Bytes =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const std::byte*, std::byte*>;
  return static_cast<Bytes>(data) + i * static_cast<int64_t>(size_of(type));
}

// The epilogue adds a bias of the output's type; any other is written into C first, which the product then
// adds to.
bool bias_in_epilogue(const MatmulShape& s) {
  return s.bias && s.bias_type == s.out;
}
bool bias_first(const MatmulShape& s) {
  return s.bias && !bias_in_epilogue(s);
}

class Layout {
 public:
  // `rows` rows of `cols` elements, `ld` apart: to the library, which counts by columns, the transpose.
  Layout(Type type, int64_t rows, int64_t cols, int64_t ld, int64_t count, int64_t stride) {
    check_blas(cublasLtMatrixLayoutCreate(&layout_, cuda_type(type), static_cast<uint64_t>(cols),
                                          static_cast<uint64_t>(rows), ld),
               "matrix layout");
    const int32_t batch = static_cast<int32_t>(count);
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, batch);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride);
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(layout_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  cublasLtMatrixLayout_t get() const { return layout_; }

 private:
  template <class T>
  void set(cublasLtMatrixLayoutAttribute_t attribute, const T& value) {
    check_blas(cublasLtMatrixLayoutSetAttribute(layout_, attribute, &value, sizeof value), "matrix layout");
  }
  cublasLtMatrixLayout_t layout_ = nullptr;
};

class Preference {
 public:
  explicit Preference(int64_t alignment) {
    check_blas(cublasLtMatmulPreferenceCreate(&preference_), "preference");
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{Matmul::kWorkspaceBytes});
    for (const auto operand :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      set(operand, static_cast<uint32_t>(alignment));
  }
  ~Preference() { cublasLtMatmulPreferenceDestroy(preference_); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
  cublasLtMatmulPreference_t get() const { return preference_; }

 private:
  template <class T>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    check_blas(cublasLtMatmulPreferenceSetAttribute(preference_, attribute, &value, sizeof value),
               "preference");
  }
  cublasLtMatmulPreference_t preference_ = nullptr;
};

}  // namespace

// The library's matrices have their elements by columns: C^T(n, m) = op(B)^T op(A)^T, so B comes first.
struct Matmul::Layouts {
  explicit Layouts(const MatmulShape& s)
      : first(s.in, s.transpose_b ? s.n : s.k, s.transpose_b ? s.k : s.n, s.ldb, s.count, s.stride_b),
        second(s.in, s.transpose_a ? s.k : s.m, s.transpose_a ? s.m : s.k, s.lda, s.count, s.stride_a),
        result(s.out, s.m, s.n, s.ldc, s.count, s.stride_c) {}

  Layout first, second, result;
};

struct Matmul::Plan {
  explicit Plan(const MatmulShape& s) : layouts(s) {
    check_blas(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product");
    set(CUBLASLT_MATMUL_DESC_TRANSA, s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (bias_in_epilogue(s)) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, cuda_type(s.bias_type));
      set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, s.stride_bias);
    }
  }
  ~Plan() { cublasLtMatmulDescDestroy(product); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) const {
    check_blas(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof value), "product");
  }

  cublasStatus_t run(void* handle, const Layouts& of, const void* a, const void* b, void* c, bool add,
                     void* workspace, cudaStream_t stream) const {
    const float one = 1, beta = add ? 1 : 0;
    return cublasLtMatmul(static_cast<cublasLtHandle_t>(handle), product, &one, b, of.first.get(), a,
                          of.second.get(), &beta, c, of.result.get(), c, of.result.get(), &algorithm,
                          workspace, kWorkspaceBytes, stream);
  }

  // Whether its algorithm does for other layouts.
  bool serves(void* handle, const Layouts& of) const {
    cublasLtMatmulHeuristicResult_t found{};
    return cublasLtMatmulAlgoCheck(static_cast<cublasLtHandle_t>(handle), product, of.first.get(),
                                   of.second.get(), of.result.get(), of.result.get(), &algorithm,
                                   &found) == CUBLAS_STATUS_SUCCESS &&
           found.workspaceSize <= kWorkspaceBytes;
  }

  cublasLtMatmulDesc_t product = nullptr;
  Layouts layouts;
  cublasLtMatmulAlgo_t algorithm{};
};

Matmul::Matmul() {
  const size_t loaded = cublasLtGetVersion();
  if (loaded < CUBLAS_VERSION)
    throw CudaError("cuBLASLt " + std::to_string(loaded) + " is loaded, but this was built against " +
                    std::to_string(CUBLAS_VERSION) + "; put the newer one first in LD_LIBRARY_PATH");
  cublasLtHandle_t handle = nullptr;
  check_blas(cublasLtCreate(&handle), "handle");
  handle_ = handle;
}

Matmul::~Matmul() {
  plans_.clear();
  cublasLtDestroy(static_cast<cublasLtHandle_t>(handle_));
}

const Matmul::Plan& Matmul::plan(const Key& key) {
  const auto found = plans_.find(key);
  if (found != plans_.end()) return *found->second;
  auto made = std::make_unique<Plan>(key.shape);
  const Preference preference(key.alignment);
  cublasLtMatmulHeuristicResult_t best{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      static_cast<cublasLtHandle_t>(handle_), made->product, made->layouts.first.get(),
      made->layouts.second.get(), made->layouts.result.get(), made->layouts.result.get(), preference.get(), 1,
      &best, &count);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0 || best.state != CUBLAS_STATUS_SUCCESS)
    throw CudaError("cuBLASLt has no kernel for " + text(key.shape) + ": " + cublasLtGetStatusString(status));
  made->algorithm = best.algo;
  return *plans_.emplace(key, std::move(made)).first->second;
}

void Matmul::prepare(const MatmulShape& shape) {
  plan({shape, kAlignment});
}

void Matmul::run(const MatmulShape& shape, const void* a, const void* b, const void* bias, void* c,
                 void* workspace, cudaStream_t stream) {
  if (shape.m == 0 || shape.n == 0) return;
  const int64_t alignment = std::min(
      {alignment_of(a), alignment_of(b), alignment_of(c), bias_in_epilogue(shape) ? alignment_of(bias) : 16});
  const Plan& p = plan({shape, alignment});
  if (bias_first(shape)) {
    if (shape.accumulate)
      throw CudaError("matmul: a bias of another type than the output's cannot be accumulated");
    for (int64_t i = 0; i < shape.count; ++i)
      copy({{element(bias, shape.bias_type, i * shape.stride_bias), shape.bias_type, shape.m, shape.n, 0},
            {element(c, shape.out, i * shape.stride_c), shape.out, shape.m, shape.n, shape.ldc}},
           stream);
  }
  if (bias_in_epilogue(shape)) p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  check_blas(p.run(handle_, p.layouts, a, b, c, shape.accumulate || bias_first(shape), workspace, stream),
             "product");
}

int64_t Matmul::planned_rows(int64_t rows) {
  int64_t step = 16;
  while (step * 8 <= rows) step *= 2;
  return (rows + step - 1) / step * step;
}

void Matmul::run_rows(const MatmulShape& shape, const void* a, const void* b, void* c, void* workspace,
                      cudaStream_t stream) {
  if (shape.bias) throw CudaError("matmul: rows that vary have no bias");
  if (shape.m == 0 || shape.n == 0) return;
  MatmulShape near = shape;
  int64_t& rows = shape.transpose_a ? near.k : near.m;
  rows = planned_rows(rows);
  const Plan& p = plan({near, std::min({alignment_of(a), alignment_of(b), alignment_of(c)})});
  const Layouts layouts(shape);
  if (p.serves(handle_, layouts))
    check_blas(p.run(handle_, layouts, a, b, c, shape.accumulate, workspace, stream), "product");
  else
    run(shape, a, b, nullptr, c, workspace, stream);
}

}  // namespace mop::kernels
