// Time and bandwidth of the memory-bound kernels at the shapes of Qwen3-30B-A3B (H 2048, 32 query heads of
// 128, 128 experts of 768, top 8, vocabulary 151936) with 32768 tokens. Bytes: each input read once, each
// output written once. The yardstick is a copy on the device in the same run.
#include <cstdio>

#include "kernels/activation.h"
#include "kernels/adam.h"
#include "kernels/column_sum.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/router.h"
#include "kernels/routing.h"
#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

constexpr int64_t kTokens = 32768, kHidden = 2048, kHeads = 32, kWidth = 128, kExperts = 128, kChoices = 8,
                  kRoundRows = 32768, kInner = 768, kVocabulary = 151936, kTile = 4096;
constexpr int64_t kCopies = kTokens * kChoices;

// Random elements, one block of them repeated.
class Numbers {
 public:
  Numbers(int64_t rows, int64_t cols, Type type) : rows_(rows), cols_(cols), type_(type), bytes_(size()) {
    std::mt19937 random(5);
    const int64_t block = std::min<int64_t>(rows * cols, 1 << 20);
    const DeviceArray some(random_values(block, type, random), type);
    const size_t step = static_cast<size_t>(block) * size_of(type);
    for (size_t at = 0; at < bytes_.size(); at += step)
      check(cudaMemcpy(static_cast<std::byte*>(bytes_.get()) + at, some.get(),
                       std::min(step, bytes_.size() - at), cudaMemcpyDeviceToDevice),
            "numbers");
  }
  operator Matrix() const { return {bytes_.get(), type_, rows_, cols_, cols_}; }
  operator ConstMatrix() const { return Matrix(*this); }
  template <class T = float>
  T* get() const {
    return static_cast<T*>(bytes_.get());
  }
  size_t size() const { return static_cast<size_t>(rows_ * cols_) * size_of(type_); }

 private:
  int64_t rows_, cols_;
  Type type_;
  DeviceBytes bytes_;
};

double g_copy = 0;  // bytes a second

// Median over repetitions; before each the cache is filled with something else, which nothing has to write
// back.
template <class F>
void measure(const char* what, double bytes, F&& run) {
  static const Numbers other(1 << 13, 1 << 13, Type::f32);
  static const Scratch sums(kSquareSumScratch + 8);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    square_sum({other, 1, sums.get<double>(), false, sums.get<double>() + 1}, nullptr);
    check(cudaEventRecord(begin), "event");
    run();
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), what);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i >= 2) times.push_back(milliseconds);
  }
  std::sort(times.begin(), times.end());
  const double seconds = times[times.size() / 2] * 1e-3, rate = bytes / seconds;
  if (g_copy == 0) g_copy = rate;
  std::printf("%-44s %9.1f us %8.1f MB %7.0f GB/s %5.0f %%\n", what, seconds * 1e6, bytes * 1e-6, rate * 1e-9,
              100 * rate / g_copy);
  std::fflush(stdout);
}

void norms() {
  const Numbers x(kTokens, kHidden, Type::bf16), residual(kTokens, kHidden, Type::bf16),
      y(kTokens, kHidden, Type::bf16), dy32(kTokens, kHidden, Type::f32), w(1, kHidden, Type::bf16),
      dw(1, kHidden, Type::f32);
  const Scratch scratch(rms_norm_bwd_scratch(kTokens, kHidden, kHidden));
  const double all = 2.0 * kTokens * kHidden;
  measure("rms_norm", 2 * all, [&] { rms_norm({x, w, {}, y, {}, 1e-6F}, nullptr); });
  measure("rms_norm + residual", 4 * all, [&] { rms_norm({x, w, residual, y, x, 1e-6F}, nullptr); });
  measure("rms_norm_bwd", 3 * all, [&] {
    rms_norm_bwd({residual, x, w, {}, y, dw, 1e-6F, false, scratch.get<float>()}, nullptr);
  });
  measure("rms_norm_bwd, dy fp32, + d_sum", 5 * all, [&] {
    rms_norm_bwd({dy32, x, w, residual, y, dw, 1e-6F, true, scratch.get<float>()}, nullptr);
  });
}

