#include "exec/cpu/backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <tuple>
#include <utility>

#include "sim/base/error.h"

namespace mop::cpu {

using interpreter::Launch;
using program::Op;
using program::OpId;
using program::StepProgram;

namespace {

constexpr size_t kHostStackBytes = size_t{8} << 20;

int64_t now() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

}  // namespace

struct World::Rank final : interpreter::Backend {
  Rank(World& w, int r, const StepProgram& p) : world(w), rank(r), program(p) {}

  void reserve(uint32_t events) override { queues->reserve(events); }
  void launch(Stream stream, const Launch& launch) override { queues->launch(stream, launch); }
  void record(Stream stream, uint32_t event) override { queues->record(stream, event); }
  void wait(Stream stream, uint32_t event) override { queues->wait(stream, event); }
  int64_t rounds(uint32_t event, const Call& plan) override {
    queues->wait_on_host(event);
    return std::max<int64_t>(1, world.kernels_.rounds(plan));
  }
  void synchronize() override { queues->synchronize(); }

  World& world;
  const int rank;
  const StepProgram& program;
  std::vector<std::unique_ptr<Seat>> seats;
  std::vector<Seat*> seat_of;  // by operation; of collectives
  std::array<Track, program::kStreams> tracks;
  std::unique_ptr<Queues> queues;
  std::unique_ptr<Thread> host;
};

World::World(const std::vector<const StepProgram*>& programs, Kernels kernels, WorldOptions options)
    : kernels_(std::move(kernels)), options_(std::move(options)) {
  ensure(options_.checks.empty() || options_.checks.size() == programs.size(),
         "every rank has checks or none");
  for (size_t r = 0; r < programs.size(); ++r)
    ranks_.push_back(std::make_unique<Rank>(*this, static_cast<int>(r), *programs[r]));
  make_rooms();
  try {
    for (const auto& rank : ranks_) {
      std::array<bool, program::kStreams> used{};
      for (const Op& op : rank->program.ops) used[static_cast<size_t>(op.stream)] = true;
      for (size_t s = 0; s < used.size(); ++s)
        if (used[s]) rank->tracks[s].spans.reserve(options_.trace_spans);
      rank->queues = std::make_unique<Queues>(used, options_.commands, aborted_,
                                              [this, r = rank.get()](const Launch& l) { execute(*r, l); });
    }
    for (const auto& rank : ranks_)
      rank->host = std::make_unique<Thread>([this, r = rank.get()] { host(*r); }, kHostStackBytes);
  } catch (...) {
    stop();
    throw;
  }
}

World::~World() {
  stop();
}

// Communicators of different streams are different ones, even where they are one group: two streams of a rank
// may then be in collectives at the same time, in whatever order.
void World::make_rooms() {
  using Key = std::tuple<uint16_t, Stream, int64_t, int64_t, int64_t>;  // group, stream, base, size, stride
  struct Shared {
    Room* room;
    int seated;
  };
  std::map<Key, Shared> shared;
  const auto make = [&](int64_t size) {
    return rooms_.emplace_back(std::make_unique<Room>(static_cast<int>(size), aborted_)).get();
  };
  for (const auto& rank : ranks_) {
    std::map<std::pair<uint16_t, Stream>, Seat*> own;
    for (const Op& op : rank->program.ops) {
      if (!program::is_collective(op.kind)) {
        rank->seat_of.push_back(nullptr);
        continue;
      }
      Seat*& seat = own[{op.group, op.stream}];
      rank->seat_of.push_back(seat);
      if (seat != nullptr) continue;
      Room* room = nullptr;
      int64_t index = 0;
      if (op.group == program::kNoGroup) {
        room = make(1);
      } else {
        const program::Group& group = rank->program.groups[op.group];
        index = group.span().index(rank->rank);
        Shared& known =
            shared[{op.group, op.stream, rank->rank - index * group.stride, group.size, group.stride}];
        if (known.room == nullptr) known.room = make(group.size);
        ++known.seated;
        room = known.room;
      }
      seat = rank->seats.emplace_back(std::make_unique<Seat>(*room, static_cast<int>(index))).get();
      rank->seat_of.back() = seat;
    }
  }
  for (const auto& [key, known] : shared)
    ensure(known.seated == known.room->size(), "every rank of a group has it in its program");
}

interpreter::Backend& World::backend(int rank) {
  return *ranks_[static_cast<size_t>(rank)];
}

void World::run(const std::function<void(int rank)>& body) {
  std::unique_lock lock(mutex_);
  if (!error_) {
    body_ = &body;
    at_work_ = ranks();
    ++jobs_;
    job_.notify_all();
    done_.wait(lock, [&] { return at_work_ == 0; });
  }
  if (!error_) return;
  lock.unlock();
  // Kernels that were running may take a while; after that nothing touches the arenas any more.
  for (const auto& rank : ranks_) rank->queues->join();
  std::rethrow_exception(error_);
}

void World::host(Rank& rank) {
  int64_t done = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    job_.wait(lock, [&] { return stopping_ || jobs_ != done; });
    if (stopping_) return;
    done = jobs_;
    const std::function<void(int)>& body = *body_;
    lock.unlock();
    guarded(rank, nullptr, [&] { body(rank.rank); });
    lock.lock();
    if (--at_work_ == 0) done_.notify_one();
  }
}

