#include "exec/launch/watch.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <exception>
#include <span>
#include <utility>

#include "exec/launch/tell.h"

namespace mop::launch {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// What is said, a byte each. To process 0: that one is there, is done, or has a reason to end the run (text
// up to a 0). From it: that it is there, that everybody is done, that the run ends.
constexpr char kBeat = 'b', kGoodbye = 'g', kReason = 'r', kEverybodyDone = 'e', kStop = 's';
constexpr size_t kLongestReason = 16 << 10;

// The times below add up to less than the 30 seconds that are promised.
constexpr auto kPeriod = seconds(1);
constexpr auto kSilence = seconds(20);
// A reason may be the echo of a loss that is heard of a moment later: that is told then.
constexpr auto kEcho = milliseconds(1000);
constexpr auto kDrain = seconds(3);              // until the others have read that they are to stop
constexpr auto kElection = seconds(3);           // to find a lower rank that lives:
constexpr auto kAnswer = milliseconds(1500);     // until those asked have noticed the loss, too, and say so
constexpr auto kReachable = milliseconds(4000);  // how long the one that tells answers

}  // namespace

Watch::Watch(int rank, std::vector<Member> members, std::vector<Socket> connections, Socket lifeline,
             int reports)
    : rank_(rank),
      reports_(reports),
      exceptions_(std::uncaught_exceptions()),
      members_(std::move(members)),
      lifeline_(std::move(lifeline)),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  for (size_t i = 0; i < connections.size(); ++i)
    if (connections[i]) {
      set_timeout(connections[i], seconds(5));
      links_.push_back({static_cast<int>(i), std::move(connections[i]), Clock::now()});
    }
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all,
                  &before);  // signals are the program's business; the new thread inherits this
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Watch::~Watch() {
  {
    const std::lock_guard lock(mutex_);
    wish_ = std::uncaught_exceptions() > exceptions_ ? Wish::vanish : Wish::leave;
  }
  wake();
  thread_.join();
}

void Watch::abandon(const std::string& reason, int status) {
  std::fflush(stdout);
  {
    const std::lock_guard lock(mutex_);
    if (!abandoned_) {
      abandoned_ = true;
      reason_ = reason.empty() ? "it gave up" : reason.substr(0, kLongestReason);
      status_ = status;
    }
  }
  wake();
  while (true) std::this_thread::sleep_for(seconds(1));  // the watching thread ends the process
}

void Watch::wake() {
  eventfd_write(wake_.fd(), 1);
}

void Watch::run() {
  std::vector<pollfd> polled;
  Clock::time_point last = Clock::now(), beat = last;
  while (!over_) {
    polled.assign(1, {wake_.fd(), POLLIN, 0});
    for (const Link& link : links_) polled.push_back({link.open ? link.socket.fd() : -1, POLLIN, 0});
    poll(polled.data(), polled.size(), milliseconds_until(std::min(beat, verdict_)));
    const Clock::time_point now = Clock::now();
    const bool was_stopped =
        now - last > 3 * kPeriod;  // this process was, by Ctrl-Z: the others need not have been silent
    last = now;
    for (size_t i = 0; i < links_.size() && !over_; ++i) {
      if (was_stopped) links_[i].heard = now;
      if (polled[i + 1].revents != 0) listen(links_[i]);
    }
    if (over_) return;
    for (const Link& link : links_)
      if (link.open && !link.leaving && now - link.heard > kSilence)
        lost(link, fmt::format("has not answered for {} s", kSilence.count()));
    if (now >= beat) {
      if (!said_goodbye_) say(kBeat);
      beat = now + kPeriod;
    }
    heed_own_wishes();
    if (now >= verdict_) end_all(fmt::format("rank {}: {}", reasons_.front().rank, reasons_.front().text));
  }
}

void Watch::listen(Link& link) {
  char words[4096];
  while (!over_) {
    const ssize_t n = recv(link.socket.fd(), words, sizeof words, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      link.open = false;
      // Who gave a reason may go.
      if (std::ranges::find(reasons_, link.rank, &Reason::rank) != reasons_.end()) return;
      lost(link, "ended unexpectedly");
    }
    link.heard = Clock::now();
    for (const char word : std::span(words, static_cast<size_t>(n))) understand(link, word);
  }
}

void Watch::understand(Link& link, char word) {
  if (link.speaking && word != 0) {
    link.words += word;
  } else if (link.speaking) {
    link.speaking = false;
    reasons_.push_back({link.rank, std::move(link.words)});
    verdict_ = std::min(verdict_, Clock::now() + kEcho);
  } else if (word == kReason) {
    link.speaking = true;
  } else if (word == kGoodbye) {
    link.leaving = true;
  } else if (word == kEverybodyDone) {
    over_ = true;
  } else if (word == kStop) {
    _exit(status_);
  }
}

