#include "exec/launch/peers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "exec/launch/socket.h"
#include "tests/error_of.h"
#include "tests/exec/launch/support.h"

namespace mop::launch {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

constexpr const char* kStop = ": the others stop; start again with --resume\n";

// Wrong results in a process of a run, which the test sees by its status.
void check(bool holds, const char* what) {
  if (holds) return;
  dprintf(STDERR_FILENO, "not so: %s\n", what);
  _exit(71);
}

std::vector<std::byte> pattern(size_t size, uint64_t seed) {
  constexpr size_t kBlock = 4096;
  std::vector<std::byte> bytes(size);
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < std::min(size, kBlock); ++i) bytes[i] = static_cast<std::byte>(random());
  for (size_t i = kBlock; i < size; i += kBlock) {  // a block as the first, with its place
    const size_t n = std::min(kBlock, size - i);
    std::memcpy(bytes.data() + i, bytes.data(), n);
    std::memcpy(bytes.data() + i, &i, std::min(sizeof i, n));
  }
  return bytes;
}

class PeersTest : public ::testing::Test {
 protected:
  Place place(int rank, int size) const { return place_at(held_, rank, size); }

  // A run whose processes do this.
  void start(int size, const std::function<int(Peers&)>& body) {
    for (int rank = 0; rank < size; ++rank)
      processes.start([=, this] { return body(*connect(place(rank, size), 60)); });
  }
  // A run whose processes have met, and hang.
  void start_hanging(int size) {
    start(size, [this](Peers&) {
      ready.put();
      while (true) pause();
      return 0;
    });
    ready.take(size);
  }
  std::string lost(int rank, pid_t pid) const {
    char host[65] = {};
    gethostname(host, sizeof host - 1);
    return fmt::format("mop: rank {} (host {}, pid {}) ended unexpectedly{}", rank, host, pid, kStop);
  }

  Processes processes;
  Pipe ready;

 private:
  const Socket held_ = hold_port();
};

void exchange(Peers& peers, size_t size, uint64_t seed) {
  const auto rank = static_cast<uint64_t>(peers.rank());
  const std::vector<std::byte> given = pattern(size, seed);
  check(peers.broadcast(peers.rank() == 0 ? given : pattern(3, rank)) == given,
        "everybody has process 0's bytes");
  const auto mine = [&](uint64_t r) { return pattern(r == 1 ? 0 : size + r, seed + r); };
  const auto all = peers.gather(mine(rank));
  check(all.size() == (rank == 0 ? static_cast<size_t>(peers.size()) : 0), "process 0 has everybody's bytes");
  for (uint64_t r = 0; r < all.size(); ++r) check(all[r] == mine(r), "and they are theirs");
  peers.barrier();
}

TEST_F(PeersTest, ExchangeBytes) {
  for (int size = 1; size <= 5; ++size) {
    start(size, [=](Peers& peers) {
      check(peers.size() == size, "a size");
      std::mt19937_64 random(static_cast<uint64_t>(size));
      for (const size_t bytes : {size_t{0}, size_t{1}, size_t{100}}) exchange(peers, bytes, random());
      for (int round = 0; round < 20; ++round) {
        const size_t bytes = random() % 100000;
        exchange(peers, bytes, random());
      }
      return 0;
    });
    EXPECT_THAT(processes.wait(), Each(0));
  }
  EXPECT_EQ(processes.err(), "");
}

TEST_F(PeersTest, ExchangeManyBytes) {
  start(2, [](Peers& peers) {
    const std::vector<std::byte> given = pattern(peers.rank() == 0 ? 100'000'000 : 0, 1);
    const std::vector<std::byte> heard = peers.broadcast(given);
    const auto all = peers.gather(heard);
    if (peers.rank() == 0) check(all[1] == given, "what went out comes back");
    return 0;
  });
  EXPECT_THAT(processes.wait(), Each(0));
  EXPECT_EQ(processes.err(), "");
}

TEST_F(PeersTest, ChannelsAreForThreads) {
  start(4, [](Peers& peers) {
    std::unique_ptr<Peers> first = peers.channel(), second = first->channel();
    const auto use = [](Peers& channel, uint64_t seed) {
      std::mt19937_64 random(seed);
      for (int round = 0; round < 100; ++round) {
        const size_t bytes = random() % 10000;
        exchange(channel, bytes, random());
      }
      for (int round = 0; round < 5; ++round) exchange(*channel.channel(), 10, random());
    };
    std::thread one([&] { use(*first, 1); }), two([&] { use(*second, 2); });
    use(peers, 3);
    one.join();
    two.join();
    return 0;
  });
  EXPECT_THAT(processes.wait(), Each(0));
  EXPECT_EQ(processes.err(), "");
}

