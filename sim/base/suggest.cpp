#include "sim/base/suggest.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace mop {
namespace {

// Levenshtein distance: the number of single-character edits between two names.
size_t edits(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({substitute, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string unknown_name(std::string_view what, std::string_view name, std::span<const std::string> known) {
  std::string hint;
  size_t best = std::max<size_t>(3, name.size() / 2) + 1;
  for (const std::string& candidate : known) {
    const size_t distance = edits(name, candidate);
    if (distance < best) {
      best = distance;
      hint = candidate;
    }
  }
  std::string message = fmt::format("unknown {} '{}'", what, name);
  if (!hint.empty()) message += fmt::format("; did you mean '{}'?", hint);
  return message + fmt::format("; known: {}", fmt::join(known, ", "));
}

}  // namespace mop
