#include "exec/launch/spawn.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "exec/launch/socket.h"
#include "exec/launch/tell.h"
#include "sim/base/error.h"

namespace mop::launch {
namespace {

// A report of a loss is followed by the news how that process ended, which says more.
constexpr auto kHold = std::chrono::seconds(1);
// Once the Peers have told that the run ends they end at once; who does not, hangs.
constexpr auto kEnding = std::chrono::seconds(5);

// SIGINT, SIGTERM and SIGCHLD come through a descriptor while this lives.
class Signals {
 public:
  Signals() {
    sigset_t ours;
    sigemptyset(&ours);
    for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&ours, signal);
    pthread_sigmask(SIG_BLOCK, &ours, &mask_);
    struct sigaction none {};
    none.sa_handler = SIG_DFL;
    sigaction(SIGCHLD, &none, &on_child_);  // were it ignored, nobody would learn how children end
    descriptor_ = Socket(signalfd(-1, &ours, SFD_CLOEXEC | SFD_NONBLOCK));
  }
  ~Signals() {
    sigaction(SIGCHLD, &on_child_, nullptr);
    pthread_sigmask(SIG_SETMASK, &mask_, nullptr);
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  int fd() const { return descriptor_.fd(); }
  const sigset_t& mask_before() const { return mask_; }
  std::optional<int> next() const {
    signalfd_siginfo info{};
    if (read(fd(), &info, sizeof info) != sizeof info) return std::nullopt;
    return static_cast<int>(info.ssi_signo);
  }

 private:
  sigset_t mask_;
  struct sigaction on_child_ {};
  Socket descriptor_;
};

// For messages from the processes to their parent, one a datagram.
struct Reports {
  Reports() {
    std::array<int, 2> ends{-1, -1};
    if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends.data()) != 0)
      throw UserError(
          fmt::format("processes cannot be started: {}; raise the limit (ulimit -n)", std::strerror(errno)));
    to = Socket(ends[0]);
    from = Socket(ends[1]);
  }
  std::optional<std::string> next() const {
    std::string line(32 << 10, 0);
    const ssize_t n = recv(from.fd(), line.data(), line.size(), MSG_DONTWAIT);
    if (n <= 0) return std::nullopt;
    line.resize(static_cast<size_t>(n));
    return line;
  }

  Socket to, from;
};

// All that exec needs, made before fork: a child of a process with threads may not allocate.
struct Program {
  std::string path;
  std::vector<std::string> arguments, environment;

  static std::vector<char*> pointers(const std::vector<std::string>& strings) {
    std::vector<char*> all;
    for (const std::string& string : strings) all.push_back(const_cast<char*>(string.c_str()));
    all.push_back(nullptr);
    return all;
  }
};

std::vector<std::string> environment_with(const Environment& ours) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (std::ranges::find(ours, text.substr(0, text.find('=')),
                          [](const auto& one) { return std::string_view(one.first); }) == ours.end())
      all.emplace_back(text);
  }
  for (const auto& [name, value] : ours) all.push_back(name + "=" + value);
  return all;
}

std::vector<int> cores() {
  cpu_set_t set;
  std::vector<int> all;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return all;  // more than 1024: as the system likes
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &set)) all.push_back(core);
  return all;
}

std::optional<cpu_set_t> share_of(const std::vector<int>& all, int rank, int processes) {
  const auto n = static_cast<int>(all.size());
  if (n < processes) return std::nullopt;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int i = rank * n / processes; i < (rank + 1) * n / processes; ++i)
    CPU_SET(all[static_cast<size_t>(i)], &set);
  return set;
}

// The name that the process shows is that of the file; it may have been replaced since it was started.
std::string own_path() {
  std::array<char, PATH_MAX> path{};
  const ssize_t n = readlink("/proc/self/exe", path.data(), path.size());
  return n > 0 ? std::string(path.data(), static_cast<size_t>(n)) : "/proc/self/exe";
}

pid_t start(const Program& program, int rank, const std::optional<cpu_set_t>& cores, const Signals& signals,
            int reports) {
  const std::vector<char*> arguments = Program::pointers(program.arguments),
                           environment = Program::pointers(program.environment);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid != 0) return pid;
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  if (cores) sched_setaffinity(0, sizeof *cores, &*cores);
  const int nothing = open("/dev/null", O_RDWR);
  dup2(nothing, STDIN_FILENO);
  if (rank > 0) dup2(nothing, STDOUT_FILENO);
  if (nothing > STDERR_FILENO) close(nothing);
  fcntl(reports, F_SETFD, 0);
  pthread_sigmask(SIG_SETMASK, &signals.mask_before(), nullptr);
  execve(program.path.c_str(), arguments.data(), environment.data());
  execve("/proc/self/exe", arguments.data(), environment.data());
  constexpr std::string_view kFailed =
      "mop: this program cannot be started a second time: is its file still there?\n";
  [[maybe_unused]] const ssize_t ignored = write(STDERR_FILENO, kFailed.data(), kFailed.size());
  _exit(1);
}

class Children {
 public:
  explicit Children(std::chrono::seconds patience) : patience_(patience) {}
  ~Children() { kill_all(SIGKILL), wait_for_all(); }

