#include "sim/search/parallel.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mop::search {

void parallel(size_t count, unsigned jobs, const std::atomic<bool>& stop,
              const std::function<void(size_t)>& work, const std::function<void()>& meanwhile) {
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::exception_ptr failure;
  size_t working = std::min<size_t>(std::max(1u, jobs), count);

  const auto loop = [&] {
    for (size_t index; !stop && !failed && (index = next++) < count;) {
      try {
        work(index);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failure = std::current_exception();
        failed = true;
      }
    }
    const std::lock_guard lock(mutex);
    --working;
    changed.notify_one();
  };
  std::vector<std::jthread> threads;
  for (size_t i = working; i > 0; --i) threads.emplace_back(loop);

  try {
    for (bool more = true; more;) {
      {
        std::unique_lock lock(mutex);
        more = !changed.wait_for(lock, std::chrono::milliseconds(500), [&] { return working == 0; });
      }
      meanwhile();
    }
  } catch (...) {
    failed = true;
    throw;
  }
  if (failure) std::rethrow_exception(failure);
}

unsigned all_cores() {
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace mop::search
