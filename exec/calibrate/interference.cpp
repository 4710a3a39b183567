// What kernels and transfers lose beside one another.
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "exec/calibrate/benchmarks.h"
#include "kernels/check.h"
#include "kernels/norm.h"
#include "sim/base/median.h"

namespace mop::calibrate {
namespace {

constexpr int64_t kBytes = int64_t{1} << 30, kExchangeBytes = kBytes / 8,  // several beside one gather
    kHostBytes = int64_t{128} << 20;

struct Named {
  const char* name;  // as in the names of figures
  const char* what;
  Job job;
};
std::string_view name_of(const Named& named) {
  return named.name;
}

// Up on the stream itself and down on one of its own, joined again.
class BothWays {
 public:
  BothWays(Bench& bench, std::byte* pinned, std::byte* device)
      : bench_(bench), pinned_(pinned), device_(device) {
    for (cudaEvent_t* event : {&begun_, &done_})
      kernels::check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "an event");
  }
  ~BothWays() {
    for (cudaEvent_t event : {begun_, done_}) cudaEventDestroy(event);
  }
  BothWays(const BothWays&) = delete;
  BothWays& operator=(const BothWays&) = delete;

  void run(cudaStream_t stream) const {
    const auto copy = [](std::byte* to, const std::byte* from, cudaStream_t on) {
      kernels::check(cudaMemcpyAsync(to, from, static_cast<size_t>(kHostBytes), cudaMemcpyDefault, on),
                     "a copy");
    };
    kernels::check(cudaEventRecord(begun_, stream), "an event");
    kernels::check(cudaStreamWaitEvent(bench_.down(), begun_, 0), "an event");
    copy(pinned_ + kHostBytes, device_ + kHostBytes, bench_.down());
    kernels::check(cudaEventRecord(done_, bench_.down()), "an event");
    copy(device_, pinned_, stream);
    kernels::check(cudaStreamWaitEvent(stream, done_, 0), "an event");
  }

 private:
  Bench& bench_;
  std::byte *const pinned_, *const device_;
  cudaEvent_t begun_ = nullptr, done_ = nullptr;
};

// What a link carries when more asks for it than there is: an exchange by NCCL and a gather by copy engines
// together.
void link(Bench& bench, const Job& exchange, const Job& gather) {
  if (!bench.more()) return;
  const auto [of_exchange, of_gather] = bench.slowdowns(exchange, gather);
  std::vector<double> rates;
  const double part = static_cast<double>(bench.ranks() - 1) / bench.ranks();
  if (!of_exchange.empty() && !of_gather.empty())
    rates = {part * (static_cast<double>(kExchangeBytes) / (exchange.alone * median(of_exchange)) +
                     static_cast<double>(kBytes) / (gather.alone * median(of_gather)))};
  bench.figure("native_all_to_all_beside_gather_slowdown",
               "all-to-all of 128 MiB by NCCL beside an all-gather of 1 GiB by copy engines", of_exchange);
  bench.figure("copy_engine_all_gather_beside_exchange_slowdown", "the all-gather beside those", of_gather);
  bench.figure(
      "native_nvlink_bw",
      "all-to-all of 128 MiB by NCCL and all-gather of 1 GiB by copy engines at once, sum, each way, "
      "one GPU",
      rates);
}

}  // namespace

void interference(Bench& bench) {
  const BothWays both(bench, bench.pinned(2 * kHostBytes), bench.take(2 * kHostBytes));
  const int64_t rows = 32768, hidden = 2048;
  const kernels::Matrix x = bench.matrix(rows, hidden), w = bench.matrix(1, hidden),
                        residual = bench.matrix(rows, hidden), y = bench.matrix(rows, hidden);
  const AttentionWork attention = attention_work(bench, attention_shape(128, 128, 96, 4096, 0));
  attention.forward(bench.compute());  // what backward starts from
  std::vector<Named> victims{
      {"matmul", "8192^3 matmul", {dense_product(bench, 8192, 8192, 8192, false), bench.compute(), 0}},
      {"grouped_matmul",
       "grouped matmul of 32 experts, (262144, 1536, 2048)",
       {experts_product(bench, 32, 2048, 1536, 262144), bench.compute(), 0}},
      {"attention",
       "attention backward, 96 heads of 128, 4096 tokens",
       {attention.backward, bench.compute(), 0}},
      {"memory_bound",
       "RMSNorm of 32768 x 2048 with its residual",
       {[=](cudaStream_t s) {
          kernels::rms_norm({x, w, residual, y, x, 1e-6F}, s);
        },
        bench.compute(), 0}}};
  std::vector<Named> others;
  const int all = bench.ranks();
  std::optional<Job> exchange;  // beside a gather by copy engines
  if (all > 1) {
    for (const Collective c : {Collective::all_gather, Collective::reduce_scatter, Collective::all_to_all}) {
      static constexpr const char* kNames[] = {"native_all_gather", "native_reduce_scatter", "",
                                               "native_all_to_all"};
      others.push_back({kNames[static_cast<int>(c)],
                        "by NCCL, 1 GiB",
                        {by_nccl(bench, c, all, kBytes), bench.transfer(), 0}});
    }
    if (bench.from_first(bench.peer_memory().reaches({all, 1}))) {
      exchange = {by_nccl(bench, Collective::all_to_all, all, kExchangeBytes), bench.up(), 0};
      for (const Collective c : {Collective::all_gather, Collective::reduce_scatter})
        others.push_back(
            {c == Collective::all_gather ? "copy_engine_all_gather" : "copy_engine_reduce_scatter",
             "by copy engines, 1 GiB",
             {by_copy_engines(bench, c, all, kBytes), bench.transfer(), 0}});
    }
  }
  others.push_back({"host_copies",
                    "from and to the host, both ways",
                    {[&both](cudaStream_t s) { both.run(s); }, bench.up(), 0}});
  for (std::vector<Named>* jobs : {&victims, &others})
    for (Named& one : *jobs)
      one.job.alone = bench.agreed(bench.time(one.job.work, one.job.stream, Runs::one_by_one));
  for (const Named& kernel : victims)
    for (const Named& other : others) {
      if (!bench.more()) return;
      const auto [of_kernel, of_other] = bench.slowdowns(kernel.job, other.job);
      bench.figure(fmt::format("{}_{}_slowdown", other.name, kernel.name),
                   fmt::format("{} under {} {}", kernel.what, other.name, other.what), of_kernel);
      const bool usual = std::string_view(kernel.name) == "matmul";
      bench.figure(usual ? fmt::format("{}_slowdown", other.name)
                         : fmt::format("{}_under_{}_slowdown", other.name, kernel.name),
                   fmt::format("{} {} under {}", other.name, other.what, kernel.what), of_other);
    }
  if (exchange) {
    exchange->alone = bench.agreed(bench.time(exchange->work, exchange->stream, Runs::one_by_one));
    link(bench, *exchange, std::ranges::find(others, "copy_engine_all_gather", name_of)->job);
  }
  bench.peers().barrier();
  bench.release();
}

}  // namespace mop::calibrate