void Watch::heed_own_wishes() {
  eventfd_t ignored = 0;
  eventfd_read(wake_.fd(), &ignored);
  Wish wish = Wish::stay;
  std::string reason;
  {
    const std::lock_guard lock(mutex_);
    wish = wish_;
    if (abandoned_) reason.swap(reason_);
  }
  if (!reason.empty() && rank_ == 0) {
    reasons_.push_back({0, std::move(reason)});
    verdict_ = std::min(verdict_, Clock::now() + kEcho);
  } else if (!reason.empty()) {
    const std::string words = kReason + std::string(reason.c_str());
    send_all(links_.front().socket, std::as_bytes(std::span(words.c_str(), words.size() + 1)));
  }
  if (wish == Wish::vanish) {
    over_ = true;
  } else if (wish == Wish::leave && rank_ == 0 && std::ranges::all_of(links_, &Link::leaving)) {
    say(kEverybodyDone);
    over_ = true;
  } else if (wish == Wish::leave && rank_ != 0 && !said_goodbye_) {
    // The last that process 0 hears from here: on closing a connection with words unread it would take back
    // its own.
    say(kGoodbye);
    said_goodbye_ = true;
  }
}

void Watch::say(char word) {
  for (const Link& link : links_)
    if (link.open) send(link.socket.fd(), &word, 1, MSG_DONTWAIT | MSG_NOSIGNAL);  // who hung up is heard
}

void Watch::lost(const Link& link, const std::string& how) {
  const Member& member = members_[static_cast<size_t>(link.rank)];
  const std::string line =
      fmt::format("rank {} (host {}, pid {}) {}{}", link.rank, member.host, member.pid, how, kAfterLoss);
  if (rank_ == 0) end_all(line);
  // Process 0 is lost. A parent chooses among reports.
  if (reports_ < 0 && a_lower_rank_lives()) _exit(status_);
  report(line);
  pollfd asking{lifeline_.fd(), POLLIN, 0};
  for (const Clock::time_point until = Clock::now() + kReachable; reports_ < 0 && Clock::now() < until;
       answer())
    poll(&asking, 1, milliseconds_until(until));
  _exit(status_);
}

void Watch::end_all(const std::string& line) {
  say(kStop);
  report(line);
  // Were this process gone with words of theirs unread, the others might not get to read ours.
  std::vector<pollfd> polled;
  for (const Link& link : links_) {
    shutdown(link.socket.fd(), SHUT_WR);
    if (link.open) polled.push_back({link.socket.fd(), POLLIN, 0});
  }
  const Clock::time_point until = Clock::now() + kDrain;
  size_t there = polled.size();
  while (there > 0 && Clock::now() < until) {
    poll(polled.data(), polled.size(), milliseconds_until(until));
    for (pollfd& one : polled) {
      char ignored[4096];
      if (one.revents == 0 || recv(one.fd, ignored, sizeof ignored, MSG_DONTWAIT) > 0) continue;
      one.fd = -1;
      --there;
    }
  }
  _exit(status_);
}

bool Watch::a_lower_rank_lives() const {
  constexpr int kAtOnce = 64;
  const Clock::time_point until = Clock::now() + kElection;
  for (int first = 1; first < rank_ && Clock::now() < until; first += kAtOnce) {
    std::vector<Socket> asked;
    std::vector<pollfd> polled{{lifeline_.fd(), POLLIN, 0}};
    for (int rank = first; rank < std::min(rank_, first + kAtOnce); ++rank)
      if (Socket socket = begin_to_connect(members_[static_cast<size_t>(rank)].lifeline)) {
        polled.push_back({socket.fd(), POLLIN, 0});
        asked.push_back(std::move(socket));
      }
    const Clock::time_point patience = std::min(until, Clock::now() + kAnswer);
    for (size_t open = asked.size(); open > 0 && Clock::now() < patience;) {
      poll(polled.data(), polled.size(), milliseconds_until(patience));
      answer();
      for (pollfd& one : std::span(polled).subspan(1)) {
        char ignored = 0;
        if (one.fd < 0 || one.revents == 0) continue;
        if (recv(one.fd, &ignored, 1, MSG_DONTWAIT) == 1) return true;
        one.fd = -1;
        --open;
      }
    }
  }
  return false;
}

void Watch::answer() const {
  while (const Socket asking = accept_from(lifeline_)) send(asking.fd(), &kBeat, 1, MSG_NOSIGNAL);
}

void Watch::report(const std::string& line) const {
  if (reports_ < 0 || send(reports_, line.data(), line.size(), MSG_DONTWAIT | MSG_NOSIGNAL) < 0) tell(line);
}

}  // namespace mop::launch
