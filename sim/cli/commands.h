// Adds the commands to the program, a file a command. Each runs as a callback of its CLI::App, after the
// whole command line has been read, and throws UserError, InternalError, Interrupted or Ended.
#pragma once
#include <CLI/App.hpp>
#include <string>
#include <vector>

namespace mop::cli {

struct Invocation {
  std::string command_line;        // as it can be typed again
  std::vector<std::string> words;  // what follows the program's name
};

// The user pressed Ctrl-C; the message says how to go on. Exit status kInterrupted.
inline constexpr int kInterrupted = 130;
struct Interrupted {
  std::string message;
};

// mop validate: the measurements are there, and the predictions of them are further off than the bounds
// allow.
inline constexpr int kBoundsBroken = 3;

// The command ended otherwise, and has said why.
struct Ended {
  int status = 1;
};

void add_simulate(CLI::App& program, const Invocation& invocation);
void add_compare(CLI::App& program, const Invocation& invocation);
void add_sweep(CLI::App& program, const Invocation& invocation);
void add_show_model(CLI::App& show);
void add_show_cluster(CLI::App& show);
void add_show_plan(CLI::App& show);
void add_show_program(CLI::App& show);
void add_results(CLI::App& program);
void add_validate(CLI::App& program);
void add_what_if(CLI::App& program);

}  // namespace mop::cli
