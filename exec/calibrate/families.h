// What mop calibrate measures, family by family, and how long each may take.
#pragma once
#include <span>
#include <string>
#include <vector>

namespace mop::calibrate {

struct Family {
  const char* name;
  const char* what;
  int seconds;    // at most: what has not been measured by then is left out, and said
  bool emulated;  // in processes of their own, that NCCL takes for two hosts
};

std::span<const Family> families();  // in the order in which they run

// "matmul,attention": those; empty: all. Errors: UserError with the nearest name.
std::vector<std::string> parse_families(const std::string& text);
bool any_of(const std::vector<std::string>& names, bool emulated);

// Seconds that they take at most on `gpus` GPUs, starting and ending included.
int longest(const std::vector<std::string>& names, int gpus);

}  // namespace mop::calibrate
