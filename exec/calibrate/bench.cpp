#include "exec/calibrate/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "exec/cuda/communicators.h"
#include "exec/cuda/devices.h"
#include "exec/cuda/libraries.h"
#include "kernels/check.h"
#include "kernels/clock.h"
#include "kernels/elementwise.h"
#include "sim/base/error.h"
#include "sim/base/median.h"
#include "sim/base/quantity.h"
#include "sim/cluster/cluster.h"

namespace mop::calibrate {

using kernels::check;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int kMostRepeats = 10;
constexpr size_t kMostReadings = 128;  // of the clock
constexpr double kMostRuns = 800;      // between two looks at the device
constexpr double kPointSeconds = 20e-3, kBatchSeconds = 200e-6;
// A GPU whose clock has not come down yet is a tenth faster than one in the midst of a step, and one that did
// nothing but products for long is slower: what is measured comes behind some tens of milliseconds of
// products and copies, and again behind as much of them as it takes itself. With a product measured, four
// fifths of the time is products, as in a step.
constexpr double kHeatSeconds = 40e-3, kRoundSeconds = 2.2e-3;  // of heat; a round takes no less
constexpr int kHeatCopies = 4;                                  // to a product
// Of a kernel and a transfer by turns: of the kernel alone; of the kernel beside the transfer, of what that
// takes alone.
constexpr double kAloneSeconds = 3e-3, kCover = 3;
constexpr int kRounds = 8;
constexpr int64_t kHeatBytes = int64_t{1} << 30, kSquare = 8192, kFlushBytes = int64_t{128} << 20;
constexpr int64_t kAlign = 256, kBlock = 1 << 20;  // in the arena; random numbers, repeated

int choose_device(const launch::Place& place) {
  cuda::ask_for_queues();
  const int devices = cuda::count_devices("mop calibrate needs one");
  if (place.local_size > devices)
    throw UserError(fmt::format("--gpus is {}, and this host has {}", place.local_size, devices));
  cuda::use_device(place.local_rank);
  return place.local_rank;
}

std::string machine(int device, int gpus) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "the GPU");
  return fmt::format("{} x {} ({})", gpus, properties.name,
                     format_bytes(static_cast<double>(properties.totalGlobalMem)));
}

double seconds_between(cudaEvent_t begin, cudaEvent_t end) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "an event");
  return milliseconds * 1e-3;
}

uint16_t bf16(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace

Bench::Bench(const launch::Place& place, launch::Peers& peers) : peers_(peers) {
  const int device = choose_device(place);
  findings_.libraries = cuda::check_libraries();
  findings_.machine = machine(device, peers.size());
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities");
  check(cudaStreamCreateWithPriority(&compute_, cudaStreamNonBlocking, least), "a stream");
  for (cudaStream_t* stream : {&transfer_, &up_, &down_})
    check(cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, greatest), "a stream");
  {
    const cuda::DeviceBytes one =
        cuda::device_bytes(2 << 20, "a first kernel");  // what the driver allocates at least
    const kernels::Matrix row{one.get(), kernels::Type::f32, 1, 256, 256};
    kernels::add({row, row, row}, compute_);
    context_bytes_ = used_bytes() - (2 << 20);
  }
  // Of the GPU with the least: memory is laid out alike on all.
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  arena_bytes_ =
      static_cast<int64_t>(std::ranges::min(launch::everyones(peers, 0.6 * static_cast<double>(free)))) /
      kAlign * kAlign;
  arena_ = cuda::device_bytes(arena_bytes_, "the memory of the benchmarks");
  heat_ = cuda::device_bytes(kHeatBytes, "what keeps a GPU warm");
  heat_workspace_ =
      cuda::device_bytes(static_cast<int64_t>(kernels::Matmul::kWorkspaceBytes), "what keeps a GPU warm");
  clocks_ = cuda::device_bytes(kMostReadings * static_cast<int64_t>(sizeof(kernels::ClockReadings)),
                               "readings of the clock");
  sensor_ = PowerSensor::of_this_gpu();
  for (const int tells : launch::everyones(peers, sensor_ ? 1 : 0))
    if (tells == 0) sensor_.reset();
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> block(kBlock);
  for (uint16_t& value : block) value = bf16(normal(random));
  check(cudaMemcpy(arena_.get(), block.data(), block.size() * 2, cudaMemcpyHostToDevice), "random numbers");
  fill(arena_bytes_);
  check(cudaMemcpy(heat_.get(), arena_.get() + kBlock * 2, static_cast<size_t>(kHeatBytes),
                   cudaMemcpyDeviceToDevice),
        "random numbers");
}

