// Products by cuBLASLt, and of experts by our grouped kernels.
#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "exec/calibrate/benchmarks.h"

namespace mop::calibrate {
namespace {

using kernels::Type;

constexpr double kMostFlops = 2e13;  // of a point: 30 ms
constexpr int64_t kVocabulary = 200704, kRouter = 32;

double flops(int64_t m, int64_t n, int64_t k) {
  return 2 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

}  // namespace

// C = A B^T in bf16, as linear layers are; gradient: C += A^T B.
Work dense_product(Bench& bench, int64_t m, int64_t n, int64_t k, bool gradient) {
  kernels::MatmulShape s;
  s.m = m, s.n = n, s.k = k, s.ldc = n;
  s.transpose_a = gradient, s.transpose_b = !gradient, s.accumulate = gradient;
  s.lda = gradient ? m : k, s.ldb = gradient ? n : k;
  const std::byte *const a = bench.take(2 * m * k), *const b = bench.take(2 * n * k);
  std::byte *const c = bench.take(2 * m * n), *const workspace = bench.take(
                                                  static_cast<int64_t>(kernels::Matmul::kWorkspaceBytes));
  return [&product = bench.libraries().matmul, s, a, b, c, workspace](cudaStream_t stream) {
    product.run(s, a, b, nullptr, c, workspace, stream);
  };
}

namespace {

// C += A B in fp32, as a router's gradient is added to that of its input.
Work router_gradient(Bench& bench, int64_t m, int64_t n, int64_t k) {
  kernels::MatmulShape s;
  s.m = m, s.n = n, s.k = k, s.lda = k, s.ldb = n, s.ldc = n;
  s.out = Type::f32, s.accumulate = true;
  const std::byte *const a = bench.take(2 * m * k), *const b = bench.take(2 * n * k);
  std::byte *const c = bench.take(4 * m * n), *const workspace = bench.take(
                                                  static_cast<int64_t>(kernels::Matmul::kWorkspaceBytes));
  return [&product = bench.libraries().matmul, s, a, b, c, workspace](cudaStream_t stream) {
    product.run(s, a, b, nullptr, c, workspace, stream);
  };
}

}  // namespace

// Equal rows; C (rows, n) = A (rows, k) W^T, dW (n, k) = C^T A or dW += C^T A.
Work experts_product(Bench& bench, int experts, int64_t k, int64_t n, int64_t rows, OfExperts what) {
  std::vector<kernels::ExpertGroup> groups;
  for (int e = 0; e < experts; ++e)
    groups.push_back(
        {static_cast<int32_t>(e * rows / experts), static_cast<int32_t>((e + 1) * rows / experts), e, -1});
  const kernels::Matrix a = bench.matrix(rows, k), c = bench.matrix(rows, n);
  std::byte *const w = bench.take(2 * experts * k * n), *const workspace = bench.take(static_cast<int64_t>(
                                                            bench.libraries().grouped.workspace_bytes()));
  return [&product = bench.libraries().grouped, groups, a, c, w, workspace, k, n, what](cudaStream_t stream) {
    if (what != OfExperts::forward)
      product.weight_gradient(groups, c, a, {w, nullptr, k, k * n, 0}, Type::bf16,
                              what == OfExperts::added_gradient, workspace, stream);
    else
      product.multiply(groups, a, {w, nullptr, k, k * n, 0}, true, {}, c, workspace, stream);
  };
}

void matmul(Bench& bench) {
  for (const int64_t m : {32768, 8192})
    for (const int64_t n : {2048, 7168})
      for (const int64_t k : {32, 128, 512}) {
        if (!bench.more()) return;
        bench.point("native_router_gradient", "product by cuBLASLt, C += A B in fp32; (m, n, k) -> FLOP/s",
                    {static_cast<double>(m), static_cast<double>(n), static_cast<double>(k)}, flops(m, n, k),
                    bench.time(router_gradient(bench, m, n, k), bench.compute(), Runs::cold));
        bench.release();
      }
  for (const bool gradient : {false, true}) {
    // Rows are tokens, of a gradient's sum instead; the rest are widths of routers, of layers and of
    // vocabularies.
    const std::vector<int64_t> tokens{8192, 32768, 2048, 131072, 512, 128},
        widths{2048, 8192, 512, 32768, kVocabulary, 128, kRouter};
    // From the usual sizes out: were there no time for all, the grid's edge would be missing.
    for (const int64_t t : tokens)
      for (const int64_t first : widths)
        for (const int64_t second : widths) {
          const int64_t m = gradient ? first : t, n = gradient ? second : first, k = gradient ? t : second;
          if (gradient && t < 2048) continue;
          if (std::max(first, second) == kVocabulary && (std::min(first, second) < 2048 || t < 2048))
            continue;
          if (first == kRouter && second == kRouter) continue;
          if (flops(m, n, k) > kMostFlops || !bench.fits(2 * (m * k + n * k + m * n))) continue;
          if (!bench.more()) return;
          const Seconds seconds =
              bench.time(dense_product(bench, m, n, k, gradient), bench.compute(), Runs::clocked);
          bench.point(gradient ? "native_matmul_gradient" : "native_matmul",
                      gradient ? "bf16 weight gradient by cuBLASLt, C += A^T B; (m, n, k) -> FLOP/s"
                               : "bf16 product by cuBLASLt, C = A B^T; (m, n, k) -> FLOP/s",
                      {static_cast<double>(m), static_cast<double>(n), static_cast<double>(k)},
                      flops(m, n, k), seconds);
          bench.release();
        }
  }
}

void grouped(Bench& bench) {
  struct Weights {
    int64_t k, n;
  };
  struct Product {
    OfExperts what;
    const char *table, *said;
  };
  constexpr std::array kProducts{
      Product{OfExperts::forward, "native_grouped_matmul", ""},
      Product{OfExperts::gradient, "native_grouped_matmul_gradient", ", weight gradients"},
      Product{OfExperts::added_gradient, "native_grouped_matmul_added",
              ", weight gradients added to what is there"}};
  // Qwen3-30B-A3B, gpt-oss, DeepSeek-V3 and Kimi-K2, Mixtral: gate and up, down.
  for (const Weights w : {Weights{2048, 1536},
                          {768, 2048},
                          {2880, 5760},
                          {2880, 2880},
                          {7168, 4096},
                          {2048, 7168},
                          {4096, 28672}})
    for (const int experts : {32, 128, 8})
      for (const int64_t each : {256, 1024, 4096, 16384, 64})
        for (const Product& product : kProducts) {
          const int64_t rows = experts * each;
          if (flops(rows, w.n, w.k) > kMostFlops || rows > 524288 ||
              !bench.fits(2 * (rows * (w.k + w.n) + experts * w.k * w.n)))
            continue;
          if (!bench.more()) return;
          const Seconds seconds = bench.time(experts_product(bench, experts, w.k, w.n, rows, product.what),
                                             bench.compute(), Runs::clocked);
          bench.point(
              product.table,
              fmt::format(
                  "CUTLASS grouped kernels, bf16, equal rows{}; (k, n, experts, rows an expert) -> FLOP/s",
                  product.said),
              {static_cast<double>(w.k), static_cast<double>(w.n), static_cast<double>(experts),
               static_cast<double>(each)},
              flops(rows, w.n, w.k), seconds);
          bench.release();
        }
}

}  // namespace mop::calibrate
