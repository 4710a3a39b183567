#include "exec/launch/star.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <thread>
#include <utility>

#include "exec/launch/meet.h"
#include "sim/base/error.h"

namespace mop::launch {
namespace {

// Where process 0 waits for another set of connections.
struct Invitation {
  uint64_t key = 0;
  int32_t port = 0;
};

template <typename T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

}  // namespace

Star::Star(int rank, int size, std::vector<Socket> connections, std::shared_ptr<Watch> watch)
    : rank_(rank), size_(size), connections_(std::move(connections)), watch_(std::move(watch)) {}

void Star::send(int to, std::span<const std::byte> bytes) {
  const uint64_t length = bytes.size();
  if (!send_all(with(to), bytes_of(length)) || !send_all(with(to), bytes)) broken(to);
}

std::vector<std::byte> Star::receive(int from) {
  uint64_t length = 0;
  if (!receive_all(with(from), std::as_writable_bytes(std::span(&length, 1)))) broken(from);
  std::vector<std::byte> bytes(length);
  if (!receive_all(with(from), bytes)) broken(from);
  return bytes;
}

std::vector<std::byte> Star::broadcast(std::span<const std::byte> bytes) {
  if (rank_ != 0) return receive(0);
  for (int rank = 1; rank < size_; ++rank) send(rank, bytes);
  return {bytes.begin(), bytes.end()};
}

std::vector<std::vector<std::byte>> Star::gather(std::span<const std::byte> bytes) {
  std::vector<std::vector<std::byte>> all;
  if (rank_ != 0) {
    send(0, bytes);
    return all;
  }
  all.emplace_back(bytes.begin(), bytes.end());
  for (int rank = 1; rank < size_; ++rank) all.push_back(receive(rank));
  return all;
}

void Star::barrier() {
  gather({});
  broadcast({});
}

std::vector<Socket> Star::connect_again(Clock::time_point until) {
  if (rank_ == 0) {
    // As the others reached the door before.
    const bool loopback = std::ranges::all_of(connections_, [](const Socket& one) {
      return !one || (own_address(one).storage.ss_family == AF_INET && own_address(one).loopback());
    });
    const Socket door = listen_at(0, loopback);
    if (!door)
      throw UserError(fmt::format("process 0 cannot listen at any port: {}; raise the limit (ulimit -n)",
                                  std::strerror(errno)));
    std::random_device random;
    const Invitation invitation{uint64_t{random()} << 32 | random(), own_address(door).port()};
    broadcast(bytes_of(invitation));
    return admit(door, {0, size_, invitation.key}, until);
  }
  Invitation invitation;
  const std::vector<std::byte> heard = broadcast({});
  ensure(heard.size() == sizeof invitation, "all processes make another channel at the same time");
  std::memcpy(&invitation, heard.data(), sizeof invitation);
  Address center = other_address(with(0));
  center.set_port(invitation.port);
  std::vector<Socket> connections;
  connections.push_back(knock([&] { return std::vector{center}; }, {rank_, size_, invitation.key},
                              std::min(until, Clock::now() + std::chrono::seconds(60))));
  return connections;
}

std::unique_ptr<Peers> Star::channel() {
  // Process 0 need not give up: who does not come ends the run.
  return std::make_unique<Star>(rank_, size_, connect_again(Clock::time_point::max()), watch_);
}

void Star::abandon(const std::string& reason, int status) {
  watch_->abandon(reason, status);
}

void Star::broken(int rank) {
  const int error = errno;
  const std::string why = error == 0 ? "it hung up" : std::strerror(error);
  if (!watch_)
    throw UserError(
        fmt::format("rank {} lost rank {} while the run started ({}): see its messages, and start again",
                    rank_, rank, why));
  // Most often because the process is lost: then the watch knows by now or soon, and ends this one.
  std::this_thread::sleep_for(std::chrono::seconds(10));
  abandon(fmt::format("the connection with rank {} broke ({})", rank, why), 1);
}

}  // namespace mop::launch
