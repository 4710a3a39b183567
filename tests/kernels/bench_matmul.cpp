// TFLOP/s of the library-based kernels on random numbers, at the sizes of large models, and of the head with
// the loss, which is mostly products. Backward attention counts 2.5 times the forward's operations.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <numeric>
#include <thread>

#include "kernels/attention.h"
#include "kernels/grouped_matmul.h"
#include "kernels/loss.h"
#include "kernels/matmul.h"
#include "sim/base/median.h"
#include "tests/kernels/device_array.h"

namespace mop::kernels {
namespace {

// One block of random numbers, repeated.
class Random {
 public:
  explicit Random(size_t bytes, double deviation = 1) : bytes_(bytes) {
    std::mt19937 random(3);
    const DeviceArray block(random_values(1 << 20, Type::bf16, random, deviation), Type::bf16);
    for (size_t at = 0; at < bytes; at += 2U << 20)
      check(cudaMemcpy(static_cast<std::byte*>(bytes_.get()) + at, block.get(),
                       std::min<size_t>(2U << 20, bytes - at), cudaMemcpyDeviceToDevice),
            "random numbers");
  }
  void* get() const { return bytes_.get(); }

 private:
  DeviceBytes bytes_;
};

// What a GPU does depends on what it did before: at its power limit a product takes up to a third longer than
// after a rest. Everything is measured after one, in this program and in tests/peers/kernels_pytorch.py.
void rest() {
  check(cudaDeviceSynchronize(), "the work before");
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
}

// Of so many runs, one after the other.
double milliseconds(int runs, const std::function<void()>& work) {
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  check(cudaEventRecord(begin), "event");
  for (int i = 0; i < runs; ++i) work();
  check(cudaEventRecord(end), "event");
  check(cudaEventSynchronize(end), "work");
  float all = 0;
  check(cudaEventElapsedTime(&all, begin, end), "event");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return static_cast<double>(all);
}

// Milliseconds: the median of 3 to 15 single runs after a rest, which end before the power limit is felt,
// some 50 ms later.
double burst(const std::function<void()>& work) {
  constexpr double kSoon = 40;
  rest();
  double all = milliseconds(3, work);
  std::vector<double> times;
  while (times.size() < 3 || (times.size() < 15 && all < kSoon))
    all += times.emplace_back(milliseconds(1, work));
  return median(std::move(times));
}

double rate(double flops, const std::function<void()>& work) {
  return flops / burst(work) * 1e-9;
}

// In bursts, as above, and in a row, as a step has it: within the power limit, which has settled after 0.4 s.
struct Rates {
  double burst, row;
};
Rates rates(double flops, const std::function<void()>& work) {
  constexpr double kSettle = 400, kWatch = 300;
  const double ms = burst(work);
  const auto runs_in = [&](double time) { return std::max(1, static_cast<int>(time / ms)); };
  milliseconds(runs_in(kSettle), work);
  const int runs = runs_in(kWatch);
  return {flops / ms * 1e-9, flops * runs / milliseconds(runs, work) * 1e-9};
}

struct Product {
  int64_t m, n, k;
};
struct DenseRates {
  double forward, added;  // A B^T to bf16; A^T B added to fp32
};
DenseRates dense_rates(const Product& product) {
  const auto [m, n, k] = product;
  Matmul matmul;
  const DeviceBytes workspace(Matmul::kWorkspaceBytes);
  const Random a(static_cast<size_t>(2 * m * k)), b(static_cast<size_t>(2 * n * k)),
      c(static_cast<size_t>(4 * m * n));
  MatmulShape s;
  s.m = m, s.n = n, s.k = k, s.lda = k, s.ldb = k, s.ldc = n, s.transpose_b = true;
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const auto run = [&] { matmul.run(s, a.get(), b.get(), nullptr, c.get(), workspace.get(), nullptr); };
  const double forward = rate(flops, run);
  check(cudaMemset(c.get(), 0, static_cast<size_t>(4 * m * n)), "zeros");
  s.transpose_a = true, s.transpose_b = false;
  s.lda = m, s.ldb = n;
  s.out = Type::f32;
  s.accumulate = true;
  return {forward, rate(flops, run)};
}

void dense() {
  fmt::print("dense (m, n, k): forward, to fp32 added, TFLOP/s\n");
  for (const Product& p : {Product{8192, 8192, 8192}, Product{4096, 4096, 2048}, Product{8192, 2048, 4096},
                           Product{16384, 5120, 2048}, Product{65536, 4096, 2048},
                           Product{4096, 151936, 2048}, Product{8192, 18432, 7168}}) {
    const DenseRates rates = dense_rates(p);
    fmt::print("  {:>26} {:6.0f} {:6.0f}\n", fmt::format("({}, {}, {})", p.m, p.n, p.k), rates.forward,
               rates.added);
  }
}

// Rows of experts: all as many, or drawn with one expert having 8 times as many and some having none.
std::vector<ExpertGroup> experts(int count, int64_t rows, bool even) {
  std::vector<double> share(static_cast<size_t>(count), 1);
  if (!even) {
    for (size_t i = 0; i < share.size(); ++i) share[i] = static_cast<double>(i * 7 % 16) / 8;
    share[share.size() / 2] = 8;
  }
  const double all = std::accumulate(share.begin(), share.end(), 0.0);
  std::vector<ExpertGroup> out;
  double done = 0;
  for (int i = 0; i < count; ++i) {
    const auto first = static_cast<int32_t>(done / all * static_cast<double>(rows));
    done += share[static_cast<size_t>(i)];
    out.push_back({first, static_cast<int32_t>(done / all * static_cast<double>(rows)), i, -1});
  }
  return out;
}

// Gate and up, of weights (n, k): forward (rows, k) W^T, the input's gradient (rows, n) W, the weights' (n,
// rows) (rows, k).
void grouped() {
  fmt::print(
      "experts (E, k, n, rows), TFLOP/s in bursts/in a row: forward, input gradient, weight gradient "
      "(written); in bursts: those by one call an expert; weight gradient added, in fp32; forward with bias, "
      "forward and weight gradient of uneven rows\n");
  GroupedMatmul grouped, by_expert(true);
  DeviceBytes workspace(grouped.workspace_bytes());
  struct Size {
    int count;
    int64_t k, n, rows;
  };
  for (const auto [count, k, n, rows] :
       {Size{128, 2048, 1536, 65536}, Size{32, 2048, 1536, 65536}, Size{32, 2048, 1536, 262144},
        Size{32, 2880, 5760, 32768}, Size{64, 7168, 4096, 65536}, Size{128, 2048, 1536, 8192},
        Size{128, 2048, 1536, 16384}, Size{128, 2048, 1536, 32768}, Size{128, 768, 2048, 65536}}) {
    const Type t = Type::bf16;
    const auto of_rows = static_cast<size_t>(2 * rows), of_weights = static_cast<size_t>(2 * count * k * n);
    const auto inner = static_cast<size_t>(k), outer = static_cast<size_t>(n);
    const Random x(of_rows * inner), dy(of_rows * outer), w(of_weights);
    const DeviceBytes y(of_rows * outer), dx(of_rows * inner), dw(2 * of_weights);
    const double flops = 2.0 * static_cast<double>(rows) * static_cast<double>(n) * static_cast<double>(k);
    const ExpertMatrices weights{w.get(), nullptr, k, n * k, 0}, bias{w.get(), nullptr, n, n, 0},
        gradients{dw.get(), nullptr, k, n * k, 0};
    const auto forward = [&](GroupedMatmul& by, bool even, bool with_bias) {
      return [&, all = experts(count, rows, even), with_bias] {
        by.multiply(all, {x.get(), t, rows, k, k}, weights, true, with_bias ? bias : ExpertMatrices{},
                    {y.get(), t, rows, n, n}, workspace.get(), nullptr);
      };
    };
    const auto input_gradient = [&](GroupedMatmul& by) {
      return [&, all = experts(count, rows, true)] {
        by.multiply(all, {dy.get(), t, rows, n, n}, weights, false, {}, {dx.get(), t, rows, k, k},
                    workspace.get(), nullptr);
      };
    };
    const auto weight_gradient = [&](GroupedMatmul& by, bool even, Type out, bool accumulate = false) {
      check(cudaMemset(dw.get(), 0, dw.size()), "zeros");
      return [&, all = experts(count, rows, even), out, accumulate] {
        by.weight_gradient(all, {dy.get(), t, rows, n, n}, {x.get(), t, rows, k, k}, gradients, out,
                           accumulate, workspace.get(), nullptr);
      };
    };
    fmt::print("  {:>26}", fmt::format("({}, {}, {}, {})", count, k, n, rows));
    for (const std::function<void()>& work : {std::function<void()>(forward(grouped, true, false)),
                                              std::function<void()>(input_gradient(grouped)),
                                              std::function<void()>(weight_gradient(grouped, true, t))}) {
      const Rates r = rates(flops, work);
      fmt::print(" {:5.0f}/{:.0f}", r.burst, r.row);
    }
    fmt::print("; {:5.0f}", rate(flops, forward(by_expert, true, false)));
    fmt::print(" {:5.0f}", rate(flops, input_gradient(by_expert)));
    fmt::print(" {:5.0f};", rate(flops, weight_gradient(by_expert, true, t)));
    fmt::print(" {:5.0f}", rate(flops, weight_gradient(grouped, true, t, true)));
    fmt::print(" {:5.0f};", rate(flops, weight_gradient(grouped, true, Type::f32)));
    fmt::print(" {:5.0f}", rate(flops, forward(grouped, true, true)));
    fmt::print(" {:5.0f}", rate(flops, forward(grouped, false, false)));
    fmt::print(" {:5.0f}\n", rate(flops, weight_gradient(grouped, false, t)));
  }
}

void attention() {
  fmt::print(
      "attention (context, heads, key heads, widths): forward, backward, TFLOP/s; milliseconds to plan "
      "both\n");
  Attention attention;
  struct Size {
    int64_t context, heads, kv_heads, qk, v, window, documents;
  };
  for (const auto& z :
       {Size{4096, 32, 4, 128, 128, 0, 0}, Size{16384, 32, 4, 128, 128, 0, 0},
        Size{65536, 32, 4, 128, 128, 0, 0}, Size{4096, 64, 8, 64, 64, 0, 0}, Size{16384, 64, 8, 64, 64, 0, 0},
        Size{65536, 64, 8, 64, 64, 0, 0}, Size{4096, 8, 1, 128, 128, 0, 0}, Size{16384, 8, 1, 128, 128, 0, 0},
        Size{65536, 8, 1, 128, 128, 0, 0}, Size{4096, 128, 128, 192, 128, 0, 0},
        Size{8192, 128, 128, 192, 128, 0, 0}, Size{16384, 64, 8, 64, 64, 128, 0},
        Size{16384, 32, 4, 128, 128, 0, 1}, Size{16384, 32, 4, 128, 128, 0, 64},
        Size{16384, 32, 4, 128, 128, 0, 512}}) {
    AttentionShape s;
    s.context = z.context, s.heads = z.heads, s.kv_heads = z.kv_heads, s.qk_dim = z.qk, s.v_dim = z.v;
    s.window = z.window, s.documents = z.documents, s.scale = 0.1;
    s.q_ld = z.heads * z.qk, s.k_ld = z.kv_heads * z.qk, s.v_ld = z.kv_heads * z.v, s.o_ld = z.heads * z.v;
    AttentionGradientShape g{s, s.o_ld, s.q_ld, s.k_ld, s.v_ld, false};
    const auto bytes = [&](int64_t ld) { return static_cast<size_t>(2 * z.context * ld); };
    const Random q(bytes(s.q_ld)), k(bytes(s.k_ld)), v(bytes(s.v_ld)), d_o(bytes(s.o_ld));
    const DeviceBytes o(bytes(s.o_ld)), dq(bytes(s.q_ld)), dk(bytes(s.k_ld)), dv(bytes(s.v_ld)),
        lse(static_cast<size_t>(4 * z.context * z.heads)), starts(static_cast<size_t>(4 * z.context));
    check(cudaMemset(starts.get(), 0, starts.size()), "one document");
    const auto begin = std::chrono::steady_clock::now();
    attention.prepare(s);
    attention.prepare(g);
    const std::chrono::duration<double, std::milli> planning = std::chrono::steady_clock::now() - begin;
    const DeviceBytes workspace(std::max(attention.workspace_bytes(s), attention.workspace_bytes(g)));
    const AttentionInputs in{q.get(), k.get(), v.get(), static_cast<const int32_t*>(starts.get()), {}};
    const auto c = static_cast<double>(z.context), window = static_cast<double>(z.window);
    const double pairs = z.window == 0 ? c * (c + 1) / 2 : window * c - window * (window - 1) / 2;
    const double flops = 2 * pairs * static_cast<double>(z.heads * (z.qk + z.v));
    const double forward = rate(flops, [&] {
      attention.forward(s, in, o.get(), static_cast<float*>(lse.get()), workspace.get(), nullptr);
    });
    const double backward = rate(2.5 * flops, [&] {
      attention.backward(g, in, o.get(), d_o.get(), static_cast<const float*>(lse.get()),
                         {dq.get(), dk.get(), dv.get(), {}, false}, workspace.get(), nullptr);
    });
    fmt::print("  {:>40} {:6.0f} {:6.0f} {:8.0f}  {:.1f} MiB of workspace\n",
               fmt::format("({}, {}, {}, {}/{}){}{}", z.context, z.heads, z.kv_heads, z.qk, z.v,
                           z.window > 0 ? fmt::format(" window {}", z.window) : "",
                           z.documents > 0 ? fmt::format(" up to {} documents", z.documents) : ""),
               forward, backward, planning.count(), static_cast<double>(workspace.size()) / (1 << 20));
  }
}

// The head and the loss tile by tile, as sim/program/native/vocabulary.cpp lowers them: logits = X W^T, their
// statistics, their gradient in place, dW += logits^T X, dX = logits W. On `ranks` ranks each has its part of
// the columns and works on everyone's tokens; dX is then sent on in bf16. The exchanges between ranks are
// left out.
class Head {
 public:
  static constexpr int64_t kHidden = 2048, kVocabulary = 151936, kTokens = 32768;  // tokens of a rank
  static constexpr double kFlops = 6.0 * kHidden * kVocabulary * kTokens;
  enum Stage { logits, statistics, gradient, weights, inputs, kStages };

