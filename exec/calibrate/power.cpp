// What the GPUs draw, and at which clock, while they do one kind of work: where the power limit holds the
// clock down, kernels are as fast as what runs beside and before them lets them be.
#include <dlfcn.h>
#include <fmt/format.h>

#include <chrono>
#include <optional>
#include <thread>

#include "exec/calibrate/benchmarks.h"
#include "kernels/check.h"
#include "kernels/norm.h"

namespace mop::calibrate {
namespace {

// Of the driver's management library, which not every host has: the few functions that are asked here.
class Sensor {
 public:
  // Of the current GPU; nothing where the library is missing or does not tell.
  static std::optional<Sensor> of_this_gpu() {
    Sensor sensor;
    int device = 0;
    std::array<char, 32> bus{};
    kernels::check(cudaGetDevice(&device), "the GPU");
    kernels::check(cudaDeviceGetPCIBusId(bus.data(), bus.size(), device), "the GPU");
    void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (library == nullptr) return std::nullopt;
    const auto function = [&](const char* name, auto& to) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(library, name));
      return to != nullptr;
    };
    int (*start)() = nullptr;
    int (*find)(const char*, void**) = nullptr;
    if (!function("nvmlInit_v2", start) || !function("nvmlDeviceGetHandleByPciBusId_v2", find) ||
        !function("nvmlDeviceGetTotalEnergyConsumption", sensor.energy_) ||
        !function("nvmlDeviceGetClockInfo", sensor.clock_) ||
        !function("nvmlDeviceGetMaxClockInfo", sensor.most_) ||
        !function("nvmlDeviceGetEnforcedPowerLimit", sensor.limit_))
      return std::nullopt;
    if (start() != 0 || find(bus.data(), &sensor.device_) != 0) return std::nullopt;
    const bool tells = sensor.joules() && sensor.clock_hz() && sensor.most_hz() && sensor.limit_watts();
    return tells ? std::optional(sensor) : std::nullopt;
  }

  std::optional<double> joules() const { return asked<unsigned long long>(energy_, 1e-3); }
  std::optional<double> limit_watts() const { return asked<unsigned>(limit_, 1e-3); }
  std::optional<double> clock_hz() const { return of_clock(clock_); }
  std::optional<double> most_hz() const { return of_clock(most_); }

 private:
  static constexpr int kMultiprocessors = 1;  // NVML_CLOCK_SM
  template <class T>
  std::optional<double> asked(int (*function)(void*, T*), double unit) const {
    T value = 0;
    return function(device_, &value) == 0 ? std::optional(static_cast<double>(value) * unit) : std::nullopt;
  }
  std::optional<double> of_clock(int (*function)(void*, int, unsigned*)) const {
    unsigned megahertz = 0;
    return function(device_, kMultiprocessors, &megahertz) == 0 ? std::optional(megahertz * 1e6)
                                                                : std::nullopt;
  }

  void* device_ = nullptr;
  int (*energy_)(void*, unsigned long long*) = nullptr;  // millijoules
  int (*clock_)(void*, int, unsigned*) = nullptr;
  int (*most_)(void*, int, unsigned*) = nullptr;
  int (*limit_)(void*, unsigned*) = nullptr;  // milliwatts
};

// The clock settles within tens of milliseconds, the counter of joules goes on every hundred at most.
constexpr auto kSettle = std::chrono::milliseconds(250), kWatch = std::chrono::milliseconds(500);
constexpr int kAhead = 2;  // batches on the stream
constexpr double kBatchSeconds = 10e-3;

struct Drawn {
  double watts, hertz;
};