  void start_all(int processes, std::span<const std::string> arguments,
                 const std::function<Environment(int rank)>& more) {
    // Held until the end: process 0 listens there some seconds from now.
    port_ = hold_port();
    if (!port_)
      throw UserError(
          fmt::format("there is no free port on this host ({}): end programs that use the network",
                      std::strerror(errno)));
    std::random_device random;
    const std::string run = fmt::format("{:08x}{:08x}", random(), random());
    const std::vector<int> all_cores = cores();
    Program program{own_path(), {program_invocation_name}, {}};
    program.arguments.insert(program.arguments.end(), arguments.begin(), arguments.end());
    for (int rank = 0; rank < processes; ++rank) {
      const std::string rank_text = std::to_string(rank), size_text = std::to_string(processes);
      Environment ours = more ? more(rank) : Environment();
      ours.insert(ours.end(), {{"RANK", rank_text},
                               {"WORLD_SIZE", size_text},
                               {"LOCAL_RANK", rank_text},
                               {"LOCAL_WORLD_SIZE", size_text},
                               {"MASTER_ADDR", "127.0.0.1"},
                               {"MASTER_PORT", std::to_string(own_address(port_).port())},
                               {"MOP_LAUNCH", "1"},
                               {"MOP_LAUNCH_RUN", run},
                               {"MOP_LAUNCH_REPORTS", std::to_string(reports_.to.fd())}});
      program.environment = environment_with(ours);
      const pid_t pid =
          start(program, rank, share_of(all_cores, rank, processes), signals_, reports_.to.fd());
      if (pid < 0)
        throw UserError(
            fmt::format("process {} of {} cannot be started ({}): run fewer, or raise the limits (ulimit)",
                        rank, processes, std::strerror(errno)));
      children_.push_back({pid, true});
      ++running_;
    }
  }

  int wait_for_all() {
    while (running_ > 0) {
      std::array<pollfd, 2> news{{{signals_.fd(), POLLIN, 0}, {reports_.from.fd(), POLLIN, 0}}};
      poll(news.data(), news.size(), milliseconds_until(std::min(kill_at_, tell_at_)));
      while (const auto signal = signals_.next())
        if (*signal != SIGCHLD) hand_on(*signal);
      hear_reports();
      for (size_t rank = 0; rank < children_.size(); ++rank) look_after(rank);
      if (Clock::now() >= tell_at_ || running_ == 0) hear_reports(), tell_once(report_);
      if (Clock::now() >= kill_at_) kill_all(SIGKILL), kill_at_ = Clock::time_point::max();
    }
    if (statuses_.contains(2)) return 2;
    return statuses_.size() == 1 && !signalled_ ? *statuses_.begin() : 1;
  }

 private:
  struct Child {
    pid_t pid;
    bool running;
  };

  void hand_on(int signal) {
    handed_on_.insert(signal);
    kill_all(signal);
  }

  void kill_all(int signal) {
    killed_ = killed_ || signal == SIGKILL;
    for (const Child& child : children_)
      if (child.running) kill(child.pid, signal);
  }

  void hear_reports() {
    while (const auto line = reports_.next()) {
      if (!report_.empty()) continue;
      report_ = *line;
      tell_at_ = Clock::now() + kHold;
      kill_at_ = std::min(kill_at_, Clock::now() + kEnding);
    }
  }

  void tell_once(const std::string& line) {
    tell_at_ = Clock::time_point::max();
    if (!told_ && !line.empty()) tell(line), told_ = true;
  }

  void look_after(size_t rank) {
    Child& child = children_[rank];
    int status = 0;
    if (!child.running || waitpid(child.pid, &status, WNOHANG) != child.pid) return;
    child.running = false;
    --running_;
    if (status != 0 && !failed_) kill_at_ = std::min(kill_at_, Clock::now() + patience_);
    failed_ = failed_ || status != 0;
    if (WIFEXITED(status)) {
      statuses_.insert(WEXITSTATUS(status));
      return;
    }
    signalled_ = true;
    const int signal = WTERMSIG(status);
    if (handed_on_.contains(signal)) told_ = true;  // the user knows
    if (!(signal == SIGKILL && killed_))
      tell_once(fmt::format(
          "rank {} (pid {}) was ended by signal {} ({}{}){}", rank, child.pid, signal, strsignal(signal),
          signal == SIGKILL ? ", perhaps by the kernel for want of host memory" : "", kAfterLoss));
  }

  const std::chrono::seconds patience_;
  const Signals signals_;
  const Reports reports_;
  Socket port_;
  std::vector<Child> children_;
  int running_ = 0;
  std::set<int> handed_on_;
  std::string report_;  // the first
  Clock::time_point tell_at_ = Clock::time_point::max(), kill_at_ = Clock::time_point::max();
  std::set<int> statuses_;
  bool told_ = false, killed_ = false, failed_ = false, signalled_ = false;
};

}  // namespace

int spawn(int processes, std::span<const std::string> arguments, std::chrono::seconds patience,
          const std::function<Environment(int rank)>& more) {
  ensure(processes >= 1, "a run has a process");
  Children children(patience);
  children.start_all(processes, arguments, more);
  return children.wait_for_all();
}

}  // namespace mop::launch
