// The CPU's AdamW (exec/host/adam.h) on one job with bf16 gradients and weights, against what memory gives to
// the same threads in the same run: 28 bytes a parameter (master, m, v, gradient read; master, m, v, weights
// written).
//   bench_adam [parameters] [--threads N] [--path portable] [--repeat N] [--tiny]
// --tiny: moments that are denormal numbers, as those of experts that no token reaches become.
#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#include "exec/host/adam.h"

namespace mop::host {
namespace {

constexpr double kBytes = 28, kCeilingBytes = 24;  // of a parameter; of an element of three arrays

struct Options {
  int64_t parameters = 1'000'000'000;
  int threads = 0;  // 0: all cores but one
  int repeat = 7;
  bool portable = false, tiny = false;
};

// Memory whose pages nobody has touched; huge ones where the system gives them.
template <class T>
class Pages {
 public:
  // `arrays` of n elements each, one after the other.
  Pages(Workers& workers, int64_t n, int arrays = 1) : bytes_(static_cast<size_t>(n * arrays) * sizeof(T)) {
    void* const p =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, bytes_, MADV_HUGEPAGE);
    data_ = static_cast<T*>(p);
    for (int i = 0; i < arrays; ++i) first_touch(workers, data_ + i * n, n * static_cast<int64_t>(sizeof(T)));
  }
  ~Pages() { munmap(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  T* get() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

// In (-1, 1), by the element and the array.
float number(int64_t i, uint64_t array) {
  uint64_t x = (static_cast<uint64_t>(i) * 8 + array) * 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9U;
  return static_cast<float>(static_cast<int32_t>(x >> 32)) * 0x1p-31F;
}
uint16_t bf16(float x) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
}
float wide(uint16_t x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

#ifdef __x86_64__
#define FOR_THIS_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

// Three arrays in place: as much is written as is read, like the update.
FOR_THIS_CPU void add(float* __restrict a, float* __restrict b, float* __restrict c, float x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    a[i] += x;
    b[i] += x;
    c[i] += x;
  }
}
FOR_THIS_CPU void add_prefetching(float* __restrict a, float* __restrict b, float* __restrict c, float x,
                                  int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __builtin_prefetch(a + i + 256);
    __builtin_prefetch(b + i + 256);
    __builtin_prefetch(c + i + 256);
    for (int64_t j = i; j < i + 16; ++j) {
      a[j] += x;
      b[j] += x;
      c[j] += x;
    }
  }
  add(a + i, b + i, c + i, x, n - i);
}

double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct Kind {
  const char* what;
  double bytes;  // an element
  std::function<void()> run;
  std::vector<double> times;
  double median() {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }
};

// What number() puts where, after one step.
struct Expected {
  double weight, m, v;
};
Expected expected(int64_t i, float scale, const interpreter::AdamW& a) {
  const double g = wide(bf16(number(i, 3) * scale));
  const auto t = static_cast<double>(a.step);
  Expected e{number(i, 0), a.beta1 * number(i, 1) * scale + (1 - a.beta1) * g,
             a.beta2 * std::abs(number(i, 2)) * scale + (1 - a.beta2) * g * g};
  e.weight -= a.learning_rate * a.weight_decay * e.weight;
  e.weight -= a.learning_rate * (e.m / (1 - std::pow(a.beta1, t))) /
              (std::sqrt(e.v / (1 - std::pow(a.beta2, t))) + a.eps);
  return e;
}

int run(const Options& options) {
  std::vector<int> cores = cores_of_process();
  const size_t all_cores = cores.size();
  if (options.threads > 0)
    cores.resize(static_cast<size_t>(options.threads), -1);
  else if (cores.size() > 1)
    cores.erase(cores.begin());
  Workers workers(cores);
  const AdamPath path = options.portable ? AdamPath::portable : adam_path();
  const int64_t n = options.parameters;
  fmt::print("{} parameters, {} threads of {} cores, {}{}\n", n, workers.count(), all_cores, text(path),
             options.tiny ? ", denormal moments" : "");

  const Pages<float> states(workers, n, 3);
  const Pages<uint16_t> gradient(workers, n), weights(workers, n);
  float *const master = states.get(), *const m = master + n, *const v = m + n;
  const float scale = options.tiny ? 1e-40F : 1;
  const auto on_parts = [&](const auto& body) {
    workers.run([&](int thread) {
      const Range part = part_of(n, 32, thread, workers.count());
      body(part.begin, part.end);
    });
  };
  on_parts([&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      master[i] = number(i, 0);
      m[i] = number(i, 1) * scale;
      v[i] = std::abs(number(i, 2)) * scale;
      gradient.get()[i] = bf16(number(i, 3) * scale);
    }
  });

