// Text for people: aligned tables and a progress bar.
#pragma once
#include <chrono>
#include <cstddef>
#include <string>
#include <vector>

namespace mop::cli {

class TextTable {
 public:
  // alignment: a letter a column, l or r.
  TextTable(std::vector<std::string> header, std::string alignment);
  void add(std::vector<std::string> row);
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  std::string alignment_;
};

std::string percent(double fraction);  // "41.2 %"

// A bar on the terminal that standard error is; nothing where it is none.
class Progress {
 public:
  explicit Progress(std::string what);
  ~Progress();  // clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void show(size_t done, size_t total);

 private:
  std::string what_;
  bool terminal_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace mop::cli
