#include "exec/cpu/queue.h"

#include "exec/cpu/meeting.h"
#include "sim/base/error.h"

namespace mop::cpu {

using interpreter::Launch;

Queues::Queues(const std::array<bool, program::kStreams>& used, size_t commands,
               const std::atomic<bool>& aborted, const Execute& execute)
    : aborted_(aborted), execute_(execute) {
  for (size_t s = 0; s < used.size(); ++s)
    if (used[s]) queues_[s].ring.resize(commands);
  try {
    for (size_t s = 0; s < used.size(); ++s)
      if (used[s]) queues_[s].thread = std::make_unique<Thread>([this, s] { work(queues_[s]); }, kStackBytes);
  } catch (...) {
    stop();
    throw;
  }
}

Queues::~Queues() {
  stop();
}

void Queues::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    for (Queue& queue : queues_) queue.changed.notify_one();
  }
  join();
}

void Queues::join() {
  for (Queue& queue : queues_)
    if (queue.thread) queue.thread->join();
}

void Queues::wake() {
  const std::lock_guard lock(mutex_);
  for (Queue& queue : queues_) queue.changed.notify_one();
  host_.notify_one();
}

void Queues::reserve(uint32_t events) {
  const std::lock_guard lock(mutex_);
  recorded_.assign(events, 0);
  completed_.assign(events, 0);
}

void Queues::launch(Stream stream, const Launch& launch) {
  issue(stream, [&](Command& command) {
    command.kind = Command::Kind::launch;
    command.launch = launch;
  });
}

void Queues::record(Stream stream, uint32_t event) {
  issue(stream, [&](Command& command) {
    command.kind = Command::Kind::record;
    command.event = event;
    command.count = ++recorded_[event];
  });
}

void Queues::wait(Stream stream, uint32_t event) {
  issue(stream, [&](Command& command) {
    command.kind = Command::Kind::wait;
    command.event = event;
    command.count = recorded_[event];
  });
}

void Queues::wait_on_host(uint32_t event) {
  std::unique_lock lock(mutex_);
  host_waits(lock, [&] { return completed_[event] >= recorded_[event]; });
}

void Queues::synchronize() {
  std::unique_lock lock(mutex_);
  for (const Queue& queue : queues_) host_waits(lock, [&] { return queue.head == queue.tail; });
}

template <typename Fill>
void Queues::issue(Stream stream, Fill fill) {
  Queue& queue = queues_[static_cast<size_t>(stream)];
  std::unique_lock lock(mutex_);
  ensure(queue.thread != nullptr, "a stream that is used has a thread");
  host_waits(lock, [&] { return queue.tail - queue.head < queue.ring.size(); });
  fill(queue.ring[queue.tail % queue.ring.size()]);
  if (queue.tail++ == queue.head) queue.changed.notify_one();
}

template <typename Ready>
void Queues::host_waits(std::unique_lock<std::mutex>& lock, Ready ready) {
  host_.wait(lock, [&] { return aborted_ || ready(); });
  if (aborted_) throw Aborted{};
}

void Queues::work(Queue& queue) {
  std::unique_lock lock(mutex_);
  for (;;) {
    queue.changed.wait(lock, [&] { return aborted_ || queue.head != queue.tail || stopping_; });
    if (aborted_ || queue.head == queue.tail) return;
    const Command& command = queue.ring[queue.head % queue.ring.size()];
    switch (command.kind) {
      case Command::Kind::launch:
        lock.unlock();
        execute_(command.launch);
        lock.lock();
        break;
      case Command::Kind::record:
        completed_[command.event] = command.count;
        for (Queue& other : queues_)
          if (other.waits_for == command.event) other.changed.notify_one();
        break;
      case Command::Kind::wait:
        queue.waits_for = command.event;
        queue.changed.wait(lock, [&] { return aborted_ || completed_[command.event] >= command.count; });
        queue.waits_for = kNoEvent;
        break;
    }
    ++queue.head;
    host_.notify_one();
  }
}

}  // namespace mop::cpu
