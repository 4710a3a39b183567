#include "exec/host/workers.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <csignal>
#include <cstring>

namespace mop::host {
namespace {

constexpr int64_t kPage = 4096;

void pin_to(int core) {
  const size_t bytes = CPU_ALLOC_SIZE(core + 1);
  cpu_set_t* const set = CPU_ALLOC(core + 1);
  if (set == nullptr) return;
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(core, bytes, set);
  pthread_setaffinity_np(pthread_self(), bytes, set);
  CPU_FREE(set);
}

// Of this process among those of its host.
std::atomic<int> g_index = 0, g_processes = 1;

void make_denormals_zero() {
#ifdef __SSE__
  constexpr unsigned kResults = 0x8000, kOperands = 0x40;
  _mm_setcsr(_mm_getcsr() | kResults | kOperands);
#endif
}

}  // namespace

std::vector<int> cores_of_process() {
  // Not of the calling thread, which may be pinned already. The system refuses sets smaller than its own.
  for (int most = 1024; most <= 1 << 20; most *= 2) {
    const size_t bytes = CPU_ALLOC_SIZE(most);
    cpu_set_t* const set = CPU_ALLOC(most);
    if (set == nullptr) break;
    CPU_ZERO_S(bytes, set);
    std::vector<int> cores;
    const bool known = sched_getaffinity(getpid(), bytes, set) == 0;
    for (int core = 0; known && core < most; ++core)
      if (CPU_ISSET_S(core, bytes, set)) cores.push_back(core);
    CPU_FREE(set);
    if (known) return cores;
  }
  return {};
}

std::vector<int> share_of(const std::vector<int>& cores, int index, int processes) {
  if (cores.empty()) return {};
  const auto n = static_cast<int64_t>(cores.size());
  const Range part = part_of(n, 1, index, processes);
  if (part.begin == part.end) return {cores[static_cast<size_t>(index % n)]};  // more processes than cores
  return {cores.begin() + part.begin, cores.begin() + part.end};
}

Workers::Workers(std::vector<int> cores) {
  if (cores.empty()) cores.push_back(-1);
  threads_.reserve(cores.size());
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all,
                  &before);  // new threads inherit it: signals are the main thread's business
  for (int thread = 0; thread < static_cast<int>(cores.size()); ++thread)
    threads_.emplace_back([this, thread, core = cores[static_cast<size_t>(thread)]] {
      if (core >= 0) pin_to(core);
      make_denormals_zero();
      serve(thread);
    });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Workers::~Workers() {
  work_ = nullptr;
  calls_.fetch_add(1, std::memory_order_release);
  calls_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Workers& Workers::of_process() {
  static Workers workers([] {
    std::vector<int> cores = share_of(cores_of_process(), g_index, g_processes);
    if (cores.size() > 1) cores.erase(cores.begin());
    return cores;
  }());
  return workers;
}

void Workers::share_cores(int index, int processes) {
  g_index = index;
  g_processes = processes;
}

void Workers::run_all(Work work, const void* body) {
  const std::lock_guard turn(turn_);
  work_ = work;
  body_ = body;
  running_.store(count(), std::memory_order_relaxed);
  calls_.fetch_add(1, std::memory_order_release);
  calls_.notify_all();
  for (int left = count(); left > 0; left = running_.load(std::memory_order_acquire))
    running_.wait(left, std::memory_order_acquire);
}

void Workers::serve(int thread) {
  for (uint32_t served = 0;; ++served) {  // none is missed: a call ends when every thread has served it
    calls_.wait(served, std::memory_order_acquire);
    if (work_ == nullptr) return;
    work_(body_, thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

void first_touch(Workers& workers, void* memory, int64_t bytes) {
  workers.run([&](int thread) {
    const Range part = part_of(bytes, kPage, thread, workers.count());
    std::memset(static_cast<std::byte*>(memory) + part.begin, 0, static_cast<size_t>(part.end - part.begin));
  });
}

}  // namespace mop::host
