#include "sim/cli/stop_on_signal.h"

namespace mop::cli {

std::atomic<bool> StopOnSignal::stop = false;

StopOnSignal::StopOnSignal() {
  stop = false;
  struct sigaction action = {};
  action.sa_handler = [](int) {
    stop = true;
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
  };
  sigaction(SIGINT, &action, &before_int_);
  sigaction(SIGTERM, &action, &before_term_);
}

StopOnSignal::~StopOnSignal() {
  sigaction(SIGINT, &before_int_, nullptr);
  sigaction(SIGTERM, &before_term_, nullptr);
}

}  // namespace mop::cli
