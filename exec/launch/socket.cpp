#include "exec/launch/socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "sim/base/error.h"

namespace mop::launch {
namespace {

void set(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof value);  // each of them only helps
}

void tune(const Socket& socket) {
  set(socket.fd(), IPPROTO_TCP, TCP_NODELAY, 1);
  set(socket.fd(), SOL_SOCKET, SO_KEEPALIVE, 1);  // hours may pass between two messages
}

Socket bind_to(const Address& address) {
  Socket socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return socket;
  // The connections of a run that has ended keep its port for a minute otherwise.
  set(socket.fd(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (address.storage.ss_family == AF_INET6) set(socket.fd(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
  if (bind(socket.fd(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0)
    return Socket();
  return socket;
}

Socket listen_at(const Address& address) {
  Socket socket = bind_to(address);
  if (socket && listen(socket.fd(), SOMAXCONN) != 0) return Socket();
  return socket;
}

Address any(int family, bool loopback, int port) {
  Address address;
  if (family == AF_INET6) {
    auto& to = reinterpret_cast<sockaddr_in6&>(address.storage);
    to.sin6_family = AF_INET6;
    to.sin6_addr = in6addr_any;
    address.length = sizeof to;
  } else {
    auto& to = reinterpret_cast<sockaddr_in&>(address.storage);
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY);
    address.length = sizeof to;
  }
  address.set_port(port);
  return address;
}

int pending_error(const Socket& socket) {
  int error = 0;
  socklen_t size = sizeof error;
  return getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &size) == 0 ? error : errno;
}

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

bool Address::loopback() const {
  if (storage.ss_family == AF_INET)
    return ntohl(reinterpret_cast<const sockaddr_in&>(storage).sin_addr.s_addr) >> 24 == 127;
  if (storage.ss_family != AF_INET6) return false;
  const in6_addr& address = reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr;
  return IN6_IS_ADDR_LOOPBACK(&address);
}

int Address::port() const {
  return ntohs(storage.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(storage).sin6_port
                                             : reinterpret_cast<const sockaddr_in&>(storage).sin_port);
}

void Address::set_port(int port) {
  const in_port_t value = htons(static_cast<uint16_t>(port));
  if (storage.ss_family == AF_INET6)
    reinterpret_cast<sockaddr_in6&>(storage).sin6_port = value;
  else
    reinterpret_cast<sockaddr_in&>(storage).sin_port = value;
}

std::vector<Address> addresses_of(const std::string& host, int port) {
  addrinfo hints{}, *first = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &first);
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(first, &freeaddrinfo);
  if (error == EAI_AGAIN) return {};
  if (error != 0)
    throw UserError(fmt::format(
        "the host {} of process 0 is not known here ({}): set MASTER_ADDR to a name or number that "
        "all hosts of the run know",
        host, gai_strerror(error)));
  std::vector<Address> found;
  for (const addrinfo* info = first; info != nullptr; info = info->ai_next) {
    if (info->ai_family != AF_INET && info->ai_family != AF_INET6) continue;
    Address& address = found.emplace_back();
    std::memcpy(&address.storage, info->ai_addr, info->ai_addrlen);
    address.length = info->ai_addrlen;
    address.set_port(port);
  }
  return found;
}

Address own_address(const Socket& socket) {
  Address address;
  address.length = sizeof address.storage;
  if (getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&address.storage), &address.length) != 0)
    return {};
  return address;
}

Address other_address(const Socket& socket) {
  Address address;
  address.length = sizeof address.storage;
  if (getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&address.storage), &address.length) != 0)
    return {};
  const auto& six = reinterpret_cast<const sockaddr_in6&>(address.storage);
  if (six.sin6_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&six.sin6_addr)) return address;
  Address plain = any(AF_INET, false, address.port());
  std::memcpy(&reinterpret_cast<sockaddr_in&>(plain.storage).sin_addr, six.sin6_addr.s6_addr + 12, 4);
  return plain;
}

Socket listen_at(int port, bool loopback) {
  if (!loopback)  // takes IPv4 as well
    if (Socket socket = listen_at(any(AF_INET6, false, port)); socket || errno == EADDRINUSE) return socket;
  return listen_at(any(AF_INET, loopback, port));
}

Socket hold_port() {
  return bind_to(any(AF_INET, true, 0));  // SO_REUSEADDR on both sides: one of them may listen
}

Socket begin_to_connect(const Address& address) {
  Socket socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return socket;
  tune(socket);
  if (connect(socket.fd(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0 &&
      errno != EINPROGRESS)
    return Socket();
  return socket;
}

Socket connect_to(const Address& address, Clock::time_point until) {
  Socket socket = begin_to_connect(address);
  if (!socket) return socket;
  pollfd writable{socket.fd(), POLLOUT, 0};
  while (poll(&writable, 1, milliseconds_until(until)) <= 0)
    if (Clock::now() >= until) {
      errno = ETIMEDOUT;
      return Socket();
    }
  if (const int error = pending_error(socket); error != 0) {
    socket = Socket();
    errno = error;
  }
  return socket;
}

Socket accept_from(const Socket& socket) {
  Socket visitor(accept4(socket.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (visitor) tune(visitor);
  return visitor;
}

void set_blocking(const Socket& socket, bool blocking) {
  const int flags = fcntl(socket.fd(), F_GETFL);
  fcntl(socket.fd(), F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

void set_timeout(const Socket& socket, std::chrono::milliseconds timeout) {
  timeval value{};
  value.tv_sec = timeout.count() / 1000;
  value.tv_usec = timeout.count() % 1000 * 1000;
  setsockopt(socket.fd(), SOL_SOCKET, SO_RCVTIMEO, &value, sizeof value);
  setsockopt(socket.fd(), SOL_SOCKET, SO_SNDTIMEO, &value, sizeof value);
}

bool send_all(const Socket& socket, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(sent));
  }
  return true;
}

bool receive_all(const Socket& socket, std::span<std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t got = recv(socket.fd(), bytes.data(), bytes.size(), MSG_WAITALL);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0) errno = 0;
    if (got <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(got));
  }
  return true;
}

int milliseconds_until(Clock::time_point then) {
  const auto rest = std::chrono::ceil<std::chrono::milliseconds>(then - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(rest, 0, 1000));
}

}  // namespace mop::launch
