// Memory-bound kernels, each by itself at the widths of Qwen3-30B-A3B (of MLA: Kimi-K2) and three numbers of
// tokens. Bytes are counted as the native step programs count them (sim/program/native), so that a price is
// bytes over the table's rate.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "exec/calibrate/benchmarks.h"
#include "kernels/activation.h"
#include "kernels/adam.h"
#include "kernels/check.h"
#include "kernels/column_sum.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/router.h"
#include "kernels/routing.h"

namespace mop::calibrate {
namespace {

using namespace kernels;

constexpr int64_t kHidden = 2048, kHeads = 32, kWidth = 128, kExperts = 128, kChoices = 8, kInner = 768,
                  kVocabulary = 151936, kPositions = 4096, kClampedInner = 2880, kClampedChoices = 4;
constexpr float kEps = 1e-6F;
constexpr double kCacheBytes = 32e6;  // of less, most is still in the cache when a step comes to it

Runs runs_of(double bytes) {
  return bytes >= kCacheBytes ? Runs::cold : Runs::warm;
}

class Kernels {
 public:
  Kernels(Bench& bench, int64_t tokens) : bench_(bench), n_(tokens), random_(1) {}

  void all() {
    norms(), ropes(), activations(), routers(), routings(), embeddings(), losses(), elementwise(),
        optimizers();
  }

 private:
  // read, written: bytes an element, as the lowering counts them. norm: of rope, as its table has it.
  template <class F>
  void measure(const char* kernel, int64_t elements, double read, double written, F&& run,
               std::vector<double> norm = {}) {
    if (!bench_.more()) return;
    const double bytes = static_cast<double>(elements) * (read + written);
    std::vector<double> at = std::move(norm);
    const char* const what = at.empty() ? "" : "width of the norm, 1: none; ";
    at.push_back(bytes);
    bench_.point(fmt::format("native_{}", kernel),
                 fmt::format("kernels/, {}; ({}bytes read + written) -> bytes/s", kernel, what), at, bytes,
                 bench_.time(run, bench_.compute(), runs_of(bytes)));
  }
  float* scratch(int64_t bytes) {
    return reinterpret_cast<float*>(bench_.take(std::max<int64_t>(bytes, 256)));
  }
  Matrix rows(int64_t cols, Type type = Type::bf16) { return bench_.matrix(n_, cols, type); }
  std::vector<int32_t> numbers(int64_t count, int64_t below) {
    std::vector<int32_t> all(static_cast<size_t>(count));
    for (int32_t& one : all) one = static_cast<int32_t>(static_cast<int64_t>(random_()) % below);
    return all;
  }

  void norms() {
    const Matrix x = rows(kHidden), residual = rows(kHidden), y = rows(kHidden),
                 dy = rows(kHidden, Type::f32), w = bench_.matrix(1, kHidden),
                 dw = bench_.matrix(1, kHidden, Type::f32);
    float* const sums = scratch(rms_norm_bwd_scratch(n_, kHidden, kHidden));
    measure("rms_norm", n_ * kHidden, 4, 4, [=](cudaStream_t s) {
      rms_norm({x, w, residual, y, x, kEps}, s);
    });
    measure("rms_norm_bwd", n_ * kHidden, 8, 2, [=](cudaStream_t s) {
      rms_norm_bwd({dy, x, w, residual, y, dw, kEps, true, sums}, s);
    });
    bench_.release();
  }

