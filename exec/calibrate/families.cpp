#include "exec/calibrate/families.h"

#include <algorithm>
#include <array>
#include <sstream>

#include "sim/base/error.h"
#include "sim/base/suggest.h"

namespace mop::calibrate {
namespace {

constexpr int kStart = 20;  // of a set of processes: contexts, memory, communicators

constexpr std::array kFamilies{
    Family{"memory", "HBM that contexts, libraries, communicators and mapped arenas take", 15, false},
    Family{"matmul", "dense products and weight gradients", 45, false},
    Family{"grouped", "products of experts and their weight gradients", 29, false},
    Family{"attention", "causal attention with grouped queries, windows and sinks, and of MLA's widths", 41,
           false},
    Family{"kernels", "memory-bound kernels, each by itself", 18, false},
    Family{"launch", "CPU time of a launch, device time of a tiny kernel", 5, false},
    Family{"adam", "the CPU's AdamW, one process alone, all at once, and beside copies", 25, false},
    Family{"collectives", "NCCL in groups of every size", 26, false},
    Family{"copy-engines", "all-gathers and reduce-scatters by copy engines in groups of every size", 15,
           false},
    Family{"copies", "copies from and to the host by one, two and all GPUs", 20, false},
    Family{"interference", "kernels beside collectives and copies, and the other way round", 24, false},
    Family{"power", "watts and clock under one kind of kernels, in a row, among others and in bursts", 30,
           false},
    Family{"network", "NCCL between two halves of the GPUs that it takes for two hosts", 25, true},
};

}  // namespace

std::span<const Family> families() {
  return kFamilies;
}

std::vector<std::string> parse_families(const std::string& text) {
  std::vector<std::string> known, chosen;
  for (const Family& family : kFamilies) known.emplace_back(family.name);
  if (text.empty()) return known;
  std::istringstream list(text);
  for (std::string name; std::getline(list, name, ',');) {
    if (std::ranges::find(known, name) == known.end())
      throw UserError(unknown_name("benchmark", name, known));
    chosen.push_back(name);
  }
  if (chosen.empty()) throw UserError("--only names no benchmark; leave it out for all of them");
  // Products and attention are tabled at the largest clock, and what a step's clock is comes from power.
  const auto has = [&](const char* name) { return std::ranges::find(chosen, name) != chosen.end(); };
  constexpr std::array kClocked{"matmul", "grouped", "attention", "power"};
  if (std::ranges::any_of(kClocked, has))
    for (const char* name : kClocked)
      if (!has(name)) chosen.emplace_back(name);
  return chosen;
}

bool any_of(const std::vector<std::string>& names, bool emulated) {
  return std::ranges::any_of(kFamilies, [&](const Family& f) {
    return f.emulated == emulated && std::ranges::find(names, f.name) != names.end();
  });
}

int longest(const std::vector<std::string>& names, int gpus) {
  int seconds = 0;
  for (const bool emulated : {false, true}) {
    if (emulated && gpus < 2) continue;
    if (any_of(names, emulated)) seconds += kStart;
    for (const Family& f : kFamilies)
      if (f.emulated == emulated && std::ranges::find(names, f.name) != names.end()) seconds += f.seconds;
  }
  return seconds;
}

}  // namespace mop::calibrate
