// The streams of one rank: a thread and a ring of commands each, and the events between them.
#pragma once
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "exec/cpu/thread.h"
#include "exec/interpreter/backend.h"

namespace mop::cpu {

using program::Stream;

// Allocates nothing after construction and reserve(). Every wait ends with Aborted, or the thread that waits,
// when `aborted` was set and wake() called.
class Queues {
 public:
  using Execute = std::function<void(const interpreter::Launch&)>;  // throws nothing

  // used: by stream. commands: that a stream's ring holds; the host waits while it is full.
  Queues(const std::array<bool, program::kStreams>& used, size_t commands, const std::atomic<bool>& aborted,
         const Execute& execute);
  // Finishes what was issued unless `aborted` was set: set it where that may wait for other ranks for ever.
  ~Queues();

  void reserve(uint32_t events);
  void launch(Stream stream, const interpreter::Launch& launch);
  void record(Stream stream, uint32_t event);
  void wait(Stream stream, uint32_t event);
  void wait_on_host(uint32_t event);
  void synchronize();

  void wake();
  void join();  // once aborted

 private:
  static constexpr size_t kStackBytes = size_t{64} << 20;
  static constexpr uint32_t kNoEvent = 0xffffffff;

  struct Command {
    enum class Kind : uint8_t { launch, record, wait } kind = Kind::launch;
    uint32_t event = 0;
    int64_t count = 0;  // of records of the event, this one included or to wait for
    interpreter::Launch launch;
  };
  struct Queue {
    std::vector<Command> ring;
    uint64_t head = 0, tail = 0;    // commands finished, issued
    uint32_t waits_for = kNoEvent;  // while the thread waits for one
    std::condition_variable changed;
    std::unique_ptr<Thread> thread;  // none: the stream is not used
  };
  void work(Queue& queue);
  void stop();
  template <typename Fill>
  void issue(Stream stream, Fill fill);
  template <typename Ready>
  void host_waits(std::unique_lock<std::mutex>& lock, Ready ready);

  const std::atomic<bool>& aborted_;
  const Execute execute_;
  std::mutex mutex_;  // guards all that follows, but for a ring's commands between issue and finish
  std::condition_variable host_;
  bool stopping_ = false;
  std::vector<int64_t> recorded_, completed_;  // by event: records issued, completed
  std::array<Queue, program::kStreams> queues_;
};

}  // namespace mop::cpu
