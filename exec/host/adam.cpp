#include "exec/host/adam.h"

#include <bit>
#include <cmath>

#include "exec/host/adam_span.h"
#include "sim/base/error.h"

namespace mop::host {
namespace {

constexpr int64_t kGrain = 32;  // elements: a cache line of bf16 weights, two of the states

float wide(float x) {
  return x;
}
float wide(uint16_t bf16) {
  return std::bit_cast<float>(static_cast<uint32_t>(bf16) << 16);
}

void narrow(float x, float& to) {
  to = x;
}
void narrow(float x, uint16_t& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : nearest);
}

template <class G, class W, bool Master>
void update_portable(const AdamUpdate& by, const AdamSpan& span) {
  const AdamUpdate u = by;
  const G* __restrict const gradient = static_cast<const G*>(span.gradient);
  W* __restrict const weights = static_cast<W*>(span.weights);
  float* __restrict const master = span.master, * __restrict const m = span.m, * __restrict const v = span.v;
  for (int64_t i = 0; i < span.n; ++i) {
    const float g = wide(gradient[i]) * u.scale;
    float w = Master ? master[i] : wide(weights[i]);
    m[i] += u.one_minus_beta1 * (g - m[i]);
    v[i] += u.one_minus_beta2 * (g * g - v[i]);
    w -= u.decay * w + u.step_size * m[i] / (std::sqrt(v[i]) * u.inverse_root + u.eps);
    if (Master && sizeof(W) == sizeof(uint16_t))
      w = std::bit_cast<float>(program::settled(std::bit_cast<uint32_t>(w)));
    if (Master) master[i] = w;
    narrow(w, weights[i]);
  }
}

template <class G>
void update_portable(const AdamUpdate& update, const AdamSpan& span) {
  if (span.master == nullptr) return update_portable<G, float, false>(update, span);
  span.narrow_weights ? update_portable<G, uint16_t, true>(update, span)
                      : update_portable<G, float, true>(update, span);
}

AdamUpdate update_of(const AdamArgs& args) {
  const interpreter::AdamW& a = args.settings;
  const auto f = [](double x) { return static_cast<float>(x); };
  const double t = static_cast<double>(a.step), correction1 = 1 - std::pow(a.beta1, t),
               correction2 = 1 - std::pow(a.beta2, t);
  return {args.factor,
          f(1 - a.beta1),
          f(1 - a.beta2),
          f(a.learning_rate * a.weight_decay),
          f(a.learning_rate / correction1),
          f(1 / std::sqrt(correction2)),
          f(a.eps)};
}

void check(const AdamArgs& args) {
  ensure(args.bucket > 0, "optimizer states are whole blocks");
  for (const AdamPair& pair : args.pairs) {
    ensure(pair.first >= 0 && pair.n >= 0, "elements of a pair are elements of the states");
    for (const program::Type type : {pair.gradient_type, pair.weights_type})
      ensure(type == program::Type::bf16 || type == program::Type::f32,
             "gradients and weights are bf16 or fp32");
    ensure(args.master || pair.weights_type == program::Type::f32,
           "weights that are their own master are fp32");
  }
}

// Elements [begin, end) of a pair: spans inside of blocks.
template <class F>
void for_each_span(const AdamArgs& args, const AdamPair& pair, int64_t begin, int64_t end, const F& update) {
  const int64_t parts = args.master ? 3 : 2;
  for (int64_t done = begin; done < end;) {
    const int64_t element = pair.first + done, block = element / args.bucket, inner = element % args.bucket;
    const int64_t n = std::min(end - done, args.bucket - inner);
    float* const state = args.states + block * args.bucket * parts + inner;
    float* const m = args.master ? state + args.bucket : state;
    update(AdamSpan{n, args.master ? state : nullptr, m, m + args.bucket,
                    pair.gradient + done * program::size_of(pair.gradient_type),
                    pair.weights + done * program::size_of(pair.weights_type),
                    pair.gradient_type == program::Type::bf16, pair.weights_type == program::Type::bf16});
    done += n;
  }
}

}  // namespace

void adam_portable(const AdamUpdate& update, const AdamSpan& span) {
  span.narrow_gradient ? update_portable<uint16_t>(update, span) : update_portable<float>(update, span);
}

const char* text(AdamPath path) {
  return path == AdamPath::avx512 ? "AVX-512" : "portable";
}

bool runs_here(AdamPath path) {
  if (path == AdamPath::portable) return true;
#ifdef MOP_ADAM_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

AdamPath adam_path() {
  static const AdamPath path = runs_here(AdamPath::avx512) ? AdamPath::avx512 : AdamPath::portable;
  return path;
}

void adam(const AdamArgs& args, Workers& workers, AdamPath path) {
  check(args);
  ensure(runs_here(path), "this CPU has the instructions");
  if (!std::isfinite(args.factor)) return;
  auto* run_span = adam_portable;
#ifdef MOP_ADAM_AVX512
  if (path == AdamPath::avx512) run_span = adam_avx512;
#endif
  const AdamUpdate update = update_of(args);
  int64_t all = 0;
  for (const AdamPair& pair : args.pairs) all += pair.n;
  workers.run([&](int thread) {
    const Range part = part_of(all, kGrain, thread, workers.count());
    int64_t before = 0;  // elements of the pairs before this one
    for (const AdamPair& pair : args.pairs) {
      for_each_span(args, pair, std::max<int64_t>(part.begin - before, 0),
                    std::min(part.end - before, pair.n),
                    [&](const AdamSpan& span) { run_span(update, span); });
      before += pair.n;
    }
  });
}

}  // namespace mop::host
