// The flags that every command shares: the scenario, the plan's knobs, the form of the answer, where it is
// stored.
#pragma once
#include <CLI/App.hpp>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sim/predict/scenario.h"
#include "sim/store/store.h"

namespace mop::cli {

class Flags {
 public:
  // What a command takes: one value a setting, or lists and ranges of some.
  enum class Values { one, contexts, all };
  // Knob flags are listed by the help of `mop show plan` only; everywhere else it refers there.
  enum class Knobs { listed, unlisted };

  // plans: what --plan is when it is not given.
  Flags(CLI::App& command, Values values, std::vector<std::string> plans, Knobs knobs = Knobs::unlisted);
  Flags(const Flags&) = delete;  // the parser writes into it
  Flags& operator=(const Flags&) = delete;

  // Takes what the scenario file says where no flag was given. To be called before anything else.
  // Errors: UserError for a file that cannot be read and an unknown key (the nearest is suggested).
  void read_file();

  const std::string& text(const std::string& setting) const;  // as typed
  bool given(const std::string& setting) const;               // by flag or file
  bool typed(const std::string& setting) const;               // by flag
  // Whether the flag of a plan setting counts beside this plan, which may set it, too: what was typed wins
  // over the file. Errors: UserError where both were typed, or both are in the file.
  bool counts(const std::string& plan, const std::string& knob) const;
  const std::vector<std::string>& plans() const { return plans_; }
  const std::map<std::string, std::string>& knobs() const { return knobs_; }  // those that were given
  bool json() const { return format_ == "json"; }

  // One scenario of the settings but those named in `except`; the plan has its knobs. Errors: UserError.
  predict::Scenario scenario(const std::vector<std::string>& except = {}) const;
  // One of plans() with the knobs that its family has.
  plan::Plan plan(const std::string& text) const;
  // Throws UserError when a knob flag belongs to no plan at all.
  void check_knobs() const;

  std::optional<store::Store> open_store() const;  // empty when the user wants nothing stored
  const std::string& database() const { return database_; }

 private:
  CLI::App* command_;
  std::map<std::string, std::string> settings_, knob_texts_, knobs_;
  std::vector<std::string> plans_;
  std::string format_ = "table", database_ = "results.db", file_;
  bool no_store_ = false;
  std::set<std::string> from_file_;  // flags that the scenario file gave
};

// "unknown flag '--modle'; did you mean '--model'?": unknown_name without the list of all that is known,
// which is long.
std::string unknown_of_many(std::string_view what, std::string_view name, std::span<const std::string> known);

// Throws UserError with the nearest form.
void check_format(const std::string& format, const std::vector<std::string>& known);

}  // namespace mop::cli
