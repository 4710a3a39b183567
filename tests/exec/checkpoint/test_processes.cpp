// One checkpoint by several processes, most of which are threads here.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <barrier>
#include <thread>

#include "exec/launch/socket.h"
#include "tests/exec/checkpoint/support.h"
#include "tests/exec/launch/support.h"

namespace mop::checkpoint {
namespace {

// What the processes of a run say to one another, in memory.
struct Room {
  explicit Room(int n) : size(n), said(static_cast<size_t>(n)), barrier(n) {}
  const int size;
  std::vector<std::vector<std::byte>> said;
  std::barrier<> barrier;
};

class Member final : public launch::Peers {
 public:
  Member(Room& room, int rank) : room_(room), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return room_.size; }
  std::vector<std::byte> broadcast(std::span<const std::byte> bytes) override { return all(bytes).front(); }
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> bytes) override {
    std::vector<std::vector<std::byte>> everything = all(bytes);
    return rank_ == 0 ? everything : std::vector<std::vector<std::byte>>{};
  }
  void barrier() override { room_.barrier.arrive_and_wait(); }
  std::unique_ptr<Peers> channel() override { return std::make_unique<Member>(room_, rank_); }
  [[noreturn]] void abandon(const std::string& reason, int) override { throw std::runtime_error(reason); }

 private:
  std::vector<std::vector<std::byte>> all(std::span<const std::byte> bytes) {
    room_.said[static_cast<size_t>(rank_)].assign(bytes.begin(), bytes.end());
    room_.barrier.arrive_and_wait();
    std::vector<std::vector<std::byte>> heard = room_.said;
    room_.barrier.arrive_and_wait();
    return heard;
  }
  Room& room_;
  int rank_;
};

// body(rank, its peers) of every process; what each ended with.
std::vector<std::string> processes(int size,
                                   const std::function<void(int, std::unique_ptr<launch::Peers>)>& body) {
  Room room(size);
  std::vector<std::string> errors(static_cast<size_t>(size));
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      try {
        body(rank, std::make_unique<Member>(room, rank));
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(rank)] = error.what();
      }
    });
  threads.clear();
  return errors;
}

// The ranks of one process of a snapshot of all.
Snapshot part_of(const Snapshot& all, int rank, int size) {
  const size_t each = all.ranks.size() / static_cast<size_t>(size), first = each * static_cast<size_t>(rank);
  const auto begin = all.ranks.begin() + static_cast<std::ptrdiff_t>(first);
  return {all.state, {begin, begin + static_cast<std::ptrdiff_t>(each)}};
}

using Processes = Folder;

TEST_F(Processes, WriteOneCheckpointTogether) {
  for (const auto& [size, ranks] : {std::pair{1, 3}, {2, 2}, {3, 3}, {2, 6}}) {
    const std::filesystem::path there = folder / fmt::format("{}-{}", size, ranks);
    const auto errors =
        processes(size, [&, size = size, ranks = ranks](int rank, std::unique_ptr<launch::Peers> peers) {
          Writer writer(there, 2, std::move(peers));
          for (const int64_t step : {1, 2, 3}) {
            const Filled memory = filled(step, static_cast<size_t>(ranks));
            writer.begin(part_of(memory.snapshot(), rank, size));
            writer.wait();
          }
        });
    EXPECT_THAT(errors, ::testing::Each(::testing::IsEmpty()));
    EXPECT_THAT(names_in(there), ::testing::ElementsAre(step_name(2), step_name(3)));
    for (const int64_t step : {2, 3}) expect_contents(Reader(there / step_name(step)), step);
  }
}

// Each with a number of its own, as on GPUs.
TEST_F(Processes, WriteOneCheckpointOverTcp) {
  constexpr int kSize = 3;
  const launch::Socket held = launch::hold_port();
  launch::Processes children;
  for (int rank = 0; rank < kSize; ++rank)
    children.start([&, rank] {
      const std::unique_ptr<launch::Peers> peers = launch::connect(launch::place_at(held, rank, kSize), 60);
      Writer writer(folder, 2, peers->channel());
      const Filled memory = filled(1, kSize);
      writer.begin(part_of(memory.snapshot(), rank, kSize));
      writer.wait();
      return 0;
    });
  EXPECT_THAT(children.wait(), ::testing::Each(0)) << children.err();
  EXPECT_THAT(names_in(folder), ::testing::ElementsAre(step_name(1)));
  expect_contents(Reader(folder / step_name(1)), 1);
}

// One cannot write: nobody has a checkpoint, everybody says why, and the one before stays.
TEST_F(Processes, AllFailWhenOneDoes) {
  const auto errors = processes(3, [&](int rank, std::unique_ptr<launch::Peers> peers) {
    Writer writer(folder, 2, std::move(peers));
    const Filled first = filled(1, 3), second = filled(2, 3);
    writer.begin(part_of(first.snapshot(), rank, 3));
    writer.wait();
    Snapshot snapshot = part_of(second.snapshot(), rank, 3);
    if (rank == 2) snapshot.ranks.front().front().type = program::Type::f64;  // no checkpoint holds it
    writer.begin(snapshot);
    writer.wait();
  });
  EXPECT_THAT(errors, ::testing::Each(::testing::HasSubstr("checkpoints hold f32 and bf16")));
  expect_contents(Reader(folder / step_name(1)), 1);
  EXPECT_FALSE(std::filesystem::exists(folder / step_name(2)));
}

}  // namespace
}  // namespace mop::checkpoint