  // tile: tokens of each rank.
  Head(int64_t ranks, int64_t tile, Type dw_type)
      : rows_(ranks * tile),
        columns_(kVocabulary / ranks),
        tokens_(ranks * kTokens),
        x_(bytes(tokens_, kHidden, Type::bf16)),
        w_(bytes(columns_, kHidden, Type::bf16), 0.02),
        logits_(bytes(rows_, columns_, Type::bf16)),
        dx_(bytes(tokens_, kHidden, Type::f32)),
        dw_(bytes(columns_, kHidden, dw_type)),
        statistics_(bytes(rows_, 3, Type::f32)),
        targets_(bytes(1, tokens_, Type::i32)),
        sums_(2 * sizeof(double)),
        workspace_(Matmul::kWorkspaceBytes) {
    forward_ = product(rows_, columns_, kHidden, false, true, Type::bf16);
    to_weights_ = product(columns_, kHidden, rows_, true, false, dw_type);
    to_weights_.accumulate = true;
    to_inputs_ = product(rows_, kHidden, columns_, false, false, ranks == 1 ? Type::f32 : Type::bf16);
    std::vector<int32_t> targets(static_cast<size_t>(tokens_));
    std::mt19937 random(4);
    for (int32_t& t : targets) t = static_cast<int32_t>(random() % kVocabulary);
    const std::array<double, 2> sums{static_cast<double>(tokens_), 0};  // tokens that count, the loss
    check(cudaMemcpy(targets_.get(), targets.data(), targets_.size(), cudaMemcpyHostToDevice), "targets");
    check(cudaMemcpy(sums_.get(), sums.data(), sizeof sums, cudaMemcpyHostToDevice), "sums");
    check(cudaMemset(dw_.get(), 0, dw_.size()), "zeros");
    check(cudaEventCreate(&begin_), "event");
    for (int64_t begin = 0; begin < tokens_; begin += rows_)
      for (int i = 0; i < kStages; ++i) check(cudaEventCreate(&ends_.emplace_back()), "event");
  }
  ~Head() {
    for (cudaEvent_t event : ends_) cudaEventDestroy(event);
    cudaEventDestroy(begin_);
  }