  void ropes() {
    // Without a norm, with one of each head, and with one of all heads, as OLMoE has it.
    for (const int64_t norm : {int64_t{0}, kWidth, kHidden}) {
      const int64_t cols = norm == kHidden ? norm : kHeads * kWidth, count = n_ * kHeads * kWidth / cols;
      const Matrix x = bench_.matrix(count, cols), y = bench_.matrix(count, cols),
                   angles = bench_.matrix(kPositions, kWidth, Type::f32);
      Matrix w{}, dw{};
      if (norm > 0) w = bench_.matrix(1, norm), dw = bench_.matrix(1, norm, Type::f32);
      const int32_t* const at = bench_.upload(numbers(n_, kPositions));
      const auto* const cos = static_cast<const float*>(angles.data);
      const Rotation rotation{kWidth, 0, kWidth, false, cos, cos + kPositions * kWidth / 2};
      float* const sums = norm > 0 ? scratch(rms_norm_bwd_scratch(count, cols, norm)) : nullptr;
      const std::vector kind{static_cast<double>(std::max<int64_t>(norm, 1))};
      measure(
          "rope", count * cols, 2, 2,
          [=, n = n_](cudaStream_t s) {
            rope({x, w, y, at, n, rotation, kEps}, s);
          },
          kind);
      measure(
          "rope_bwd", count * cols, norm > 0 ? 4 : 2, 2,
          [=, n = n_](cudaStream_t s) {
            rope_bwd({y, norm > 0 ? x : Matrix{}, w, y, dw, at, n, rotation, kEps, false, sums}, s);
          },
          kind);
      bench_.release();
    }
    const int64_t heads = 64, nope = 128, value = 128, rotary = 64, tokens = n_ / 4;
    const Matrix kv = bench_.matrix(tokens, heads * (nope + value)), shared = bench_.matrix(tokens, rotary),
                 k = bench_.matrix(tokens, heads * (nope + rotary)), v = bench_.matrix(tokens, heads * value);
    const int64_t elements = tokens * heads * (nope + rotary + value);
    measure("mla_keys", elements, 2, 2, [=](cudaStream_t s) {
      mla_keys({kv, shared, k, v, nope, value, rotary}, s);
    });
    measure("mla_keys_bwd", elements, 2, 2, [=](cudaStream_t s) {
      mla_keys_bwd({k, v, kv, shared, nope, value, rotary, false}, s);
    });
    bench_.release();
  }

  // Of all copies, as in a round: of Qwen3, and clamped of gpt-oss, the one family that clamps.
  void activations() {
    for (const bool clamped : {false, true}) {
      const int64_t copies = n_ * (clamped ? kClampedChoices : kChoices),
                    inner = clamped ? kClampedInner : kInner;
      const auto of_copies = [&](int64_t cols) { return bench_.matrix(copies, cols); };
      const Matrix gate_up = of_copies(2 * inner), act = of_copies(inner), d_act = of_copies(inner),
                   d_gate_up = of_copies(2 * inner), weighted = of_copies(inner);
      auto *const weights = static_cast<float*>(bench_.matrix(1, copies, Type::f32).data),
                  *const d_weights = static_cast<float*>(bench_.matrix(1, copies, Type::f32).data);
      const Activation f = clamped ? Activation{true, 7, 1.702F} : Activation{};
      measure(clamped ? "clamped_swiglu" : "swiglu", copies * inner, 4, 2, [=](cudaStream_t s) {
        swiglu({gate_up, act, f}, s);
      });
      measure(clamped ? "clamped_swiglu_bwd" : "swiglu_bwd", copies * inner, 8, 6, [=](cudaStream_t s) {
        routed_swiglu_bwd(
            {gate_up, d_act, act, {}, weights, d_gate_up, weighted, d_weights, f, nullptr, nullptr, 0}, s);
      });
      bench_.release();
    }
  }

  void routers() {
    const int64_t copies = n_ * kChoices;
    const Matrix logits = rows(kExperts, Type::f32), weights = rows(kChoices, Type::f32),
                 d_logits = rows(kExperts);
    auto *const ids = reinterpret_cast<int32_t*>(bench_.take(4 * copies)),
                *const order = reinterpret_cast<int32_t*>(bench_.take(4 * copies)),
                *const counts = reinterpret_cast<int32_t*>(bench_.take(4 * kExperts));
    auto* const load = static_cast<float*>(bench_.matrix(1, 2 * kExperts, Type::f32).data);
    float* const sums = scratch(std::max(topk_scratch(n_, kExperts), sort_scratch(copies, kExperts)));
    Router router;
    router.experts = kExperts, router.choices = kChoices, router.normalise = true;
    const auto *const in = static_cast<const float*>(logits.data), *const d_weights =
                                                                       static_cast<const float*>(
                                                                           weights.data);
    measure("topk", n_ * kExperts, 4, 8.0 * kChoices / kExperts, [=, n = n_](cudaStream_t s) {
      topk({router, in, n, kExperts, nullptr, ids, static_cast<float*>(weights.data), load, false, sums}, s);
    });
    measure("topk_bwd", n_ * kExperts, 4, 2, [=, n = n_](cudaStream_t s) {
      topk_bwd({router, in, n, kExperts, ids, d_weights, nullptr, 0, d_logits}, s);
    });
    measure("sort", copies, 4, 4, [=](cudaStream_t s) {
      sort({ids, copies, static_cast<int>(kExperts), order, counts, reinterpret_cast<int32_t*>(sums)}, s);
    });
    bench_.release();
  }

