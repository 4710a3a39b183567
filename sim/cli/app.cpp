#include "sim/cli/app.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <system_error>

#include "sim/base/error.h"
#include "sim/base/suggest.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"

namespace mop::cli {

const char* const kVersion = MOP_VERSION;

namespace {

std::string quoted(const std::string& word) {
  constexpr const char* plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=.,:/@%+";
  if (!word.empty() && word.find_first_not_of(plain) == std::string::npos) return word;
  std::string result = "'";
  for (const char c : word) result.append(c == '\'' ? "'\\''" : std::string(1, c));
  result += '\'';
  return result;
}

std::string command_line(int argc, char** argv) {
  std::string line = "mop";
  for (int i = 1; i < argc; ++i) line.append(" ").append(quoted(argv[i]));
  return line;
}

// The parser takes "--db=" for a flag whose value follows; what was meant is an empty one. Last word first.
std::vector<std::string> words(int argc, char** argv) {
  std::vector<std::string> reversed;
  for (int i = argc - 1; i > 0; --i) {
    const std::string_view word = argv[i];
    const bool empty_value = word.starts_with("--") && word.find('=') == word.size() - 1;
    if (empty_value) reversed.emplace_back();
    reversed.emplace_back(empty_value ? word.substr(0, word.size() - 1) : word);
  }
  return reversed;
}

// The command that the user was in when the parser gave up.
const CLI::App& innermost(const CLI::App& app) {
  const auto parsed = app.get_subcommands();
  return parsed.empty() ? app : innermost(*parsed.back());
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands(nullptr)) names.push_back(command->get_name());
  return names;
}

std::vector<std::string> flag_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  std::ranges::sort(names);
  return names;
}

std::string path_of(const CLI::App& app) {
  return app.get_parent() == nullptr ? app.get_name() : path_of(*app.get_parent()) + " " + app.get_name();
}

// One line for what the parser did not like.
std::string explain(const CLI::App& program, const CLI::ParseError& error) {
  const CLI::App& command = innermost(program);
  const std::string help = fmt::format("see {} --help", path_of(command));
  const std::vector<std::string> extras = program.remaining(true), commands = command_names(command);
  const bool missing_command =
      dynamic_cast<const CLI::RequiredError*>(&error) != nullptr && !commands.empty();
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr || (missing_command && !extras.empty())) {
    const auto flag =
        std::ranges::find_if(extras, [](const std::string& word) { return word.starts_with("-"); });
    if (flag != extras.end())
      return fmt::format(
          "{}; {}", unknown_of_many("flag", flag->substr(0, flag->find('=')), flag_names(command)), help);
    if (!commands.empty()) return unknown_name("command", extras.front(), commands);
    return fmt::format("'{}' follows no flag that takes it; write it like --model kimi-k2, or {}",
                       extras.front(), help);
  }
  if (missing_command)
    return fmt::format("no command is given; {} takes one of: {}", path_of(command),
                       fmt::join(commands, ", "));
  const std::string_view what = error.what();
  if (const size_t flag = what.find("--");  // "Could not convert: --from = abc"
      dynamic_cast<const CLI::ConversionError*>(&error) != nullptr && flag != std::string_view::npos)
    return fmt::format("{} is not what the flag takes; {}", what.substr(flag), help);
  return fmt::format("{}; {}", what, help);
}

void build(CLI::App& program, const Invocation& invocation, std::span<const AddCommand> more) {
  program.set_version_flag("--version", fmt::format("mop {}", kVersion), "print the version");
  program.require_subcommand(1);
  program.footer(
      "Example:\n"
      "  mop compare --model kimi-k2 --cluster h200 --nodes 12 --context 128K..1M --plan fsdp2-best --plan "
      "mop\n"
      "Every command has examples of its own: mop simulate --help.");
  add_simulate(program, invocation);
  add_compare(program, invocation);
  add_sweep(program, invocation);
  CLI::App* show =
      program.add_subcommand("show", "what was understood: model, cluster, plan or step program");
  show->require_subcommand(1);
  show->footer("Example:\n  mop show model --model kimi-k2");
  add_show_model(*show);
  add_show_cluster(*show);
  add_show_plan(*show);
  add_show_program(*show);
  add_results(program);
  add_validate(program);
  add_what_if(program);
  for (const AddCommand add : more) add(program, invocation);
}

// Always one line, whatever bytes the user's words have.
int fail(int status, std::string message) {
  std::ranges::replace_if(
      message, [](char c) { return static_cast<unsigned char>(c) < ' '; }, '?');
  std::fflush(stdout);
  fmt::print(stderr, "mop: {}\n", message);
  return status;
}

}  // namespace

int run(int argc, char** argv, std::span<const AddCommand> more) {
  const Invocation invocation{command_line(argc, argv), {argv + 1, argv + argc}};
  CLI::App program(
      "Predicts memory and step time of training Mixture-of-Experts models on GPU clusters, and trains them.",
      "mop");
  try {
    build(program, invocation, more);
    try {
      program.parse(words(argc, argv));
    } catch (const CLI::Success& help) {
      program.exit(help);
    } catch (const CLI::ParseError& error) {
      throw UserError(explain(program, error));
    }
    if (std::fflush(stdout) != 0) throw UserError("standard output cannot be written (is the disk full?)");
    return 0;
  } catch (const UserError& error) {
    return fail(2, fmt::format("error: {}", error.what()));
  } catch (const Interrupted& interrupted) {
    return fail(kInterrupted, interrupted.message);
  } catch (const Ended& ended) {
    return std::fflush(stdout) == 0 ? ended.status
                                    : fail(2, "error: standard output cannot be written (is the disk full?)");
  } catch (const std::system_error& error) {  // of fmt::print
    return fail(2, fmt::format("error: standard output cannot be written: {}", error.code().message()));
  } catch (const std::exception& error) {
    return fail(1, fmt::format("internal error: {}; please report it with the command line", error.what()));
  }
}

}  // namespace mop::cli
