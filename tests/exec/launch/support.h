// Processes of a run as children of the test, with what they say.
#pragma once
#include <fcntl.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "exec/launch/place.h"
#include "exec/launch/socket.h"

namespace mop::launch {

// A file without a name that several processes append to.
class Text {
 public:
  explicit Text(const char* name) : fd_(memfd_create(name, 0)) { fcntl(fd_, F_SETFL, O_APPEND); }
  ~Text() { close(fd_); }
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  int fd() const { return fd_; }
  std::string read() const {
    struct stat status {};
    fstat(fd_, &status);
    std::string text(static_cast<size_t>(status.st_size), 0);
    const ssize_t n = pread(fd_, text.data(), text.size(), 0);
    text.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
    return text;
  }

 private:
  int fd_;
};

// Signs of life from the processes, a byte each, or from the test to one of them.
class Pipe {
 public:
  Pipe() { EXPECT_EQ(pipe(ends_.data()), 0); }
  ~Pipe() { close(ends_[0]), close(ends_[1]); }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  void put() const { EXPECT_EQ(write(ends_[1], "x", 1), 1); }
  void take(int times = 1) const {
    for (char c = 0; times > 0; --times)
      if (read(ends_[0], &c, 1) != 1) _exit(99);
  }

 private:
  std::array<int, 2> ends_{};
};

// Of a process of a run on this host, which meets at the port that is held.
inline Place place_at(const Socket& held, int rank, int size) {
  Place place;
  place.rank = place.local_rank = rank;
  place.size = place.local_size = size;
  place.port = own_address(held).port();
  place.launcher = "test";
  place.run = 1;
  return place;
}

class Processes {
 public:
  ~Processes() {
    for (const pid_t pid : pids) kill(pid, SIGKILL), waitpid(pid, nullptr, 0);
  }

  // The body's status is the process's; an exception is a line on standard error, and status 70. Call it
  // before the test has threads.
  void start(const std::function<int()>& body) {
    const pid_t pid = fork();
    ASSERT_GE(pid, 0);
    if (pid > 0) {
      pids.push_back(pid);
      return;
    }
    setpgid(0, 0);
    dup2(out_.fd(), STDOUT_FILENO);
    dup2(err_.fd(), STDERR_FILENO);
    int status = 70;
    try {
      status = body();
    } catch (const std::exception& error) {
      dprintf(STDERR_FILENO, "threw: %s\n", error.what());
    }
    fflush(stdout);
    _exit(status);
  }

  // By order of start: exit status, or 128 + signal. Who takes a minute is killed.
  std::vector<int> wait() {
    std::vector<int> all;
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (const pid_t pid : pids) {
      int status = 0;
      while (waitpid(pid, &status, WNOHANG) == 0) {
        if (std::chrono::steady_clock::now() > until) {
          ADD_FAILURE() << "process " << all.size() << " does not end";
          kill(pid, SIGKILL);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      all.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
    pids.clear();
    return all;
  }

  std::string out() const { return out_.read(); }
  std::string err() const { return err_.read(); }

  std::vector<pid_t> pids;

 private:
  Text out_{"out"}, err_{"err"};
};

}  // namespace mop::launch