Bench::~Bench() {
  for (cudaStream_t stream : {compute_, transfer_, up_, down_}) cudaStreamSynchronize(stream);
  peer_memory_.reset();
  for (const auto& [size, comm] : communicators_)
    if (comm != nullptr) ncclCommDestroy(comm);
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  for (cudaStream_t stream : {compute_, transfer_, up_, down_}) cudaStreamDestroy(stream);
}

// From the block at the beginning, which nobody gets.
void Bench::fill(int64_t bytes) {
  for (int64_t have = kBlock * 2; have < bytes; have *= 2)
    check(
        cudaMemcpyAsync(arena_.get() + have, arena_.get(), static_cast<size_t>(std::min(have, bytes - have)),
                        cudaMemcpyDeviceToDevice, compute_),
        "random numbers");
  check(cudaStreamSynchronize(compute_), "random numbers");
}

std::byte* Bench::take(int64_t bytes) {
  if (taken_ == 0) taken_ = kBlock * 2;
  ensure(taken_ + bytes <= arena_bytes_, "benchmarks fit into the memory");
  std::byte* const at = arena_.get() + taken_;
  taken_ += (bytes + kAlign - 1) / kAlign * kAlign;
  return at;
}

kernels::Matrix Bench::matrix(int64_t rows, int64_t cols, kernels::Type type) {
  return {take(rows * cols * static_cast<int64_t>(kernels::size_of(type))), type, rows, cols, cols};
}

const int32_t* Bench::upload(const std::vector<int32_t>& values) {
  auto* const to = reinterpret_cast<int32_t*>(take(static_cast<int64_t>(values.size() * sizeof(int32_t))));
  check(cudaMemcpy(to, values.data(), values.size() * sizeof(int32_t), cudaMemcpyHostToDevice), "numbers");
  return to;
}

void Bench::release() {
  fill(taken_);
  taken_ = 0;
}

std::byte* Bench::pinned(int64_t bytes) {
  if (bytes > pinned_bytes_) {
    pinned_.reset();
    pinned_ = std::make_unique<cuda::PinnedSlab>(bytes);
    pinned_bytes_ = bytes;
  }
  return pinned_->data();
}

int64_t Bench::used_bytes() const {
  check(cudaDeviceSynchronize(), "the GPU");
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(total - free);
}

Libraries& Bench::libraries() {
  if (!libraries_) libraries_ = std::make_unique<Libraries>();
  return *libraries_;
}

ncclComm_t Bench::communicator(int size) {
  const auto found = communicators_.find(size);
  if (found != communicators_.end()) return found->second;
  ncclComm_t comm = nullptr;
  if (size == ranks()) {
    ncclUniqueId id{};
    if (rank() == 0) cuda::check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    cuda::check(ncclCommInitRank(&comm, size, from_first(id), rank()), "ncclCommInitRank");
  } else {
    cuda::check(ncclCommSplit(communicator(ranks()), in_group(size) ? rank() / size : NCCL_SPLIT_NOCOLOR,
                              rank(), &comm, nullptr),
                "ncclCommSplit");
  }
  return communicators_[size] = comm;
}

cuda::PeerMemory& Bench::peer_memory() {
  if (!peer_memory_)
    peer_memory_ =
        std::make_unique<cuda::PeerMemory>(arena_.get(), std::vector{plan::Span{ranks(), 1}}, peers_);
  return *peer_memory_;
}

void Bench::begin(const Family& family) {
  if (taken_ > 0) release();  // of a family that had no time left
  family_ = family.name;
  until_ = Clock::now() + std::chrono::seconds(family.seconds);
  peers_.barrier();
}

bool Bench::more() {
  const bool more = from_first(Clock::now() < until_);
  if (!more && rank() == 0 && std::ranges::find(findings_.cut_short, family_) == findings_.cut_short.end())
    findings_.cut_short.push_back(family_);
  return more;
}

cudaEvent_t Bench::event(size_t index) {
  while (events_.size() <= index) check(cudaEventCreate(&events_.emplace_back()), "an event");
  return events_[index];
}

