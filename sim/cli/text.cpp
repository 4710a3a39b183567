#include "sim/cli/text.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "sim/base/quantity.h"

namespace mop::cli {

TextTable::TextTable(std::vector<std::string> header, std::string alignment)
    : alignment_(std::move(alignment)) {
  rows_.push_back(std::move(header));
}

void TextTable::add(std::vector<std::string> row) {
  rows_.push_back(std::move(row));
}

std::string TextTable::text() const {
  std::vector<size_t> width(alignment_.size(), 0);
  for (const auto& row : rows_)
    for (size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  std::string result;
  for (const auto& row : rows_) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c)
      line += alignment_[c] == 'r' ? fmt::format("  {:>{}}", row[c], width[c])
                                   : fmt::format("  {:<{}}", row[c], width[c]);
    line.erase(line.find_last_not_of(' ') + 1);
    result.append(line).append("\n");
  }
  return result;
}

std::string percent(double fraction) {
  return fmt::format("{:.1f} %", 100 * fraction);
}

Progress::Progress(std::string what)
    : what_(std::move(what)),
      terminal_(isatty(STDERR_FILENO) != 0),
      begin_(std::chrono::steady_clock::now()) {}

Progress::~Progress() {
  if (terminal_) fmt::print(stderr, "\r\033[K");
}

void Progress::show(size_t done, size_t total) {
  if (!terminal_ || total == 0) return;
  constexpr size_t width = 30;
  const size_t filled = width * done / total;
  const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  const std::string left =
      done == 0
          ? ""
          : ", " + format_seconds(spent / static_cast<double>(done) * static_cast<double>(total - done)) +
                " left";
  fmt::print(stderr, "\r\033[K{} [{:#<{}}{:.<{}}] {}/{}{}", what_, "", filled, "", width - filled, done,
             total, left);
  std::fflush(stderr);
}

}  // namespace mop::cli
