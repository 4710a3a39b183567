// A validation suite: a TOML file that declares runs, and which of them are held out, before any is made.
//
//   data = "zipf.bin"            # what stands before the first section holds for every run
//   steps = 8
//   [qwen-mop-4k]                # a run: its name is the label of its measurement
//   held-out = true
//   model = "qwen3-30b-a3b"
//   gpus = 4
//   plan = "mop:optimizer=hbm"
//
// Keys: the flags of mop run that make a scenario, plan settings among them, with gpus, data, steps and seed;
// and held-out. More GPUs than a node of the cluster has are emulated nodes on one host.
#pragma once
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sim/predict/scenario.h"

namespace mop::validate {

// Before the name in a record's label: the file said so when the run was made.
inline constexpr std::string_view kHeldOut = "held-out/";

struct SuiteRun {
  std::string name;
  bool held_out = false;
  int64_t gpus = 1, steps = 100;  // as mop run has them
  std::vector<std::pair<std::string, std::string>>
      flags;                   // of mop run, in the file's order; the common ones first
  predict::Scenario scenario;  // with what is left to the planner still open

  std::string label() const { return (held_out ? std::string(kHeldOut) : "") + name; }
};

// Errors: UserError for a file that cannot be read, an unknown key (the nearest is suggested), a run that is
// no valid scenario, two of one name.
std::vector<SuiteRun> read_suite(const std::string& path);

// The name that a label gives, and whether it says held out.
std::pair<std::string, bool> parse_label(const std::string& label);

// A shell script that makes the runs on a host with GPUs, one line a run; results in `database`, timelines in
// the folder `traces`.
std::string commands(const std::vector<SuiteRun>& runs, const std::string& database,
                     const std::string& traces);

}  // namespace mop::validate