  const AdamPair pair{reinterpret_cast<const std::byte*>(gradient.get()),
                      program::Type::bf16,
                      reinterpret_cast<std::byte*>(weights.get()),
                      program::Type::bf16,
                      0,
                      n};
  AdamArgs args{master, n, true, {&pair, 1}, 1, {10, 1e-3, 0.9, 0.95, 1e-8, 0.1}};
  const auto step = [&] {
    adam(args, workers, path);
    ++args.settings.step;
  };
  const interpreter::AdamW first = args.settings;
  step();
  const int64_t stride = std::max<int64_t>(1, n / 100'003);
  for (int64_t i = 0; i < n; i += stride) {
    const Expected e = expected(i, scale, first);
    const auto differ = [](double actual, double exact, double relative, double absolute) {
      return !(std::abs(actual - exact) <= relative * std::abs(exact) + absolute);
    };
    const double error = 3e-7 * scale + 0x1p-126;  // of sums whose terms may cancel; of denormal numbers
    if (differ(master[i], e.weight, 1e-6, 1e-8) || differ(m[i], e.m, 1e-6, error) ||
        differ(v[i], e.v, 1e-6, error) || differ(wide(weights.get()[i]), e.weight, 0.004, 1e-8)) {
      fmt::print("element {} is wrong: weight {} ({} in bf16) instead of {}, m {} of {}, v {} of {}\n", i,
                 master[i], wide(weights.get()[i]), e.weight, m[i], e.m, v[i], e.v);
      return 1;
    }
  }
  fmt::print("every {}th element is right\n", stride);

  const volatile float nothing = 0;  // the compiler does not know
  // In turn: whatever else the machine does disturbs all of them.
  std::vector<Kind> kinds{
      {"three fp32 arrays in place",
       kCeilingBytes,
       [&] { on_parts([&](int64_t b, int64_t e) { add(master + b, m + b, v + b, nothing, e - b); }); },
       {}},
      {"the same with prefetching",
       kCeilingBytes,
       [&] {
         on_parts([&](int64_t b, int64_t e) { add_prefetching(master + b, m + b, v + b, nothing, e - b); });
       },
       {}},
      {"AdamW", kBytes, step, {}}};
  for (int i = 0; i < options.repeat; ++i)
    for (Kind& kind : kinds) kind.times.push_back(seconds(kind.run));
  double ceiling = 0;
  const auto count = static_cast<double>(n);
  for (Kind& kind : kinds) {
    const double rate = count / kind.median(), bandwidth = rate * kind.bytes;
    if (kind.bytes == kCeilingBytes) ceiling = std::max(ceiling, bandwidth);
    fmt::print(
        "{:>27}: {:8.2f} ms (best {:.2f}), {:.2f} G elements/s, {:.1f} GB/s counted as {:.0f} B, {:.1f} % of "
        "the "
        "ceiling\n",
        kind.what, kind.median() * 1e3, kind.times.front() * 1e3, rate * 1e-9, bandwidth * 1e-9, kind.bytes,
        100 * bandwidth / ceiling);
  }
  return 0;
}

}  // namespace
}  // namespace mop::host

int main(int count, char** arguments) {
  mop::host::Options options;
  const auto usage = [&] {
    fmt::print("bench_adam [parameters] [--threads N] [--path portable|avx512] [--repeat N] [--tiny]\n");
    return 2;
  };
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
    const double number = std::strtod((name.starts_with("--") ? value : name).c_str(), nullptr);
    if (name == "--tiny") {
      options.tiny = true;
      continue;
    }
    if (name == "--path" && (value == "portable" || value == "avx512"))
      options.portable = value == "portable";
    else if (number < 1)
      return usage();
    else if (name == "--threads")
      options.threads = static_cast<int>(number);
    else if (name == "--repeat")
      options.repeat = static_cast<int>(number);
    else if (name.starts_with("--"))
      return usage();
    else
      options.parameters = static_cast<int64_t>(number);
    if (name.starts_with("--")) ++i;
  }
  return mop::host::run(options);
}