TEST_F(PeersTest, EndsWhenAllAreDone) {
  start(4, [](Peers& peers) {
    std::this_thread::sleep_for(std::chrono::milliseconds(300 * ((peers.rank() + 2) % 4)));
    return 0;
  });
  EXPECT_THAT(processes.wait(), Each(0));
  EXPECT_EQ(processes.err(), "");
}

TEST(Alone, NeedsNobody) {
  const std::unique_ptr<Peers> peers = alone();
  EXPECT_EQ(peers->rank(), 0);
  EXPECT_EQ(peers->size(), 1);
  const auto bytes = pattern(10, 1);
  EXPECT_EQ(peers->broadcast(bytes), bytes);
  EXPECT_THAT(peers->gather(bytes), ElementsAre(bytes));
  peers->barrier();
  peers->channel()->barrier();
}

TEST_F(PeersTest, SayWhoIsMissing) {
  for (const int rank : {0, 1, 3}) processes.start([=, this] { return connect(place(rank, 5), 3)->rank(); });
  EXPECT_THAT(processes.wait(), Each(70));
  const std::string line =
      "threw: after 3 s ranks 2, 4 of 5 processes have not come to 127.0.0.1 port [0-9]+: [^\n]*\n";
  EXPECT_THAT(processes.err(), MatchesRegex(line + line + line));
}

TEST_F(PeersTest, SayThatProcess0IsMissing) {
  EXPECT_THAT(error_of([&] { connect(place(1, 2), 1); }),
              AllOf(HasSubstr("rank 1 has not met process 0"), HasSubstr("Connection refused"),
                    HasSubstr("MASTER_ADDR")));
}

TEST_F(PeersTest, SayThatAHostIsUnknown) {
  Place unknown = place(1, 2);
  unknown.address = "no such host";
  EXPECT_THAT(error_of([&] { connect(unknown, 1); }),
              AnyOf(HasSubstr("no such host"), HasSubstr("name service")));
}

TEST_F(PeersTest, SayThatThePortIsInUse) {
  const Socket other = listen_at(place(0, 2).port, true);
  ASSERT_TRUE(other);
  EXPECT_THAT(error_of([&] { connect(place(0, 2), 1); }),
              AllOf(HasSubstr(fmt::format("port {} of this host is in use", place(0, 2).port)),
                    HasSubstr("MASTER_PORT")));
}

TEST_F(PeersTest, TurnStrangersAway) {
  const auto member = [this](int rank) {
    return [this, rank] {
      const std::unique_ptr<Peers> peers = connect(place(rank, 3), 60);
      exchange(*peers, 1000, 5);
      return 0;
    };
  };
  processes.start(member(0));
  const Address door = addresses_of("127.0.0.1", place(0, 3).port).front();
  std::vector<Socket> strangers;
  for (const std::string words : {"", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "mop",
                                  "mophello and then nothing of sense, but as long as it takes"}) {
    Socket socket;
    while (!(socket = connect_to(door, Clock::now() + std::chrono::seconds(10)))) usleep(1000);
    send_all(socket, std::as_bytes(std::span(words)));
    strangers.push_back(std::move(socket));
  }
  strangers.erase(strangers.begin());  // hangs up
  Processes others;
  others.start([this] {
    Place other = place(1, 3);
    other.run = 2;
    return connect(other, 2)->rank();
  });
  others.start([this] { return connect(place(1, 4), 2)->rank(); });
  EXPECT_THAT(others.wait(), Each(70));
  EXPECT_THAT(others.err(), AllOf(HasSubstr("another run of mop is there"),
                                  HasSubstr("one of 4 processes, process 0 as one of 3")));

  processes.start(member(1));
  Processes twin;  // comes second, or first: one of them has to go
  twin.start(member(1));
  while ((processes.err() + twin.err()).empty()) usleep(5000);
  processes.start(member(2));
  std::vector<int> statuses = processes.wait();
  statuses.push_back(twin.wait().front());
  EXPECT_EQ(std::ranges::count(statuses, 0), 3);
  EXPECT_EQ(std::ranges::count(statuses, 70), 1);
  EXPECT_THAT(processes.err() + twin.err(),
              MatchesRegex("threw: process 0 has met another rank 1 before[^\n]*\n"));
}

TEST_F(PeersTest, EndWithTheOneThatIsKilled) {
  for (const size_t killed : {size_t{3}, size_t{1}}) {
    start_hanging(4);
    const pid_t pid = processes.pids[killed];
    const std::string before = processes.err();
    kill(pid, SIGKILL);
    std::vector<int> expected(4, 1);
    expected[killed] = 128 + SIGKILL;
    EXPECT_EQ(processes.wait(), expected);
    EXPECT_EQ(processes.err(), before + lost(static_cast<int>(killed), pid));
  }
}