  // A round of all copies, in the order of experts.
  void routings() {
    const int64_t copies = n_ * kChoices;
    std::vector<int32_t> order(static_cast<size_t>(copies));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (int64_t e = 0; e < kExperts; ++e)
      std::sort(order.begin() + e * copies / kExperts, order.begin() + (e + 1) * copies / kExperts);
    std::vector<Flow> flows;
    for (int64_t e = 0; e < kExperts; ++e)
      flows.push_back({static_cast<int32_t>(e * copies / kExperts), static_cast<int32_t>(copies / kExperts),
                       static_cast<int32_t>(e * copies / kExperts)});
    const int32_t* const placed = bench_.upload(order);
    const SentRows sent{flows.data(), kExperts, placed, kChoices};
    const Matrix x = rows(kHidden), sent_x = bench_.matrix(copies, kHidden), y = rows(kHidden, Type::f32),
                 weights = rows(kChoices, Type::f32);
    auto* const gates = static_cast<float*>(weights.data);
    const auto* const row_gates = static_cast<const float*>(bench_.matrix(1, copies, Type::f32).data);
    auto* const work = reinterpret_cast<int32_t*>(scratch(unpermute_scratch(n_, kChoices)));
    // Bytes of a token, and of its fp32 sum, for each element of the rows.
    const double of_token = 2.0 / kChoices, added = 4.0 / kChoices;
    measure("permute", copies * kHidden, of_token, 2, [=, &flows](cudaStream_t s) {
      permute({sent, x, {}, nullptr, sent_x, {}, nullptr}, s);
    });
    measure("unpermute", copies * kHidden, 2 + added, added, [=, &flows](cudaStream_t s) {
      unpermute({sent, sent_x, gates, y, work}, s);
    });
    measure("unpermute_bwd", copies * kHidden, 2 + added, added, [=, &flows](cudaStream_t s) {
      unpermute_bwd({sent, sent_x, row_gates, y, gates, work}, s);
    });
    const Matrix biases = bench_.matrix(kExperts, kHidden);
    std::vector<ExpertRows> experts;
    std::vector<void*> d_biases;
    for (int64_t e = 0; e < kExperts; ++e) {
      experts.push_back(
          {static_cast<int32_t>(e * copies / kExperts), static_cast<int32_t>(copies / kExperts)});
      d_biases.push_back(static_cast<std::byte*>(biases.data) + 2 * e * kHidden);
    }
    float* const sums = scratch(column_sum_scratch(copies, kHidden, static_cast<int>(kExperts)));
    measure("expert_bias_bwd", copies * kHidden, 2, 0, [=, &experts, &d_biases](cudaStream_t s) {
      expert_bias_bwd({sent_x, nullptr, experts.data(), d_biases.data(), static_cast<int>(kExperts),
                       Type::bf16, false, sums},
                      s);
    });
    bench_.release();
  }

  void embeddings() {
    const Matrix table = bench_.matrix(kVocabulary, kHidden), x = rows(kHidden);
    const int32_t* const ids = bench_.upload(numbers(n_, kVocabulary));
    float* const work = scratch(embedding_bwd_scratch(n_, kHidden));
    measure("embedding", n_ * kHidden, 2, 2, [=](cudaStream_t s) {
      embedding({ids, kVocabulary, table, x, nullptr}, s);
    });
    measure("embedding_bwd", n_ * kHidden, 2, 2 + 2.0 * kVocabulary / static_cast<double>(n_),
            [=](cudaStream_t s) {
              embedding_bwd({ids, x, table, false, work}, s);
            });
    bench_.release();
  }

