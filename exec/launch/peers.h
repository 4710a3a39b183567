// The processes of a run, and what they say to one another over TCP before, between and after steps: NCCL's
// ids, a plan, parts of a checkpoint. Nothing of a step itself passes here.
#pragma once
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "exec/launch/place.h"

namespace mop::launch {

// All calls but rank(), size() and abandon() are collective: every process makes them in the same order, and
// one thread at a time.
class Peers {
 public:
  // Waits until everybody is done with theirs. Where an exception destroys them, does not: the others take
  // this process for lost.
  virtual ~Peers() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // What process 0 gives, to everyone.
  virtual std::vector<std::byte> broadcast(std::span<const std::byte> bytes) = 0;
  // At process 0: what each gives, by rank; elsewhere nothing.
  virtual std::vector<std::vector<std::byte>> gather(std::span<const std::byte> bytes) = 0;
  virtual void barrier() = 0;
  // Another one between the same processes, for another thread. Lives no longer than this.
  virtual std::unique_ptr<Peers> channel() = 0;
  // Ends this process with the status and all others with 1, as if it were lost, but the one message is
  // "mop: rank 2: reason". For errors that one process has, or all: the first is told. From any thread.
  // Flushes standard output, and nothing else.
  [[noreturn]] virtual void abandon(const std::string& reason, int status = 2) = 0;
};

// Of bytes that were said as text.
inline std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// What each process gives, by rank, to everyone. Collective.
template <class T>
std::vector<T> everyones(Peers& peers, const T& own) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<std::byte> all;
  for (const std::vector<std::byte>& one : peers.gather(std::as_bytes(std::span(&own, 1))))
    all.insert(all.end(), one.begin(), one.end());
  const std::vector<std::byte> heard = peers.broadcast(all);
  std::vector<T> values(static_cast<size_t>(peers.size()));
  std::memcpy(values.data(), heard.data(), heard.size());
  return values;
}

// A run of one process.
std::unique_ptr<Peers> alone();

// Meets the other processes of the run at place.address. Process 0 listens there. From here on until the
// Peers are gone a process that ends, hangs up or stops answering ends all others within 30 seconds: each
// exits with status 1, and one message on standard error names the rank that was lost (of spawned processes
// the parent tells it, spawn.h). Errors: UserError when not everybody has come after `seconds` (says who is
// missing), or an address that cannot be used.
std::unique_ptr<Peers> connect(const Place& place, int seconds = 120);

}  // namespace mop::launch
