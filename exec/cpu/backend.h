// The CPU backend: all ranks of a run in one process. A rank has a host thread, which walks its program, and
// a thread for each stream that the program uses.
#pragma once
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "exec/cpu/meeting.h"
#include "exec/cpu/queue.h"
#include "exec/interpreter/checks.h"
#include "sim/program/timeline.h"

namespace mop::cpu {

// What executes operations: run and run_collective of kernels.h with their workspaces. A (rank, stream) calls
// from one thread at a time. What they throw aborts the world.
struct Kernels {
  std::function<void(int rank, Stream stream, const interpreter::Launch& launch)> run;
  std::function<void(int rank, Stream stream, const interpreter::Launch& launch, Meeting& meeting)>
      run_collective;
  // Rounds that a finished plan_routing asks for; the world makes at least 1 of it.
  std::function<int64_t(const Call& plan)> rounds;
};

struct WorldOptions {
  size_t commands = 1024;  // that a stream may be behind its host thread
  size_t trace_spans = 0;  // operations of each stream that a trace has room for; 0: no trace
  std::vector<interpreter::Checks*> checks;  // by rank; empty: none
};

// After a failure on any rank every thread leaves its waits, and the world can only be destroyed.
class World {
 public:
  // programs: by rank; they outlive the world. Ranks whose operations have the same group and stream share a
  // communicator. Errors: InternalError when a group's ranks do not have it in their programs.
  World(const std::vector<const program::StepProgram*>& programs, Kernels kernels, WorldOptions options = {});
  // Drops what has not run yet: synchronize first.
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int ranks() const { return static_cast<int>(ranks_.size()); }
  interpreter::Backend& backend(int rank);  // to be used inside of run, but for its construction

  // Calls body(rank) on every rank's host thread and waits for all. Errors: the first one of any rank, be it
  // in a body or in a kernel, with rank and operation: UserError stays one, everything else is an
  // InternalError. No kernel runs any more then. Called from one thread at a time.
  void run(const std::function<void(int rank)>& body);

  // What a rank executed since the last clear_trace(), stream by stream, in nanoseconds of the steady clock.
  // A collective starts when all have come. Between runs that synchronized.
  std::vector<program::OpSpan> trace(int rank) const;
  int64_t untraced() const;  // operations for which there was no room, all ranks
  void clear_trace();

 private:
  struct Rank;
  struct Track {  // of one stream
    std::vector<program::OpSpan> spans;
    int64_t untraced = 0;
  };

  void make_rooms();
  void host(Rank& rank);
  void execute(Rank& rank, const interpreter::Launch& launch);
  void fail(std::exception_ptr error);
  template <typename Work>
  void guarded(const Rank& rank, const Call* call, Work work);
  void abort();
  void stop();

  const Kernels kernels_;
  const WorldOptions options_;
  std::atomic<bool> aborted_ = false;
  std::vector<std::unique_ptr<Room>> rooms_;

  mutable std::mutex mutex_;  // guards what follows up to ranks_
  std::condition_variable job_, done_;
  const std::function<void(int rank)>* body_ = nullptr;
  int64_t jobs_ = 0;  // given so far
  int at_work_ = 0;   // host threads
  bool stopping_ = false;
  std::exception_ptr error_;  // the first

  std::vector<std::unique_ptr<Rank>> ranks_;
};

}  // namespace mop::cpu
