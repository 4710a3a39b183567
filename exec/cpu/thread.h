// A thread with a stack of a chosen size that takes no signals: Ctrl-C is the main thread's business.
#pragma once
#include <pthread.h>

#include <cstddef>
#include <functional>

namespace mop::cpu {

class Thread {
 public:
  // Errors: UserError when the system starts no more threads.
  Thread(std::function<void()> body, size_t stack_bytes);
  ~Thread() { join(); }
  Thread(const Thread&) = delete;
  Thread& operator=(const Thread&) = delete;
  void join();  // at once when already joined

 private:
  std::function<void()> body_;
  pthread_t thread_{};
  bool running_ = false;
};

}  // namespace mop::cpu