  void losses() {
    const int64_t tile = n_ / 8;
    const Matrix logits = bench_.matrix(tile, kVocabulary);
    auto* const statistics = static_cast<float*>(bench_.matrix(tile, 3, Type::f32).data);
    const int32_t* const targets = bench_.upload(numbers(tile, kVocabulary));
    auto *const valid = reinterpret_cast<double*>(bench_.take(8)), *const loss = reinterpret_cast<double*>(
                                                                       bench_.take(8));
    const auto count = static_cast<double>(tile);
    check(cudaMemcpy(valid, &count, sizeof count, cudaMemcpyHostToDevice), "a number");
    measure("cross_entropy", tile * kVocabulary, 2, 12.0 / kVocabulary, [=](cudaStream_t s) {
      cross_entropy({logits, {0, kVocabulary}, {targets, tile, tile}, statistics, false, nullptr}, s);
    });
    measure("cross_entropy_bwd", tile * kVocabulary, 2, 2, [=](cudaStream_t s) {
      cross_entropy_bwd(
          {logits, {0, kVocabulary}, {targets, tile, tile}, statistics, 1, valid, loss, 0, tile, false}, s);
    });
    bench_.release();
  }

  void elementwise() {
    const Matrix a = rows(kHidden), c = rows(kHidden), wide = rows(kHidden, Type::f32),
                 sums = bench_.matrix(1, kHidden, Type::bf16);
    const int64_t all = n_ * kHidden;
    auto* const sum = reinterpret_cast<double*>(bench_.take(8));
    float* const work = scratch(std::max(kSquareSumScratch, column_sum_scratch(n_, kHidden, 1)));
    const Matrix half{c.data, Type::bf16, n_, kHidden / 2, kHidden / 2};
    measure("add", all, 6, 2, [=](cudaStream_t s) { add({a, wide, c, false}, s); });
    measure("cast", all, 4, 2, [=](cudaStream_t s) { copy({wide, c}, s); });
    measure("widen", all, 2, 4, [=](cudaStream_t s) { copy({a, wide}, s); });
    measure("clear", all, 0, 4, [=](cudaStream_t s) { clear({wide}, s); });
    measure("column_sum", all, 2, 2.0 / static_cast<double>(n_), [=](cudaStream_t s) {
      column_sum({a, sums, false, work}, s);
    });
    measure("sum_replicas", all, 2, 1, [=](cudaStream_t s) { sum_replicas({a, half, 2, kWidth}, s); });
    const Matrix shard = bench_.matrix(n_ * kChoices, kHidden);  // of the gradients of a layer's experts
    measure("square_sum", shard.rows * kHidden, 2, 0, [=](cudaStream_t s) {
      square_sum({shard, 1, sum, false, reinterpret_cast<double*>(work)}, s);
    });
    bench_.release();
  }

  void optimizers() {
    const int64_t n = n_ * kHidden;
    const Matrix states = bench_.matrix(3, n, Type::f32), gradient = bench_.matrix(1, n),
                 weights = bench_.matrix(1, n);
    AdamArgs args{static_cast<float*>(states.data),
                  n,
                  0,
                  n,
                  Master::states,
                  gradient.data,
                  weights.data,
                  Type::bf16,
                  Type::bf16,
                  nullptr};
    measure("adam", n, 14, 14, [=](cudaStream_t s) { adam(args, s); });
    args.master = Master::low;
    measure("adam_low", n, 14, 12, [=](cudaStream_t s) { adam(args, s); });
    bench_.release();
  }

  Bench& bench_;
  const int64_t n_;
  std::mt19937 random_;
};

}  // namespace

void kernels_of_memory(Bench& bench) {
  for (int64_t bytes = int64_t{1} << 33; bytes >= 1 << 17 && bench.more(); bytes /= 4) {
    if (!bench.fits(bytes)) continue;
    const std::byte* const from = bench.take(bytes / 2);
    std::byte* const to = bench.take(bytes / 2);
    const auto moved = static_cast<double>(bytes);
    bench.point("native_memory_bound", "device copy; (bytes read + written) -> bytes/s", {moved}, moved,
                bench.time(
                    [=](cudaStream_t stream) {
                      check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes / 2),
                                            cudaMemcpyDeviceToDevice, stream),
                            "a copy");
                    },
                    bench.compute(), runs_of(moved)));
    bench.release();
  }
  for (const int64_t tokens : {32768, 4096, 512})
    if (bench.fits(tokens * kVocabulary)) Kernels(bench, tokens).all();
}

}  // namespace mop::calibrate