void ropes() {
  const int64_t cols = kHeads * kWidth;
  const Numbers x(kTokens, cols, Type::bf16), y(kTokens, cols, Type::bf16), w(1, cols, Type::bf16),
      dw(1, cols, Type::f32), cos(4096, kWidth / 2, Type::f32), sin(4096, kWidth / 2, Type::f32);
  std::vector<int32_t> at(kTokens);
  for (size_t i = 0; i < at.size(); ++i) at[i] = static_cast<int32_t>(i % 4096);
  const DeviceVector<int32_t> positions(at);
  const Rotation rotation{kWidth, 0, kWidth, false, cos.get(), sin.get()};
  const double all = 2.0 * kTokens * cols;
  measure("rope, in place", 2 * all, [&] {
    rope({y, {}, y, positions.get(), kTokens, rotation, 0}, nullptr);
  });
  // Of each head, as Qwen3 has it, and of 16 of them, OLMoE's all.
  for (const int64_t norm : {kWidth, 16 * kWidth}) {
    const Scratch scratch(rms_norm_bwd_scratch(kTokens, cols, norm));
    const Matrix weight{Matrix(w).data, Type::bf16, 1, norm, norm},
        d_weight{Matrix(dw).data, Type::f32, 1, norm, norm};
    const char* const after = norm == kWidth ? "rope + q norm" : "rope + norm of 16 heads";
    const char* const back = norm == kWidth ? "rope_bwd + q norm" : "rope_bwd + norm of 16 heads";
    measure(after, 2 * all, [&] {
      rope({x, weight, y, positions.get(), kTokens, rotation, 1e-6F}, nullptr);
    });
    measure(back, 3 * all, [&] {
      rope_bwd(
          {y, x, weight, y, d_weight, positions.get(), kTokens, rotation, 1e-6F, false, scratch.get<float>()},
          nullptr);
    });
  }
  const int64_t rows = 4096, heads = 128;
  const Numbers kv(rows, heads * 256, Type::bf16), k_rope(rows, 64, Type::bf16),
      k(rows, heads * 192, Type::bf16), v(rows, heads * 128, Type::bf16);
  const double keys = 2.0 * static_cast<double>(rows * heads) * (256 + 192 + 128);
  measure("mla_keys, 4096 tokens, 128 heads", keys, [&] {
    mla_keys({kv, k_rope, k, v, 128, 128, 64}, nullptr);
  });
  measure("mla_keys_bwd", keys, [&] { mla_keys_bwd({k, v, kv, k_rope, 128, 128, 64, false}, nullptr); });
}

void activations() {
  const Numbers gate_up(kRoundRows, 2 * kInner, Type::bf16), act(kRoundRows, kInner, Type::bf16),
      d_act(kRoundRows, kInner, Type::bf16), weights(1, kRoundRows, Type::f32),
      d_weights(1, kRoundRows, Type::f32);
  const double all = 2.0 * kRoundRows * kInner;
  measure("swiglu", 3 * all, [&] { swiglu({gate_up, act, {}}, nullptr); });
  measure("clamped swiglu", 3 * all, [&] { swiglu({gate_up, act, {true, 7, 1.702F}}, nullptr); });
  measure("swiglu_bwd", 5 * all, [&] { swiglu_bwd({gate_up, d_act, gate_up, {}}, nullptr); });
  measure("routed_swiglu_bwd", 7 * all, [&] {
    routed_swiglu_bwd(
        {gate_up, d_act, act, {}, weights.get(), gate_up, act, d_weights.get(), {}, nullptr, nullptr, 0},
        nullptr);
  });
}

void routers() {
  const Numbers logits(kTokens, kExperts, Type::f32), weights(kTokens, kChoices, Type::f32),
      load(1, 2 * kExperts, Type::f32), d_logits(kTokens, kExperts, Type::bf16);
  const DeviceVector<int32_t> ids(std::vector<int32_t>(kCopies, 0)), order(std::vector<int32_t>(kCopies, 0)),
      counts(std::vector<int32_t>(kExperts, 0));
  Router router;
  router.experts = kExperts, router.choices = kChoices, router.normalise = true;
  const Scratch scratch(std::max(topk_scratch(kTokens, kExperts), sort_scratch(kCopies, kExperts)));
  const double all = 4.0 * kTokens * kExperts, chosen = 8.0 * kCopies;
  measure("topk", all + chosen, [&] {
    topk(
        {router, logits.get(), kTokens, kExperts, nullptr, ids.get(), weights.get(), nullptr, false, nullptr},
        nullptr);
  });
  measure("topk with load", all + chosen, [&] {
    topk({router, logits.get(), kTokens, kExperts, nullptr, ids.get(), weights.get(), load.get(), false,
          scratch.get<float>()},
         nullptr);
  });
  measure("topk_bwd", 1.5 * all + chosen, [&] {
    topk_bwd({router, logits.get(), kTokens, kExperts, ids.get(), weights.get(), nullptr, 0, d_logits},
             nullptr);
  });
  measure("sort", 8.0 * kCopies, [&] {
    sort({ids.get(), kCopies, kExperts, order.get(), counts.get(), scratch.get<int32_t>()}, nullptr);
  });
}

