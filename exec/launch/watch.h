// Sees to it that the processes of a run end together.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "exec/launch/socket.h"

namespace mop::launch {

// A process, as the messages name it. Plain bytes: they tell one another.
struct Member {
  char host[65] = {};
  int32_t pid = 0;
  Address lifeline;  // where it listens
};

// A thread in each process, connected with that of process 0. They say every second that they are there.
// Process 0 tells the user who was lost, and the others to stop; when process 0 itself is lost, the lowest
// rank that lives tells the user. No thread of the program has to do anything for that: they may hang.
class Watch {
 public:
  // connections: as Star has them, but its own. lifeline: listens where the member's address says, for the
  // case that process 0 is lost. reports: where messages go instead of standard error; -1: nowhere else.
  Watch(int rank, std::vector<Member> members, std::vector<Socket> connections, Socket lifeline, int reports);
  // Says goodbye, and returns when everybody has. In an exception's course: goes without a word.
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // From any thread.
  [[noreturn]] void abandon(const std::string& reason, int status);

 private:
  enum class Wish { stay, leave, vanish };
  // With one other process.
  struct Link {
    int rank;
    Socket socket;
    Clock::time_point heard;
    bool open = true, leaving = false, speaking = false;
    std::string words = {};  // so far, while speaking
  };
  struct Reason {
    int rank;
    std::string text;
  };

  void wake();
  void run();
  void listen(Link& link);
  void understand(Link& link, char word);
  void heed_own_wishes();
  void say(char word);
  [[noreturn]] void lost(const Link& link, const std::string& how);
  [[noreturn]] void end_all(const std::string& line);
  // When process 0 is lost. A process being killed may keep its sockets for long: a connection is no answer.
  bool a_lower_rank_lives() const;
  void answer() const;
  void report(const std::string& line) const;

  const int rank_, reports_, exceptions_;
  std::vector<Member> members_;
  std::vector<Link> links_;
  const Socket lifeline_, wake_;
  std::atomic<int> status_ = 1;  // to exit with when the run is ended

  std::mutex mutex_;
  Wish wish_ = Wish::stay;
  bool abandoned_ = false;  // a reason waits to be passed on
  std::string reason_;

  // Of the watching thread.
  bool over_ = false, said_goodbye_ = false;
  // At process 0: the reasons that it heard, and when it tells the first.
  std::vector<Reason> reasons_;
  Clock::time_point verdict_ = Clock::time_point::max();
  std::thread thread_;
};

}  // namespace mop::launch
