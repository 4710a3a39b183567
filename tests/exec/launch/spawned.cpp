// A program that spawns itself, for spawn_test: spawned PROCESSES PATIENCE WHAT ARGUMENTS.
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "exec/launch/peers.h"
#include "exec/launch/place.h"
#include "exec/launch/spawn.h"

namespace {

using namespace mop::launch;

std::atomic<int> signals = 0;

std::string cores() {
  cpu_set_t set;
  std::string all;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return "?";
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &set)) all += fmt::format("{} ", core);
  return all;
}

int act(const Place& place, std::span<const std::string> arguments) {
  const std::string what = arguments[0];
  const auto number = [&](size_t i) { return std::stoi(arguments[i]); };
  const auto mine = static_cast<size_t>(place.rank) + 1;
  if (what == "exit") return number(mine);
  if (what == "die") {  // before anybody has met: rank, signal
    if (place.rank == number(1)) raise(number(2));
    while (true) pause();
  }
  const std::unique_ptr<Peers> peers = connect(place);
  const auto say = [&](const std::string& text) {
    fmt::print("{}", text);
    std::fflush(stdout);
  };
  if (what == "say") {
    say(fmt::format("{} {}/{} {}\n", place.launcher, place.rank, place.size, arguments[1]));
  } else if (what == "host") {  // what main gives to each
    const char* const name = std::getenv("SPAWNED_HOST");
    const std::string own = name == nullptr ? "none" : name;
    for (const auto& one : peers->gather(std::as_bytes(std::span(own)))) say(text_of(one) + "\n");
  } else if (what == "cores") {
    const std::string own = cores();
    for (const auto& one : peers->gather(std::as_bytes(std::span(own)))) say(text_of(one) + "\n");
  } else if (what == "die-late") {  // rank, signal
    peers->barrier();
    if (place.rank == number(1)) raise(number(2));
    while (true) pause();
  } else if (what == "return-late") {  // rank, status
    peers->barrier();
    if (place.rank == number(1)) _exit(number(2));
    while (true) pause();
  } else if (what == "abandon") {
    peers->barrier();
    if (place.rank == number(1)) peers->abandon("out of GPU memory");
    while (true) pause();
  } else if (what == "count") {  // the signals that come
    for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { ++signals; });
    peers->barrier();
    say("ready\n");
    while (signals == 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    return signals == 1 ? 0 : 5;
  } else if (what == "hang") {
    const pid_t pid = getpid();
    for (const auto& one : peers->gather(std::as_bytes(std::span(&pid, 1)))) {
      pid_t other = 0;
      std::memcpy(&other, one.data(), sizeof other);
      say(fmt::format("{} ", other));
    }
    say("ready\n");
    while (true) pause();
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::optional<Place> place = place_of([](const char* name) { return std::getenv(name); });
  if (place) return act(*place, std::span(arguments).subspan(2));
  return spawn(std::stoi(arguments[0]), arguments, std::chrono::seconds(std::stoi(arguments[1])),
               [](int rank) {
                 return Environment{{"SPAWNED_HOST", fmt::format("host {}", rank / 2)}};
               });
}
