// What the benchmarks found, as process 0 hands it to the command.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace mop::calibrate {

// The smallest and the largest of what all ranks measured in all repeats are said as shares of the value.
struct Reading {
  double value = 0, low = 1, high = 1;
};
Reading reading_of(std::vector<double> values);  // the median; at least one
// Of rates, by rank: the median of the slowest rank that measured, as the ranks of a step wait for one
// another.
Reading slowest(const std::vector<std::vector<double>>& rates);

// Of work that others may disturb for seconds, one run after the other: the rate of all of them, and those of
// pieces of a quarter of a second. Nothing in either where nothing ran.
struct Rates {
  std::vector<double> mean, shown;
};
Rates rates_of(const std::vector<double>& seconds, double amount);  // of each run; amount: of one run
// The median of the means, between the smallest and the largest piece; of what all ranks had.
Reading mean_of(const Rates& rates);

struct FoundFigure {
  Reading reading;
  std::string what;
};
struct FoundTable {
  std::string what;
  std::vector<std::pair<std::vector<double>, Reading>> points;  // coordinates, and the value there
};

struct Findings {
  std::string machine;                   // "4 x NVIDIA H200 (139.8 GiB)"
  std::string libraries;                 // cuda::check_libraries
  std::vector<std::string> cut_short;    // what there was no time for
  std::vector<std::string> unsupported;  // shapes that a library has no kernel for
  std::map<std::string, FoundFigure> figures;
  std::map<std::string, FoundTable> tables;
  std::map<std::string, double> seconds;  // that each family took

  void add(Findings more);  // names are different; the machine stays the first one
};

std::string to_json(const Findings& findings);
// Errors: InternalError for text that to_json has not made.
Findings from_json(const std::string& text);

}  // namespace mop::calibrate
