// Linked with the library that is preloaded elsewhere, so that this program's sends are held back.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr double kRate = 10e6, kWindow = 1;  // so slow that a busy machine keeps up
// Nodes, of a test each, as tests may run side by side.
constexpr const char *kAlone = "mop-test-alone", *kShared = "mop-test-shared", *kFirst = "mop-test-first",
                     *kSecond = "mop-test-second", *kWords = "mop-test-words";

// What the library keeps of a node.
void forget(const char* node) {
  shm_unlink(("/emulated-nic-" + std::to_string(getuid()) + "-" + node).c_str());
}

// Bytes that a process of the node sends in the window, to a thread of its own.
int64_t sent_in_the_window(const char* node, int flags) {
  setenv("NCCL_HOSTID", node, 1);
  setenv("EMULATED_NIC", std::to_string(kRate).c_str(), 1);
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) return -1;
  std::thread receiver([&] {
    std::vector<char> memory(1 << 20);
    while (read(ends[1], memory.data(), memory.size()) > 0) continue;
  });
  const std::vector<char> data(1 << 20);
  int64_t all = 0;
  const auto begin = Clock::now();
  while (std::chrono::duration<double>(Clock::now() - begin).count() < kWindow) {
    const ssize_t sent = send(ends[0], data.data(), data.size(), flags);
    if (sent > 0) all += sent;
    if (sent < 0 && errno != EAGAIN) return -1;
  }
  close(ends[0]);
  receiver.join();
  close(ends[1]);
  return all;
}

// The library reads its variables once a process. Fractions of the rate.
std::vector<double> rates_of(const std::vector<std::pair<const char*, int>>& processes) {
  std::vector<int> pipes;
  for (const auto& [node, flags] : processes) {
    int ends[2];
    if (pipe(ends) != 0) return {};
    if (fork() == 0) {
      const int64_t sent = sent_in_the_window(node, flags);
      _exit(write(ends[1], &sent, sizeof sent) == sizeof sent ? 0 : 1);
    }
    close(ends[1]);
    pipes.push_back(ends[0]);
  }
  std::vector<double> rates;
  for (const int end : pipes) {
    int64_t sent = -1;
    EXPECT_EQ(read(end, &sent, sizeof sent), ssize_t{sizeof sent});
    rates.push_back(static_cast<double>(sent) / (kRate * kWindow));
    close(end);
  }
  while (wait(nullptr) > 0) continue;
  for (const auto& [node, flags] : processes) forget(node);
  return rates;
}

// Where others use the machine, too, it may be slower, but never faster.
void expect_all_of_it(double rate) {
  EXPECT_LT(rate, 1.1);
  EXPECT_GT(rate, 0.5);
}

TEST(EmulatedNic, HoldsAProcessToItsRate) {
  for (const int flags : {0, int{MSG_DONTWAIT}}) expect_all_of_it(rates_of({{kAlone, flags}}).at(0));
}

TEST(EmulatedNic, IsSharedByANodesProcesses) {
  const std::vector<double> rates = rates_of({{kShared, MSG_DONTWAIT}, {kShared, MSG_DONTWAIT}});
  expect_all_of_it(rates.at(0) + rates.at(1));
}

TEST(EmulatedNic, IsOfOneNode) {
  const std::vector<double> rates = rates_of({{kFirst, 0}, {kSecond, 0}});
  for (const double rate : rates) expect_all_of_it(rate);
  EXPECT_GT(rates.at(0) + rates.at(1), 1.2);
}

// A word that is sent once, and not again where it was refused, gets through beside what fills the NIC.
TEST(EmulatedNic, LetsWordsThrough) {
  setenv("NCCL_HOSTID", kWords, 1);
  setenv("EMULATED_NIC", "1e6", 1);
  int bulk[2], words[2];
  for (int* ends : {bulk, words}) ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  const std::vector<char> data(64 << 10);
  int refused = 0;
  for (int i = 0; i < 20; ++i) {
    refused += send(bulk[0], data.data(), data.size(), MSG_DONTWAIT) < 0;
    EXPECT_EQ(send(words[0], "x", 1, MSG_DONTWAIT), 1);
  }
  EXPECT_GT(refused, 10);
  for (const int* ends : {bulk, words}) close(ends[0]), close(ends[1]);
  forget(kWords);
}

}  // namespace