  struct Times {
    double all = 0;
    std::array<double, kStages> of{};
    bool operator<(const Times& other) const { return all < other.all; }
  };
  // Milliseconds of all tiles.
  Times run() {
    check(cudaEventRecord(begin_), "event");
    size_t ended = 0;
    const auto end = [&] { check(cudaEventRecord(ends_[ended++]), "event"); };
    auto* const valid = static_cast<double*>(sums_.get());
    auto* const kept = static_cast<float*>(statistics_.get());
    for (int64_t begin = 0; begin < tokens_; begin += rows_) {
      void* const x = at(x_.get(), begin * kHidden, Type::bf16);
      const Matrix tile{logits_.get(), Type::bf16, rows_, columns_, columns_};
      const Targets targets{static_cast<const int32_t*>(targets_.get()) + begin, rows_, rows_};
      multiply(forward_, x, w_.get(), logits_.get());
      end();
      cross_entropy({tile, {0, kVocabulary}, targets, kept, false, nullptr}, nullptr);
      end();
      cross_entropy_bwd({tile, {0, kVocabulary}, targets, kept, 1, valid, valid + 1, 0, rows_, true},
                        nullptr);
      end();
      multiply(to_weights_, logits_.get(), x, dw_.get());
      end();
      multiply(to_inputs_, logits_.get(), w_.get(), at(dx_.get(), begin * kHidden, to_inputs_.out));
      end();
    }
    check(cudaEventSynchronize(ends_.back()), "the head");
    Times times;
    cudaEvent_t before = begin_;
    for (size_t i = 0; i < ended; ++i) {
      float ms = 0;
      check(cudaEventElapsedTime(&ms, before, ends_[i]), "event");
      times.of[i % kStages] += ms;
      times.all += ms;
      before = ends_[i];
    }
    return times;
  }