void Bench::heat(double seconds, cudaStream_t stream) {
  const int64_t half = kHeatBytes / 2;
  kernels::MatmulShape square;
  square.m = square.n = square.k = square.lda = square.ldb = square.ldc = kSquare;
  square.transpose_b = true;
  std::byte* const at = heat_.get();
  for (double passed = 0; passed < seconds; passed += kRoundSeconds) {
    libraries().matmul.run(square, at, at + half / 2, nullptr, at + half, heat_workspace_.get(), stream);
    for (int i = 0; i < kHeatCopies; ++i)
      check(cudaMemcpyAsync(at + half, at, static_cast<size_t>(half), cudaMemcpyDeviceToDevice, stream),
            "a copy");
  }
}

double Bench::largest_clock() const {
  int device = 0, kilohertz = 0;
  check(cudaGetDevice(&device), "the GPU");
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device), "the largest clock");
  return 1e3 * kilohertz;
}

void Bench::read_clock(size_t index, cudaStream_t stream) {
  ensure(index < kMostReadings, "there is room for the readings of the clock");
  auto* const to = reinterpret_cast<kernels::ClockReadings*>(clocks_.get()) + index;
  check(cudaMemsetAsync(to, 0, sizeof *to, stream), "a reading of the clock");
  kernels::read_clock(to, stream);
}

double Bench::clock_between(size_t first, size_t second) const {
  const auto* const from = reinterpret_cast<const kernels::ClockReadings*>(clocks_.get());
  std::array<kernels::ClockReadings, 2> read{};
  for (size_t i = 0; i < 2; ++i)
    check(cudaMemcpy(&read[i], from + (i == 0 ? first : second), sizeof read[i], cudaMemcpyDeviceToHost),
          "readings of the clock");
  return kernels::mean_clock(read[0], read[1]);
}

Seconds Bench::time(const Work& work, cudaStream_t stream, Runs runs, bool mine) {
  ensure(mine || rank() > 0, "rank 0 measures everything");
  const bool clocked = runs == Runs::clocked && sensor_,
             kernel = runs == Runs::warm || runs == Runs::clocked || runs == Runs::cold;
  double launching = 0, once = 0;  // of one run, by the host and by the device
  const auto run = [&](int repeats, int batch) {
    // Launches are ahead of the device, too, as they are in a step: else small work would take as long as its
    // launch.
    const double ahead = std::min(launching * repeats * batch, 0.1);
    heat(launching > 0 ? std::max(ahead, kHeatSeconds) : 0, stream);
    const Clock::time_point begin = Clock::now();
    for (int r = 0; r < repeats; ++r) {
      if (kernel && r > 0) heat(std::max(kRoundSeconds, once * batch), stream);
      if (runs == Runs::cold)
        check(cudaMemcpyAsync(heat_.get(), heat_.get() + kFlushBytes, static_cast<size_t>(kFlushBytes),
                              cudaMemcpyDeviceToDevice, stream),
              "what displaces the cache");
      const auto first = static_cast<size_t>(2 * r);
      if (clocked) read_clock(first, stream);
      check(cudaEventRecord(event(first), stream), "an event");
      for (int i = 0; i < batch; ++i) work(stream);
      check(cudaEventRecord(event(first + 1), stream), "an event");
      if (clocked) read_clock(first + 1, stream);
    }
    launching = std::chrono::duration<double>(Clock::now() - begin).count() / (repeats * batch);
    check(cudaStreamSynchronize(stream), "a benchmark");
    const double largest = clocked ? largest_clock() : 1;
    Seconds all;
    for (int r = 0; r < repeats; ++r) {
      const auto first = static_cast<size_t>(2 * r);
      const double clock = clocked ? clock_between(first, first + 1) / largest : 1;
      ensure(clock > 0, "the clock was read before and behind");
      all.push_back(std::max(1e-9, clock * seconds_between(event(first), event(first + 1)) / batch));
    }
    return all;
  };
  if (mine) run(1, 1), launching = 0, once = run(1, 1)[0];  // plans and connections are made by the first
  const bool several = runs == Runs::warm || runs == Runs::clocked || runs == Runs::in_a_row;
  const int batch = from_first(several ? static_cast<int>(std::clamp(kBatchSeconds / once, 1.0, 20.0)) : 1),
            repeats = from_first(
                static_cast<int>(std::clamp(kPointSeconds / (once * batch), 3.0, double{kMostRepeats})));
  return mine ? run(repeats, batch) : Seconds();
}