TEST_F(PeersTest, EndWithProcess0) {
  start_hanging(4);
  const pid_t pid = processes.pids[0];
  kill(pid, SIGKILL);
  EXPECT_THAT(processes.wait(), ElementsAre(128 + SIGKILL, 1, 1, 1));
  EXPECT_EQ(processes.err(), lost(0, pid));
}

TEST_F(PeersTest, EndWithProcess0AndOthers) {
  start_hanging(5);
  const pid_t pid = processes.pids[0];
  // So that process 0 has no time to tell of 1.
  for (const size_t rank : {0, 1}) kill(processes.pids[rank], SIGSTOP);
  for (const size_t rank : {1, 0}) kill(processes.pids[rank], SIGKILL);
  EXPECT_THAT(processes.wait(), ElementsAre(128 + SIGKILL, 128 + SIGKILL, 1, 1, 1));
  EXPECT_EQ(processes.err(), lost(0, pid));
}

TEST_F(PeersTest, EndWithOneThatIsLostInAnExchange) {
  start(3, [](Peers& peers) -> int {
    if (peers.rank() == 1) _exit(7);
    std::unique_ptr<Peers> channel = peers.channel();
    peers.gather({});
    peers.barrier();
    return 0;
  });
  const pid_t pid = processes.pids[1];
  EXPECT_THAT(processes.wait(), ElementsAre(1, 7, 1));
  EXPECT_EQ(processes.err(), lost(1, pid));
}

TEST_F(PeersTest, EndWithOneThatIsLostWhenAllElseIsDone) {
  start(3, [](Peers& peers) -> int {
    if (peers.rank() == 2) {
      usleep(300000);
      _exit(0);
    }
    return 0;
  });
  const pid_t pid = processes.pids[2];
  EXPECT_THAT(processes.wait(), ElementsAre(1, 1, 0));
  EXPECT_EQ(processes.err(), lost(2, pid));
}

TEST_F(PeersTest, AnExceptionIsALoss) {
  start(3, [](Peers& peers) {
    if (peers.rank() == 1) throw UserError("what one process has to say");
    peers.barrier();
    return 0;
  });
  const pid_t pid = processes.pids[1];
  EXPECT_THAT(processes.wait(), ElementsAre(1, 70, 1));
  EXPECT_THAT(processes.err(), AnyOf("threw: what one process has to say\n" + lost(1, pid),
                                     lost(1, pid) + "threw: what one process has to say\n"));
}

TEST_F(PeersTest, AbandonedForAReason) {
  for (const int who : {2, 0}) {
    const std::string before = processes.err();
    start(4, [who](Peers& peers) {
      if (peers.rank() == who) peers.abandon("out of GPU memory");
      peers.barrier();
      while (true) pause();
      return 0;
    });
    std::vector<int> expected(4, 1);
    expected[static_cast<size_t>(who)] = 2;
    EXPECT_EQ(processes.wait(), expected);
    EXPECT_EQ(processes.err(), before + fmt::format("mop: rank {}: out of GPU memory\n", who));
  }
}

TEST_F(PeersTest, AbandonedByAllForOneReason) {
  start(4, [](Peers& peers) {
    peers.abandon("no such file", 3);
    return 0;
  });
  EXPECT_THAT(processes.wait(), Each(3));
  EXPECT_THAT(processes.err(), MatchesRegex("mop: rank [0-3]: no such file\n"));
}

// What a process complains of is often the loss of another.
TEST_F(PeersTest, ALossIsToldBeforeItsEcho) {
  Pipe go;
  start(4, [&](Peers& peers) {
    ready.put();
    if (peers.rank() == 2) {
      go.take();
      peers.abandon("an exchange failed");
    }
    while (true) pause();
    return 0;
  });
  ready.take(4);
  const pid_t pid = processes.pids[3];
  go.put();
  usleep(50000);
  kill(pid, SIGKILL);
  EXPECT_THAT(processes.wait(), ElementsAre(1, 1, 2, 128 + SIGKILL));
  EXPECT_EQ(processes.err(), lost(3, pid));
}

TEST(Alone, IsAbandonedWithAMessage) {
  Processes processes;
  processes.start([] {
    std::printf("so far");
    alone()->abandon("no such file");
    return 0;
  });
  EXPECT_THAT(processes.wait(), ElementsAre(2));
  EXPECT_EQ(processes.out(), "so far");
  EXPECT_EQ(processes.err(), "mop: error: no such file\n");
}

}  // namespace
}  // namespace mop::launch