 private:
  static size_t bytes(int64_t rows, int64_t cols, Type type) {
    return static_cast<size_t>(rows * cols) * size_of(type);
  }
  static void* at(void* data, int64_t element, Type type) {
    return static_cast<std::byte*>(data) + element * static_cast<int64_t>(size_of(type));
  }
  static MatmulShape product(int64_t m, int64_t n, int64_t k, bool transpose_a, bool transpose_b, Type out) {
    MatmulShape s;
    s.m = m, s.n = n, s.k = k, s.transpose_a = transpose_a, s.transpose_b = transpose_b, s.out = out;
    s.lda = transpose_a ? m : k, s.ldb = transpose_b ? k : n, s.ldc = n;
    return s;
  }
  void multiply(const MatmulShape& shape, const void* a, const void* b, void* c) {
    matmul_.run(shape, a, b, nullptr, c, workspace_.get(), nullptr);
  }

  const int64_t rows_, columns_, tokens_;
  Matmul matmul_;
  const Random x_, w_, logits_;
  const DeviceBytes dx_, dw_, statistics_, targets_, sums_, workspace_;
  MatmulShape forward_, to_weights_, to_inputs_;
  cudaEvent_t begin_ = nullptr;
  std::vector<cudaEvent_t> ends_;  // of every stage of every tile
};

void head() {
  fmt::print(
      "head and loss (H {}, V {}, {} tokens a rank; ranks, tokens a tile of each, type of dW): ms, TFLOP/s, "
      "share of the "
      "rate of (8192, 8192, 8192); ms of logits, cross entropy, its gradient, dW, dX\n",
      Head::kHidden, Head::kVocabulary, Head::kTokens);
  for (const int64_t ranks : {1, 4})
    for (const Type type : {Type::f32, Type::bf16})
      for (const int64_t tile : {1024, 2048, 4096, 8192}) {
        const double dense = dense_rates({8192, 8192, 8192}).forward;  // next to what is compared with it
        Head head(ranks, tile, type);
        std::vector<Head::Times> times;
        rest();
        head.run();
        for (int i = 0; i < 5; ++i) times.push_back(head.run());
        std::nth_element(times.begin(), times.begin() + 2, times.end());
        const Head::Times& t = times[2];
        const double rate = Head::kFlops / t.all * 1e-9;
        fmt::print("  ({}, {:4}, {:>4}) {:7.2f} {:4.0f} {:5.1f} % of {:3.0f};", ranks, tile,
                   type == Type::f32 ? "fp32" : "bf16", t.all, rate, 100 * rate / dense, dense);
        for (const double ms : t.of) fmt::print(" {:6.2f}", ms);
        fmt::print("\n");
      }
}

}  // namespace
}  // namespace mop::kernels

// bench_matmul [dense] [grouped] [attention] [head]: these, or all.
int main(int count, char** names) {
  if (const std::string reason = mop::kernels::no_gpu(); !reason.empty()) {
    fmt::print("no benchmark: {}\n", reason);
    return 0;
  }
  const auto chosen = [&](std::string_view name) {
    return count == 1 || std::find(names + 1, names + count, name) != names + count;
  };
  if (chosen("dense")) mop::kernels::dense();
  if (chosen("grouped")) mop::kernels::grouped();
  if (chosen("attention")) mop::kernels::attention();
  if (chosen("head")) mop::kernels::head();
}