// While `work`, which takes `seconds`, is done again and again; nothing at all: while nothing is.
Drawn watch(Bench& bench, const Sensor& sensor, const Work& work, double seconds) {
  using Clock = std::chrono::steady_clock;
  bench.peers().barrier();
  std::array<cudaEvent_t, kAhead> ends{};
  for (cudaEvent_t& end : ends)
    kernels::check(cudaEventCreateWithFlags(&end, cudaEventDisableTiming), "an event");
  const int batch = work ? std::max(1, static_cast<int>(kBatchSeconds / seconds)) : 0;
  const Clock::time_point begin = Clock::now();
  std::optional<Clock::time_point> watched;
  double joules = 0, hertz = 0;
  int readings = 0;
  for (size_t turn = 0;; turn = (turn + 1) % kAhead) {
    if (work) {
      kernels::check(cudaEventSynchronize(ends[turn]), "work that draws power");
      for (int i = 0; i < batch; ++i) work(bench.compute());
      kernels::check(cudaEventRecord(ends[turn], bench.compute()), "an event");
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    const Clock::time_point now = Clock::now();
    if (now - begin < kSettle) continue;
    if (!watched) watched = now, joules = *sensor.joules();
    hertz += *sensor.clock_hz();
    ++readings;
    if (now - *watched >= kWatch) break;
  }
  const double drawn = *sensor.joules() - joules,
               lasted = std::chrono::duration<double>(Clock::now() - *watched).count();
  kernels::check(cudaStreamSynchronize(bench.compute()), "work that draws power");
  for (cudaEvent_t end : ends) cudaEventDestroy(end);
  return {drawn / lasted, hertz / readings};
}

}  // namespace

void power(Bench& bench) {
  const std::optional<Sensor> sensor = Sensor::of_this_gpu();
  bool all = true;
  for (const int one : launch::everyones(bench.peers(), sensor ? 1 : 0)) all = all && one == 1;
  if (!all) {
    if (bench.rank() == 0)
      bench.findings().unsupported.emplace_back("the driver tells no power and no clock");
    return;
  }
  bench.figure("power_limit_w", "enforced power limit of a GPU", {*sensor->limit_watts()});
  bench.figure("largest_clock_hz", "the largest clock of the multiprocessors", {*sensor->most_hz()});
  const int64_t rows = 32768, hidden = 2048;
  const kernels::Matrix x = bench.matrix(rows, hidden), w = bench.matrix(1, hidden),
                        residual = bench.matrix(rows, hidden), y = bench.matrix(rows, hidden);
  const Work product = dense_product(bench, 8192, 8192, 8192, false), memory = [=](cudaStream_t s) {
    kernels::rms_norm({x, w, residual, y, x, 1e-6F}, s);
  };
  const AttentionWork attention = attention_work(bench, attention_shape(128, 128, 96, 4096, 0));
  attention.forward(bench.compute());  // what backward starts from
  struct Kind {
    const char *name, *what;
    Work work;
  };
  const std::vector<Kind> kinds{
      {"idle", "nothing, the context being there", {}},
      {"matmul", "8192^3 products", product},
      {"grouped_matmul", "grouped products of 32 experts, (262144, 1536, 2048)",
       experts_product(bench, 32, 2048, 1536, 262144, false)},
      {"attention", "attention backward, 96 heads of 128, 4096 tokens", attention.backward},
      {"memory_bound", "RMSNorm of 32768 x 2048 with its residual", memory},
      {"mixed", "8192^3 products and as long of such RMSNorms by turns", [=, turns = 9](cudaStream_t s) {
         product(s);
         for (int i = 0; i < turns; ++i) memory(s);
       }}};
  for (const Kind& kind : kinds) {
    if (!bench.more()) return;
    const double seconds =
        kind.work ? bench.agreed(bench.time(kind.work, bench.compute(), Runs::one_by_one)) : 0;
    const Drawn drawn = watch(bench, *sensor, kind.work, seconds);
    bench.figure(fmt::format("{}_power_w", kind.name), fmt::format("drawn by {} alone", kind.what),
                 {drawn.watts});
    bench.figure(fmt::format("{}_clock_hz", kind.name),
                 fmt::format("clock of the multiprocessors under {} alone", kind.what), {drawn.hertz});
  }
  bench.release();
}

}  // namespace mop::calibrate