Seconds Bench::again(const Job& job, bool mine, double window) {
  peers_.barrier();
  if (!mine) return {};
  const auto runs = static_cast<size_t>(std::clamp(std::ceil(window / job.alone), 4.0, kMostRuns));
  for (size_t i = 0; i <= runs; ++i) {
    if (i > 0) job.work(job.stream);
    check(cudaEventRecord(event(i), job.stream), "an event");
  }
  check(cudaStreamSynchronize(job.stream), "a benchmark");
  Seconds all;
  for (size_t i = 2; i <= runs; ++i) all.push_back(std::max(1e-9, seconds_between(event(i - 1), event(i))));
  return all;
}

std::pair<Seconds, Seconds> Bench::beside(const Job& a, const Job& b, bool mine, double window) {
  peers_.barrier();
  if (!mine) return {};
  const std::array<const Job*, 2> jobs{&a, &b};
  std::array<std::vector<cudaEvent_t>, 2> marks;  // of each: begin, and the end of every run
  std::array<int, 2> runs{};
  size_t used = 0;
  for (size_t j = 0; j < 2; ++j) {
    runs[j] = static_cast<int>(std::clamp(std::ceil(window / jobs[j]->alone), 4.0, kMostRuns));
    for (int i = 0; i <= runs[j]; ++i) marks[j].push_back(event(used++));
  }
  const auto record = [&](size_t j, int i) {
    check(cudaEventRecord(marks[j][static_cast<size_t>(i)], jobs[j]->stream), "an event");
  };
  heat(kHeatSeconds, a.stream);
  record(0, 0);
  check(cudaStreamWaitEvent(b.stream, marks[0][0], 0), "an event");
  record(1, 0);
  // In the order in which they will run, as far as the host can tell.
  for (std::array<int, 2> done{}; done[0] < runs[0] || done[1] < runs[1];) {
    const size_t j = done[1] * runs[0] < done[0] * runs[1] ? 1 : 0;
    jobs[j]->work(jobs[j]->stream);
    record(j, ++done[j]);
  }
  for (const Job* job : jobs) check(cudaStreamSynchronize(job->stream), "a benchmark");
  std::array<std::vector<double>, 2> at;  // seconds after the first mark
  for (size_t j = 0; j < 2; ++j)
    for (cudaEvent_t mark : marks[j]) at[j].push_back(seconds_between(marks[0][0], mark));
  const double end = std::min(at[0].back(), at[1].back());
  std::array<Seconds, 2> of;
  for (size_t j = 0; j < 2; ++j)
    for (size_t i = 1; i < at[j].size(); ++i)  // the first one begins without the other
      if (i > 1 && at[j][i] <= end) of[j].push_back(std::max(1e-9, at[j][i] - at[j][i - 1]));
  return {of[0], of[1]};
}

