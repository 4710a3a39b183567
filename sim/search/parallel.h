// Independent pieces of work on several threads.
#pragma once
#include <atomic>
#include <cstddef>
#include <functional>

namespace mop::search {

// Calls work(0) .. work(count - 1) on `jobs` threads, and meanwhile() on the calling one: twice a second and
// once when all is done. Raising `stop` leaves out what has not begun. Errors: what either throws ends the
// rest and is thrown here.
void parallel(size_t count, unsigned jobs, const std::atomic<bool>& stop,
              const std::function<void(size_t)>& work, const std::function<void()>& meanwhile);

unsigned all_cores();

}  // namespace mop::search
