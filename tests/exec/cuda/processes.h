// Processes that a test starts and looks after: with an environment of theirs, killed when they take too
// long.
#pragma once
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace mop::cuda::testing {

inline std::string slurp(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

// Polls until `done`; whether it was within the time.
inline bool within(std::chrono::seconds time, const std::function<bool()>& done) {
  for (const auto end = std::chrono::steady_clock::now() + time; std::chrono::steady_clock::now() < end;
       std::this_thread::sleep_for(std::chrono::milliseconds(20)))
    if (done()) return true;
  return done();
}

class Process {
 public:
  // words: the program first. `stem`: of the files that get its output, in `folder`, where it starts.
  Process(const std::vector<std::string>& words, const std::map<std::string, std::string>& environment,
          const std::filesystem::path& folder, const std::string& stem)
      : out_(folder / (stem + ".out")), err_(folder / (stem + ".err")) {
    std::vector<char*> argv;
    for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ > 0) return;
    const auto to = [](const std::filesystem::path& path, int fd) {
      dup2(open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_APPEND, 0600), fd);
    };
    to(out_, STDOUT_FILENO);
    to(err_, STDERR_FILENO);
    for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
    if (chdir(folder.c_str()) == 0) execv(argv[0], argv.data());
    _exit(127);
  }
  ~Process() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Process(Process&& other) noexcept
      : pid_(std::exchange(other.pid_, -1)), out_(other.out_), err_(other.err_) {}
  Process& operator=(Process&&) = delete;

  // Exit status, or 128 + signal. Who takes longer is killed, and the test fails.
  int wait(std::chrono::seconds time) {
    int status = 0;
    if (!within(time, [&] { return waitpid(pid_, &status, WNOHANG) == pid_; })) {
      ADD_FAILURE() << "it has not ended after " << time.count() << " s";
      kill(pid_, SIGKILL);
      waitpid(pid_, &status, 0);
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  std::string out() const { return slurp(out_); }
  std::string err() const { return slurp(err_); }

  // Processes that it started and that live.
  std::vector<pid_t> children() const {
    std::vector<pid_t> all;
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      if (entry.path().filename().string().find_first_not_of("0123456789") != std::string::npos) continue;
      const std::string stat = slurp(entry.path() / "stat");  // pid (name) state parent ...
      std::istringstream rest(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));
      std::string state;
      pid_t parent = 0;
      if (rest >> state >> parent && parent == pid_ && state != "Z") all.push_back(std::stoi(stat));
    }
    return all;
  }

 private:
  pid_t pid_ = -1;
  std::filesystem::path out_, err_;
};

// A variable that a process was started with; empty: none.
inline std::string environment_of(pid_t pid, const std::string& name) {
  const std::string all = '\0' + slurp("/proc/" + std::to_string(pid) + "/environ");
  const size_t at = all.find('\0' + name + '=');
  return at == std::string::npos ? "" : std::string(all.c_str() + at + name.size() + 2);
}

}  // namespace mop::cuda::testing