std::pair<std::vector<double>, std::vector<double>> Bench::slowdowns(const Job& kernel, const Job& transfer) {
  struct Round {
    std::vector<cudaEvent_t> alone, beside;  // of the kernel: begin, and the end of every run
    std::array<cudaEvent_t, 2> transfer_alone{}, transfer_beside{};
  };
  const auto runs = [&](double seconds) {
    return static_cast<int>(std::clamp(std::ceil(seconds / kernel.alone), 2.0, 80.0));
  };
  const int alone = runs(kAloneSeconds), beside = runs(kCover * transfer.alone);
  std::vector<Round> rounds(kRounds);
  size_t used = 0;
  const auto mark = [&](cudaStream_t stream) {
    cudaEvent_t const one = event(used++);
    check(cudaEventRecord(one, stream), "an event");
    return one;
  };
  const auto run = [&](const Job& job, int count) {
    std::vector<cudaEvent_t> marks{mark(job.stream)};
    for (int i = 0; i < count; ++i) job.work(job.stream), marks.push_back(mark(job.stream));
    return marks;
  };
  const auto wait = [](cudaStream_t stream, cudaEvent_t one) {
    check(cudaStreamWaitEvent(stream, one, 0), "an event");
  };
  peers_.barrier();
  heat(kHeatSeconds, kernel.stream);
  for (Round& round : rounds) {
    heat(2 * kRoundSeconds, kernel.stream);
    round.alone = run(kernel, alone);
    wait(transfer.stream, round.alone.back());
    transfer.work(transfer.stream);  // after which all ranks are at the same place
    const std::vector<cudaEvent_t> once = run(transfer, 1);
    round.transfer_alone = {once[0], once[1]};
    cudaEvent_t const begin = mark(transfer.stream);
    transfer.work(transfer.stream);
    round.transfer_beside = {begin, mark(transfer.stream)};
    wait(kernel.stream, begin);
    round.beside = run(kernel, beside);
    wait(kernel.stream, round.transfer_beside[1]);
  }
  for (const Job* job : {&kernel, &transfer}) check(cudaStreamSynchronize(job->stream), "a benchmark");
  const auto between = [](cudaEvent_t from, cudaEvent_t to) {
    return std::max(1e-9, seconds_between(from, to));
  };
  Seconds of_kernel, of_kernel_beside, of_transfer, of_transfer_beside;
  for (const Round& round : rounds) {
    for (size_t i = 1; i < round.alone.size(); ++i)
      of_kernel.push_back(between(round.alone[i - 1], round.alone[i]));
    of_transfer.push_back(between(round.transfer_alone[0], round.transfer_alone[1]));
    const double lasted = between(round.transfer_beside[0], round.transfer_beside[1]);
    const auto after_begin = [&](cudaEvent_t one) { return between(round.transfer_beside[0], one); };
    if (after_begin(round.beside.back()) >= lasted) of_transfer_beside.push_back(lasted);
    for (size_t i = 1; i < round.beside.size() && after_begin(round.beside[i]) <= lasted; ++i)
      of_kernel_beside.push_back(between(round.beside[i - 1], round.beside[i]));
  }
  const auto over = [](Seconds these, const Seconds& those) {
    const double one = median(those);
    for (double& seconds : these) seconds /= one;
    return these;
  };
  return {over(of_kernel_beside, of_kernel), over(of_transfer_beside, of_transfer)};
}

std::vector<std::vector<double>> Bench::by_rank(const std::vector<double>& values) {
  std::vector<std::vector<double>> all;
  for (const std::vector<std::byte>& one : peers_.gather(std::as_bytes(std::span(values)))) {
    std::vector<double>& own = all.emplace_back(one.size() / sizeof(double));
    if (!one.empty()) std::memcpy(own.data(), one.data(), one.size());
  }
  return all;
}

std::vector<double> Bench::at_first(const std::vector<double>& values) {
  std::vector<double> all;
  for (const std::vector<double>& own : by_rank(values)) all.insert(all.end(), own.begin(), own.end());
  return all;
}

double Bench::agreed(const Seconds& seconds) {
  const std::vector<double> all = at_first(seconds);
  return from_first(median(all));
}

void Bench::point(const std::string& table, const std::string& what, std::vector<double> at, double amount,
                  const Seconds& seconds) {
  ensure(std::ranges::find(cluster::optional_tables(), table) != cluster::optional_tables().end(),
         "a cluster has the table");
  std::vector<std::vector<double>> rates = by_rank(seconds);
  if (rank() != 0) return;  // it measures everything
  for (std::vector<double>& own : rates)
    for (double& value : own) value = amount / value;
  FoundTable& found = findings_.tables[table];
  found.what = what;
  found.points.emplace_back(std::move(at), slowest(rates));
}

void Bench::figure(const std::string& name, const std::string& what, const std::vector<double>& values) {
  std::vector<double> all = at_first(values);
  for (double& value : all) value = std::max(0.0, value);  // memory that was given back meanwhile
  if (rank() == 0 && !all.empty()) keep(name, what, reading_of(all));
}

void Bench::figure(const std::string& name, const std::string& what, const Rates& rates) {
  if (const std::optional<Reading> found = reading(rates)) keep(name, what, *found);
}

std::optional<Reading> Bench::reading(const Rates& rates) {
  const Rates all{at_first(rates.mean), at_first(rates.shown)};
  return rank() == 0 && !all.mean.empty() ? std::optional(mean_of(all)) : std::nullopt;
}

void Bench::keep(const std::string& name, const std::string& what, const Reading& reading) {
  const auto& more = cluster::optional_figures();
  ensure(std::ranges::find(cluster::kFigures, name) != cluster::kFigures.end() ||
             std::ranges::find(more, name) != more.end(),
         "a cluster has the figure");
  findings_.figures[name] = {reading, what};
}

}  // namespace mop::calibrate
