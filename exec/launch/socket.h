// TCP connections with an owner.
#pragma once
#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace mop::launch {

using Clock = std::chrono::steady_clock;

class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  ~Socket();
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept;
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

// Plain bytes: processes of a run send them to one another.
struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;  // 0: none

  bool loopback() const;
  int port() const;
  void set_port(int port);
};

// Of a name or a number; none while the name service does not answer. Errors: UserError for one that is
// unknown.
std::vector<Address> addresses_of(const std::string& host, int port);
Address own_address(const Socket& socket);
// IPv4 as such, even where the socket takes both.
Address other_address(const Socket& socket);

// Listens at a port, or a free one for 0. loopback: only this host reaches it. Nothing, and errno, on
// failure.
Socket listen_at(int port, bool loopback);

// Keeps a free port from all but those who ask for this very one. Nothing, and errno, without one.
Socket hold_port();

// Nothing, and errno, when nobody answers there until then. What it returns does not block; see set_blocking.
Socket connect_to(const Address& address, Clock::time_point until);

// Begins to connect, without blocking.
Socket begin_to_connect(const Address& address);

// Who came to a socket that listens; nothing, and errno. Does not block, nor does what it returns.
Socket accept_from(const Socket& socket);

void set_blocking(const Socket& socket, bool blocking);
// What blocks longer fails with EAGAIN; 0: may block forever.
void set_timeout(const Socket& socket, std::chrono::milliseconds timeout);

// All of the bytes, however many. False, and errno (0: the other side hung up), when the connection broke.
bool send_all(const Socket& socket, std::span<const std::byte> bytes);
bool receive_all(const Socket& socket, std::span<std::byte> bytes);

// From here to then for poll(), rounded up; at most a second.
int milliseconds_until(Clock::time_point then);

}  // namespace mop::launch
