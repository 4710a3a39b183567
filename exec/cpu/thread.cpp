#include "exec/cpu/thread.h"

#include <fmt/format.h>

#include <csignal>
#include <cstring>
#include <utility>

#include "sim/base/error.h"

namespace mop::cpu {

Thread::Thread(std::function<void()> body, size_t stack_bytes) : body_(std::move(body)) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, stack_bytes);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // the new thread inherits it
  const auto enter = [](void* self) -> void* {
    static_cast<Thread*>(self)->body_();
    return nullptr;
  };
  const int error = pthread_create(&thread_, &attributes, enter, this);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  if (error != 0)
    throw UserError(fmt::format("a thread cannot be started ({}): run fewer ranks in this process",
                                std::strerror(error)));
  running_ = true;
}

void Thread::join() {
  if (!running_) return;
  running_ = false;
  pthread_join(thread_, nullptr);
}

}  // namespace mop::cpu
