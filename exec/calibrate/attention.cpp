// Causal attention by cuDNN through kernels/attention.h.
#include <fmt/format.h>

#include <algorithm>

#include "exec/calibrate/benchmarks.h"
#include "kernels/check.h"
#include "sim/program/program.h"

namespace mop::calibrate {
namespace {

using program::OpKind;

constexpr double kMostFlops = 4e13;  // of a forward pass
constexpr int64_t kSinkWidth = 64;   // heads of gpt-oss are so wide, and have sinks

program::Shape program_shape(const kernels::AttentionShape& s) {
  return program::AttentionShape{s.batch,  s.context, s.context, s.heads, s.kv_heads,
                                 s.qk_dim, s.v_dim,   1,         s.window}
      .shape();
}

int64_t bytes_of(const kernels::AttentionShape& s) {
  return 2 * 4 * s.rows() *
         (s.q_ld + s.k_ld + s.v_ld + s.o_ld);  // with gradients and what backward sums in fp32
}

void measure(Bench& bench, const kernels::AttentionShape& s) {
  const bool window = s.window > 0;
  std::vector<double> at{static_cast<double>(s.qk_dim), static_cast<double>(s.v_dim)};
  if (window) at.push_back(static_cast<double>(s.window));
  at.push_back(static_cast<double>(s.heads * s.batch)), at.push_back(static_cast<double>(s.context));
  AttentionWork work;
  try {
    work = attention_work(bench, s);
  } catch (const kernels::CudaError& error) {  // no kernel for the shape, on any rank
    if (bench.rank() == 0) bench.findings().unsupported.emplace_back(error.what());
    return bench.release();
  }
  const std::string base = window ? "native_window_attention_" : "native_attention_";
  const auto point = [&](const char* which, const char* counted, OpKind kind, const Work& run) {
    bench.point(
        base + which,
        fmt::format(
            "cuDNN causal attention by kernels/attention.h{}; (qk, v, {}heads x batch, S) -> FLOP/s{}",
            window ? ", sliding windows and sinks" : ", grouped queries, sinks at width 64",
            window ? "window, " : "", counted),
        at, program::flops(kind, program_shape(s)), bench.time(run, bench.compute(), Runs::clocked));
  };
  point("forward", "", OpKind::attention_fwd, work.forward);
  point("backward", ", of 2.5 x forward FLOPs", OpKind::attention_bwd, work.backward);
  bench.release();
}

}  // namespace

// parallel: heads x batch. Query heads a key head, and the most of a sequence, as models of that width have
// them.
kernels::AttentionShape attention_shape(int64_t width, int64_t value_width, int64_t parallel, int64_t context,
                                        int64_t window) {
  kernels::AttentionShape s;
  const bool latent = width != value_width;
  s.heads = std::min<int64_t>(parallel, width == 128 ? 32 : latent ? 128 : 64);
  s.batch = parallel / s.heads;
  s.kv_heads = latent ? s.heads : std::max<int64_t>(1, s.heads / 8);
  s.context = context, s.qk_dim = width, s.v_dim = value_width, s.window = window,
  s.sinks = width == kSinkWidth;
  s.scale = 0.1;
  s.q_ld = s.heads * width, s.k_ld = s.kv_heads * width, s.v_ld = s.kv_heads * value_width,
  s.o_ld = s.heads * value_width;
  return s;
}

AttentionWork attention_work(Bench& bench, const kernels::AttentionShape& s) {
  const kernels::AttentionGradientShape g{s, s.o_ld, s.q_ld, s.k_ld, s.v_ld, false};
  kernels::Attention& attention = bench.libraries().attention;
  const int64_t rows = s.rows();
  const auto piece = [&](int64_t ld) { return bench.take(2 * rows * ld); };
  kernels::AttentionInputs in{piece(s.q_ld), piece(s.k_ld), piece(s.v_ld), nullptr, {}};
  if (s.sinks) in.sinks = {bench.matrix(1, s.heads), 0};
  std::byte *const o = piece(s.o_ld), *const d_o = piece(s.o_ld);
  auto* const lse = reinterpret_cast<float*>(bench.take(4 * rows * s.heads));
  kernels::Attention::Gradients out{piece(s.q_ld), piece(s.k_ld), piece(s.v_ld), {}, false};
  if (s.sinks) out.d_sinks = bench.matrix(1, s.heads);
  std::byte* const workspace =
      bench.take(static_cast<int64_t>(std::max(attention.workspace_bytes(s), attention.workspace_bytes(g))));
  return {[=, &attention](cudaStream_t stream) { attention.forward(s, in, o, lse, workspace, stream); },
          [=, &attention](cudaStream_t stream) {
            attention.backward(g, in, o, d_o, lse, out, workspace, stream);
          }};
}

void attention(Bench& bench) {
  struct Kind {
    int64_t width, value, window;
    std::vector<int64_t> parallel;
  };
  // The most used shapes first; each costs two plans, some tenths of a second.
  const std::vector<Kind> kinds{{128, 128, 0, {32, 8, 256, 2}},
                                {64, 64, 0, {64, 512, 8}},
                                {64, 64, 128, {64, 512, 8}},
                                {192, 128, 0, {64, 8, 256}}};
  for (const int64_t context : {4096, 16384, 65536, 131072, 1024, 2048})
    for (const Kind& kind : kinds)
      for (const int64_t parallel : kind.parallel) {
        const kernels::AttentionShape s =
            attention_shape(kind.width, kind.value, parallel, context, kind.window);
        if (program::flops(OpKind::attention_fwd, program_shape(s)) > kMostFlops ||
            !bench.fits(bytes_of(s)) || s.rows() > 131072)
          continue;
        if (context < 4096 && kind.width != 128) continue;
        if (!bench.more()) return;
        measure(bench, s);
      }
}

}  // namespace mop::calibrate
