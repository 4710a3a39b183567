// Threads for work that memory bounds: one a core and pinned to it, asleep between calls. Thread t of T
// always gets the t-th part, so that pages stay on the memory node of the thread that touched them first.
// Denormal numbers are zero to them (on x86): arithmetic on such numbers takes a hundred times as long, and
// moments of experts that no token reaches decay to them (AdamW on nothing else: an eighth of the speed).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace mop::host {

// Cores that the process (its main thread) may run on, ascending; empty where the system does not say.
std::vector<int> cores_of_process();
// The part of process `index` of `processes` that may all run on these cores; at least one of them.
std::vector<int> share_of(const std::vector<int>& cores, int index, int processes);

class Workers {
 public:
  // A thread for each of the cores, at least one. A thread that may not be pinned runs anywhere.
  explicit Workers(std::vector<int> cores);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // On all cores of the process but the first, which stays with the threads that launch. Started by the first
  // call.
  static Workers& of_process();
  // Before that call, where several processes of a host may run on the same cores (torchrun binds none): this
  // one keeps to its share.
  static void share_cores(int index, int processes);

  int count() const { return static_cast<int>(threads_.size()); }

  // body(thread) on every thread; returns when all are done. Calls from several threads take turns. body
  // neither throws nor calls run. Allocates nothing.
  template <class F>
  void run(const F& body) {
    run_all([](const void* f, int thread) { (*static_cast<const F*>(f))(thread); }, &body);
  }

 private:
  using Work = void (*)(const void* body, int thread);
  void run_all(Work work, const void* body);
  void serve(int thread);

  std::mutex turn_;
  Work work_ = nullptr;  // null: the end
  const void* body_ = nullptr;
  std::atomic<uint32_t> calls_ = 0;
  std::atomic<int> running_ = 0;
  std::vector<std::thread> threads_;
};

struct Range {
  int64_t begin, end;
};

// Part `part` of `parts` of [0, n); borders between parts lie at multiples of `grain`.
inline Range part_of(int64_t n, int64_t grain, int part, int parts) {
  const int64_t grains = (n + grain - 1) / grain;
  const auto border = [&](int64_t p) { return std::min(n, grains * p / parts * grain); };
  return {border(part), border(part + 1)};
}

// Zeroes the bytes, each part by its thread: memory that nobody touched before then lies where adam
// (exec/host/adam.h) works on it, if this is called for every array by itself: each of a block's master, m
// and v, gradients, weights.
void first_touch(Workers& workers, void* memory, int64_t bytes);

}  // namespace mop::host