void routings() {
  // A round of 32768 rows: an eighth of each expert's copies.
  std::vector<int32_t> order(kCopies);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(1);
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t e = 0; e < kExperts; ++e)
    std::sort(order.begin() + e * kCopies / kExperts, order.begin() + (e + 1) * kCopies / kExperts);
  std::vector<Flow> flows;
  for (int64_t e = 0; e < kExperts; ++e)
    flows.push_back({static_cast<int32_t>(e * kCopies / kExperts),
                     static_cast<int32_t>(kRoundRows / kExperts),
                     static_cast<int32_t>(e * kRoundRows / kExperts)});
  const DeviceVector<int32_t> d_order(order);
  const SentRows sent{flows.data(), kExperts, d_order.get(), kChoices};
  std::vector<bool> touched(kTokens);
  for (const Flow& f : flows)
    for (int32_t i = 0; i < f.rows; ++i)
      touched[static_cast<size_t>(order[static_cast<size_t>(f.first_in_order + i)]) / kChoices] = true;
  const auto tokens = static_cast<double>(std::count(touched.begin(), touched.end(), true));
  const Numbers x(kTokens, kHidden, Type::bf16), dy(kTokens, kHidden, Type::bf16),
      weights(kTokens, kChoices, Type::f32), rows(kRoundRows, kHidden, Type::bf16),
      rows_dy(kRoundRows, kHidden, Type::bf16), row_weights(1, kRoundRows, Type::f32),
      y(kTokens, kHidden, Type::f32);
  const Scratch scratch(unpermute_scratch(kTokens, kChoices));
  const double all = 2.0 * kRoundRows * kHidden;
  measure("permute", (1 + tokens / kTokens) * all, [&] {
    permute({sent, x, {}, nullptr, rows, {}, nullptr}, nullptr);
  });
  measure("permute x, dy, weights", 2 * (1 + tokens / kTokens) * all, [&] {
    permute({sent, x, dy, weights.get(), rows, rows_dy, row_weights.get()}, nullptr);
  });
  const double added = all + 8.0 * tokens * kHidden;
  measure("unpermute", added, [&] {
    unpermute({sent, rows, weights.get(), y, scratch.get<int32_t>()}, nullptr);
  });
  measure("unpermute_bwd", added, [&] {
    unpermute_bwd({sent, rows, row_weights.get(), y, weights.get(), scratch.get<int32_t>()}, nullptr);
  });
}

void embeddings() {
  const Numbers table(kVocabulary, kHidden, Type::bf16), x(kTokens, kHidden, Type::bf16);
  std::vector<int32_t> tokens(kTokens);
  std::mt19937 random(2);
  for (int32_t& id : tokens) id = static_cast<int32_t>(random() % kVocabulary);
  const DeviceVector<int32_t> ids(tokens), same(std::vector<int32_t>(kTokens, 7));
  const Scratch scratch(embedding_bwd_scratch(kTokens, kHidden));
  const double all = 2.0 * kTokens * kHidden;
  measure("embedding", 2 * all, [&] { embedding({ids.get(), kVocabulary, table, x, nullptr}, nullptr); });
  measure("embedding_bwd, accumulating", 3 * all, [&] {
    embedding_bwd({ids.get(), x, table, true, scratch.get<void>()}, nullptr);
  });
  measure("embedding_bwd, one token only", all, [&] {
    embedding_bwd({same.get(), x, table, true, scratch.get<void>()}, nullptr);
  });
}

