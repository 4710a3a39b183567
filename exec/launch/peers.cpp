#include "exec/launch/peers.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "exec/launch/meet.h"
#include "exec/launch/socket.h"
#include "exec/launch/star.h"
#include "exec/launch/tell.h"
#include "exec/launch/watch.h"
#include "sim/base/error.h"

namespace mop::launch {
namespace {

using std::chrono::seconds;

constexpr auto kStart = seconds(10);  // for what is said when all have met

class Alone final : public Peers {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::vector<std::byte> broadcast(std::span<const std::byte> bytes) override {
    return {bytes.begin(), bytes.end()};
  }
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> bytes) override {
    return {broadcast(bytes)};
  }
  void barrier() override {}
  std::unique_ptr<Peers> channel() override { return alone(); }
  [[noreturn]] void abandon(const std::string& reason, int status) override {
    std::fflush(stdout);
    tell("error: " + reason);
    _exit(status);
  }
};

bool on_this_host(const Place& place) {
  return place.address == "127.0.0.1" || place.address == "localhost";
}

Socket open_door(const Place& place) {
  Socket door = listen_at(place.port, on_this_host(place));
  if (!door && errno == EADDRINUSE)
    throw UserError(fmt::format("port {} of this host is in use, perhaps by another run: {}", place.port,
                                place.launcher == "torchrun" ? "give torchrun another --master-port"
                                : place.launcher == "mop"
                                    ? "start again, which chooses another"
                                    : "set MASTER_PORT to a free one for all processes"));
  if (!door)
    throw UserError(
        fmt::format("process 0 cannot listen at port {}: {}; set MASTER_PORT to another for all processes",
                    place.port, std::strerror(errno)));
  return door;
}

bool any_missing(const std::vector<Socket>& connections) {
  return !std::ranges::all_of(connections.begin() + 1, connections.end(), &Socket::operator bool);
}

// "ranks 1, 3 and 6 more"
std::string ranks_without(const std::vector<Socket>& connections) {
  constexpr size_t kNamed = 8;
  std::vector<size_t> missing;
  for (size_t rank = 1; rank < connections.size(); ++rank)
    if (!connections[rank]) missing.push_back(rank);
  std::string text = missing.size() == 1 ? "rank" : "ranks";
  for (size_t i = 0; i < std::min(missing.size(), kNamed); ++i)
    text += fmt::format("{} {}", i == 0 ? "" : ",", missing[i]);
  if (missing.size() > kNamed) text += fmt::format(" and {} more", missing.size() - kNamed);
  return text;
}

// Process 0 says who is missing, or nothing.
std::unique_ptr<Star> meet(const Place& place, int patience) {
  const Party party{place.rank, place.size, place.run};
  const auto until = Clock::now() + seconds(patience);
  if (place.rank != 0) {
    std::vector<Socket> connections;
    connections.push_back(knock([&] { return addresses_of(place.address, place.port); }, party, until));
    set_timeout(connections.front(), seconds(patience) + kStart);  // process 0 may have begun later
    auto star = std::make_unique<Star>(place.rank, place.size, std::move(connections), nullptr);
    if (const std::string trouble = text_of(star->receive(0)); !trouble.empty()) throw UserError(trouble);
    return star;
  }
  std::vector<Socket> connections = admit(open_door(place), party, until);
  std::string trouble;
  if (any_missing(connections))
    trouble = fmt::format(
        "after {} s {} of {} processes have not come to {} port {}: start all at the same time, and check "
        "that they reach that host",
        patience, ranks_without(connections), place.size, place.address, place.port);
  std::vector<int> here;
  for (int rank = 1; rank < place.size; ++rank)
    if (const Socket& one = connections[static_cast<size_t>(rank)]) {
      set_timeout(one, kStart);
      here.push_back(rank);
    }
  auto star = std::make_unique<Star>(0, place.size, std::move(connections), nullptr);
  for (const int rank : here) star->send(rank, std::as_bytes(std::span(trouble)));
  if (!trouble.empty()) throw UserError(trouble);
  return star;
}

// Who everybody is and where its lifeline can be reached from here.
std::vector<Member> introduce(Star& star, const Socket& lifeline) {
  Member own;
  gethostname(own.host, sizeof own.host - 1);
  own.pid = getpid();
  own.lifeline = own_address(lifeline);
  const auto introductions = star.gather(std::as_bytes(std::span(&own, 1)));
  std::vector<Member> members(static_cast<size_t>(star.size()));
  for (size_t rank = 0; rank < introductions.size(); ++rank) {
    Member& member = members[rank];
    ensure(introductions[rank].size() == sizeof member, "processes introduce themselves");
    std::memcpy(&member, introductions[rank].data(), sizeof member);
    if (rank == 0) continue;
    const int port = member.lifeline.port();
    member.lifeline = other_address(star.connections()[rank]);
    member.lifeline.set_port(port);
  }
  const std::vector<std::byte> all = star.broadcast(std::as_bytes(std::span(members)));
  ensure(all.size() == members.size() * sizeof(Member), "process 0 introduces everybody");
  std::memcpy(members.data(), all.data(), all.size());
  if (star.rank() == 0) return members;
  for (Member& member : members) {
    if (!member.lifeline.loopback()) continue;  // else as process 0 reaches it: on its own host
    const int port = member.lifeline.port();
    member.lifeline = other_address(star.connections().front());
    member.lifeline.set_port(port);
  }
  return members;
}

}  // namespace

std::unique_ptr<Peers> alone() {
  return std::make_unique<Alone>();
}

std::unique_ptr<Peers> connect(const Place& place, int patience) {
  ensure(place.rank >= 0 && place.rank < place.size, "a process has its place in a run");
  if (place.size == 1) return alone();
  std::unique_ptr<Star> star = meet(place, patience);
  for (const Socket& one : star->connections())
    if (one) set_timeout(one, kStart);
  Socket lifeline = listen_at(0, on_this_host(place));
  if (!lifeline)
    throw UserError(fmt::format("rank {} cannot listen at any port: {}; raise the limit (ulimit -n)",
                                place.rank, std::strerror(errno)));
  std::vector<Member> members = introduce(*star, lifeline);
  std::vector<Socket> watched = star->connect_again(Clock::now() + kStart);
  if (place.rank == 0 && any_missing(watched))
    throw UserError(fmt::format(
        "{} of {} processes stopped answering while the run started: see their messages, and start "
        "again",
        ranks_without(watched), place.size));
  for (const Socket& one : star->connections())
    if (one) set_timeout(one, seconds(0));
  star->set_watch(std::make_shared<Watch>(place.rank, std::move(members), std::move(watched),
                                          std::move(lifeline), place.reports));
  return star;
}

}  // namespace mop::launch
