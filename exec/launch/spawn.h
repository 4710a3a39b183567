// A run of several processes on this host, without any launcher.
#pragma once
#include <chrono>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace mop::launch {

// Variables of a process's environment, beside ours and its place.
using Environment = std::vector<std::pair<std::string, std::string>>;

// Starts this same program so many times with these arguments (after the program's name), each with its Place
// in the environment, and waits for all. Process 0 has our standard output, the others' goes nowhere;
// standard error is everybody's. Each has an equal share of the cores, where there are enough. SIGINT and
// SIGTERM are handed on, once each: the processes are in groups of their own, out of the reach of Ctrl-C.
// They do not outlive the calling thread.
//
// When one fails, the others have `patience` to end, as Peers make them; then they are killed. The user is
// told once what ended the run: the signal that ended a process, or what the Peers report.
//
// more: what a rank's environment has beside that; nothing where there is no such function.
//
// Returns 2 when one exited with 2, the status of all when that is the same, else 1. Call it before any other
// thread starts. Errors: UserError when the system starts no more processes.
int spawn(int processes, std::span<const std::string> arguments,
          std::chrono::seconds patience = std::chrono::seconds(30),
          const std::function<Environment(int rank)>& more = {});

}  // namespace mop::launch