void World::execute(Rank& rank, const Launch& launch) {
  const Op& op = *launch.call.op;
  guarded(rank, &launch.call, [&] {
    interpreter::Checks* const checks =
        options_.checks.empty() ? nullptr : options_.checks[static_cast<size_t>(rank.rank)];
    if (checks != nullptr) checks->before(launch);
    Seat* const seat = rank.seat_of[launch.call.id];
    if (seat != nullptr) seat->enter(launch.call);
    const int64_t start = now();
    if (seat != nullptr)
      kernels_.run_collective(rank.rank, op.stream, launch, *seat);
    else
      kernels_.run(rank.rank, op.stream, launch);
    const int64_t end = now();
    if (checks != nullptr) checks->after(launch);
    Track& track = rank.tracks[static_cast<size_t>(op.stream)];
    if (track.spans.size() < options_.trace_spans)
      track.spans.push_back({launch.call.id, start, end, end - start});
    else
      ++track.untraced;
  });
}

template <typename Work>
void World::guarded(const Rank& rank, const Call* call, Work work) {
  const auto said = [&](const char* what) {
    return call == nullptr ? fmt::format("rank {}: {}", rank.rank, what)
                           : fmt::format("rank {}, {}: {}", rank.rank, rank.program.op_name(call->id), what);
  };
  try {
    work();
  } catch (const Aborted&) {
  } catch (const UserError& error) {
    fail(std::make_exception_ptr(UserError(said(error.what()))));
  } catch (const std::exception& error) {
    fail(std::make_exception_ptr(InternalError(said(error.what()))));
  } catch (...) {
    fail(std::make_exception_ptr(InternalError(said("an exception of an unknown type"))));
  }
}

void World::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
  }
  abort();
}

void World::abort() {
  aborted_ = true;
  for (const auto& room : rooms_) room->wake();
  for (const auto& rank : ranks_)
    if (rank->queues) rank->queues->wake();
}

void World::stop() {
  abort();
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    job_.notify_all();
  }
  for (const auto& rank : ranks_)
    if (rank->host) rank->host->join();
  // All before the first is gone: who fails last still wakes everybody.
  for (const auto& rank : ranks_)
    if (rank->queues) rank->queues->join();
}

std::vector<program::OpSpan> World::trace(int rank) const {
  std::vector<program::OpSpan> all;
  for (const Track& track : ranks_[static_cast<size_t>(rank)]->tracks)
    all.insert(all.end(), track.spans.begin(), track.spans.end());
  return all;
}

int64_t World::untraced() const {
  int64_t sum = 0;
  for (const auto& rank : ranks_)
    for (const Track& track : rank->tracks) sum += track.untraced;
  return sum;
}

void World::clear_trace() {
  for (const auto& rank : ranks_)
    for (Track& track : rank->tracks) {
      track.spans.clear();
      track.untraced = 0;
    }
}

}  // namespace mop::cpu