void losses() {
  const Numbers logits(kTile, kVocabulary, Type::bf16), statistics(kTile, 3, Type::f32);
  std::vector<int32_t> some(kTile);
  for (size_t i = 0; i < some.size(); ++i) some[i] = static_cast<int32_t>(i * 31);
  const DeviceVector<int32_t> targets(some);
  const DeviceVector<double> valid({double{kTile}}), loss({0.0});
  const double all = 2.0 * kTile * kVocabulary;
  measure("cross_entropy, 4096 rows", all, [&] {
    cross_entropy({logits, {0, kVocabulary}, {targets.get(), kTile, kTile}, statistics.get(), false, nullptr},
                  nullptr);
  });
  measure("cross_entropy_bwd", 2 * all, [&] {
    cross_entropy_bwd({logits,
                       {0, kVocabulary},
                       {targets.get(), kTile, kTile},
                       statistics.get(),
                       1,
                       valid.get(),
                       loss.get(),
                       0,
                       kTile,
                       false},
                      nullptr);
  });
}

void elementwise() {
  const Numbers a(kTokens, kHidden, Type::bf16), c(kTokens, kHidden, Type::bf16),
      wide(kTokens, kHidden, Type::f32), factor(1, 1, Type::f32), sums(1, kHidden, Type::f32);
  const DeviceVector<double> sum({0.0});
  const Scratch scratch(std::max(kSquareSumScratch, column_sum_scratch(kTokens, kHidden, 1)));
  const double all = 2.0 * kTokens * kHidden;
  measure("add bf16 + fp32 -> bf16", 4 * all, [&] { add({a, wide, c, false}, nullptr); });
  measure("add bf16 += bf16", 3 * all, [&] { add({a, {}, c, true}, nullptr); });
  measure("cast fp32 -> bf16", 3 * all, [&] { copy({wide, c}, nullptr); });
  measure("cast bf16 -> fp32", 3 * all, [&] { copy({a, wide}, nullptr); });
  measure("copy bf16", 2 * all, [&] { copy({a, c}, nullptr); });
  measure("scale bf16", 2 * all, [&] { scale({a, c, factor.get()}, nullptr); });
  measure("clear fp32", 2 * all, [&] { clear({wide}, nullptr); });
  measure("column_sum bf16", all, [&] { column_sum({a, sums, false, scratch.get<float>()}, nullptr); });
  measure("sum_replicas of 2", 1.5 * all, [&] {
    const Matrix half{Matrix(c).data, Type::bf16, kTokens, kHidden / 2, kHidden / 2};
    sum_replicas({a, half, 2, 128}, nullptr);
  });
  measure("sum_pieces of 4", 1.25 * all, [&] {
    const char* const from = a.get<char>();
    const int64_t quarter = kTokens * kHidden / 4;
    SumPiecesArgs args{
        {from, from + quarter * 2, from + quarter * 4, from + quarter * 6}, 4, Type::bf16, {}, false};
    args.y = {Matrix(c).data, Type::bf16, 1, quarter, quarter};
    sum_pieces(args, nullptr);
  });
  measure("square_sum bf16", all, [&] {
    square_sum({a, 1, sum.get(), false, scratch.get<double>()}, nullptr);
  });
}

void optimizers() {
  const int64_t n = 1 << 26;
  const Numbers states(3, n, Type::f32), gradient(1, n, Type::bf16), gradient32(1, n, Type::f32),
      weights(1, n, Type::bf16);
  AdamArgs args{states.get(),        n,          0,          n,      Master::states, gradient.get<void>(),
                weights.get<void>(), Type::bf16, Type::bf16, nullptr};
  measure("adam, bf16 gradient", 28.0 * static_cast<double>(n), [&] { adam(args, nullptr); });
  args.master = Master::low;
  measure("adam, low bits, bf16 gradient", 26.0 * static_cast<double>(n), [&] { adam(args, nullptr); });
  args.master = Master::states;
  args.gradient = gradient32.get<void>(), args.gradient_type = Type::f32;
  measure("adam, fp32 gradient", 30.0 * static_cast<double>(n), [&] { adam(args, nullptr); });
}

int run() {
  if (const std::string reason = no_gpu(); !reason.empty()) {
    std::printf("bench_memory: nothing measured: %s\n", reason.c_str());
    return 0;
  }
  {
    const Numbers from(kTokens, 2 * kHidden, Type::f32), to(kTokens, 2 * kHidden, Type::f32);
    measure("device copy (cudaMemcpyAsync)", 2.0 * static_cast<double>(from.size()), [&] {
      check(cudaMemcpyAsync(to.get(), from.get(), from.size(), cudaMemcpyDeviceToDevice), "copy");
    });
  }
  norms();
  ropes();
  activations();
  routers();
  routings();
  embeddings();
  losses();
  elementwise();
  optimizers();
  return 0;
}

}  // namespace
}  // namespace mop::kernels

int main() {
  return mop::kernels::run();
}
