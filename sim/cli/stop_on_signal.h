// Long work that Ctrl-C ends at a good place.
#pragma once
#include <atomic>
#include <csignal>

namespace mop::cli {

// While it lives, Ctrl-C and a polite kill raise `stop` instead of ending the process; a second one ends it.
// One at a time.
class StopOnSignal {
 public:
  StopOnSignal();
  ~StopOnSignal();
  StopOnSignal(const StopOnSignal&) = delete;
  StopOnSignal& operator=(const StopOnSignal&) = delete;

  static std::atomic<bool> stop;

 private:
  struct sigaction before_int_ = {}, before_term_ = {};
};

}  // namespace mop::cli
