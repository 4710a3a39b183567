#include "exec/launch/meet.h"

#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "sim/base/error.h"

namespace mop::launch {
namespace {

using std::chrono::milliseconds;

constexpr uint64_t kHello = 0x6f6c6c6568706f6d, kReply = 0x796c706572706f6d;  // "mophello", "mopreply"
constexpr uint32_t kVersion = 1;
constexpr auto kPatience = std::chrono::seconds(10);  // with those who come and say nothing

struct Hello {
  uint64_t magic = kHello, key = 0;
  uint32_t version = kVersion, size = 0, rank = 0, reserved = 0;
};

enum class Verdict : uint32_t { welcome, other_run, other_version, other_size, taken };

struct Reply {
  uint64_t magic = kReply;
  Verdict verdict = Verdict::welcome;
  uint32_t value = 0;  // of process 0: its version or size
};

struct Visitor {
  Socket socket;
  Clock::time_point since;
  Hello hello;
  size_t got = 0;
};

// What has come of an answer or a greeting, without blocking. False when no more will come.
template <typename Words>
bool listen_to(const Socket& socket, Words& words, size_t& got) {
  while (got < sizeof words) {
    const ssize_t n = recv(socket.fd(), reinterpret_cast<char*>(&words) + got, sizeof words - got, 0);
    if (n == 0) return false;
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    got += static_cast<size_t>(n);
  }
  return true;
}

template <typename Words>
bool say(const Socket& socket, const Words& words) {  // little, to a new connection: never waits
  return send(socket.fd(), &words, sizeof words, MSG_NOSIGNAL) == sizeof words;
}

Reply judge(const Hello& hello, const Party& party, const std::vector<Socket>& here) {
  if (hello.version != kVersion) return {.verdict = Verdict::other_version, .value = kVersion};
  if (hello.key != party.key) return {.verdict = Verdict::other_run};
  const auto size = static_cast<uint32_t>(party.size);
  if (hello.size != size || hello.rank == 0 || hello.rank >= size)
    return {.verdict = Verdict::other_size, .value = size};
  if (here[hello.rank]) return {.verdict = Verdict::taken};
  return {};
}

void take_all(const Socket& door, std::vector<Visitor>& visitors) {
  while (Socket socket = accept_from(door)) visitors.push_back({std::move(socket), Clock::now(), {}, 0});
  if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
    throw UserError(fmt::format("process 0 cannot open more connections: {}; raise the limit (ulimit -n)",
                                std::strerror(errno)));
}

// The connection when process 0 lets this process in; nothing, and why, when it is to try again.
Socket try_to_enter(const Address& address, const Party& party, Clock::time_point until, std::string& why) {
  Socket socket = connect_to(address, std::min(until, Clock::now() + kPatience));
  Hello hello;
  hello.key = party.key;
  hello.size = static_cast<uint32_t>(party.size);
  hello.rank = static_cast<uint32_t>(party.rank);
  if (!socket || !say(socket, hello)) {
    why = std::strerror(errno);
    return Socket();
  }
  Reply reply;
  size_t got = 0;
  why = "something listens there that is no process of mop's";
  while (got < sizeof reply) {
    pollfd readable{socket.fd(), POLLIN, 0};
    poll(&readable, 1, milliseconds_until(until));
    if (!listen_to(socket, reply, got) || Clock::now() >= until) return Socket();
  }
  if (reply.magic != kReply) return Socket();
  switch (reply.verdict) {
    case Verdict::welcome:
      return socket;
    case Verdict::other_run:
      why = "another run of mop is there";
      return Socket();
    case Verdict::other_version:
      throw UserError(fmt::format(
          "rank {} speaks version {} to the other processes, process 0 version {}: start the same "
          "build of mop on all hosts",
          party.rank, kVersion, reply.value));
    case Verdict::other_size:
      throw UserError(fmt::format(
          "rank {} was started as one of {} processes, process 0 as one of {}: start all with the "
          "same number",
          party.rank, party.size, reply.value));
    case Verdict::taken:
      throw UserError(fmt::format(
          "process 0 has met another rank {} before this one: give each process its own rank, and "
          "each of two runs at the same time its own MASTER_PORT",
          party.rank));
  }
  return Socket();
}

}  // namespace

std::vector<Socket> admit(const Socket& door, const Party& party, Clock::time_point until) {
  std::vector<Socket> here(static_cast<size_t>(party.size));
  std::vector<Visitor> visitors;
  std::vector<pollfd> polled;
  int missing = party.size - 1;
  while (missing > 0 && Clock::now() < until) {
    polled.assign(1, {door.fd(), POLLIN, 0});
    for (const Visitor& visitor : visitors) polled.push_back({visitor.socket.fd(), POLLIN, 0});
    poll(polled.data(), polled.size(), milliseconds_until(until));
    take_all(door, visitors);
    std::erase_if(visitors, [&](Visitor& visitor) {
      if (!listen_to(visitor.socket, visitor.hello, visitor.got)) return true;
      if (visitor.got >= sizeof kHello && visitor.hello.magic != kHello) return true;
      if (visitor.got < sizeof(Hello)) return Clock::now() > visitor.since + kPatience;
      const Reply reply = judge(visitor.hello, party, here);
      if (!say(visitor.socket, reply) || reply.verdict != Verdict::welcome) return true;
      set_blocking(visitor.socket, true);
      here[visitor.hello.rank] = std::move(visitor.socket);
      --missing;
      return true;
    });
  }
  return here;
}

Socket knock(const std::function<std::vector<Address>()>& addresses, const Party& party,
             Clock::time_point until) {
  std::string why = "the name service does not answer";
  for (auto pause = milliseconds(10);; pause = std::min(pause * 2, milliseconds(1000))) {
    for (const Address& address : addresses())
      if (Socket socket = try_to_enter(address, party, until, why)) {
        set_blocking(socket, true);
        return socket;
      }
    if (Clock::now() + pause >= until) break;
    std::this_thread::sleep_for(pause);
  }
  throw UserError(fmt::format(
      "rank {} has not met process 0 in time ({}): start all {} processes at the same time, and check "
      "that the hosts reach one another and that MASTER_ADDR is the host of process 0",
      party.rank, why, party.size));
}

}  // namespace mop::launch
