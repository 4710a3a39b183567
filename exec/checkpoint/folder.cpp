#include "exec/checkpoint/folder.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <optional>
#include <string_view>

namespace mop::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kStep = "step-", kTemporary = ".tmp-";

std::optional<int64_t> number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

std::optional<int64_t> step_of(const std::string& name) {
  return name.starts_with(kStep) ? number(std::string_view(name).substr(kStep.size())) : std::nullopt;
}

// Processes that wrote here may have run in another container: one with our own number is not us, as we have
// written nothing yet.
bool runs(int64_t process) {
  return process != getpid() && (kill(static_cast<pid_t>(process), 0) == 0 || errno != ESRCH);
}

}  // namespace

std::string step_name(int64_t step) {
  return fmt::format("{}{:06}", kStep, step);
}

std::string rank_name(size_t rank) {
  return fmt::format("rank-{:05}.bin", rank);
}

std::vector<fs::path> checkpoints(const fs::path& folder, int64_t below) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code missing;
  for (const auto& entry : fs::directory_iterator(folder, missing))
    if (const auto step = step_of(entry.path().filename().string()); step && *step < below)
      found.emplace_back(*step, entry.path());
  std::ranges::sort(found);
  std::vector<fs::path> paths;
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

fs::path temporary(const fs::path& checkpoint) {
  return fs::path(checkpoint) += fmt::format("{}{}", kTemporary, getpid());
}

void remove_leftovers(const fs::path& folder) {
  std::error_code ignored;  // a leftover costs space only
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    const size_t dot = name.find(kTemporary);
    if (dot == std::string::npos || !step_of(name.substr(0, dot))) continue;
    const auto process = number(std::string_view(name).substr(dot + kTemporary.size()));
    if (process && !runs(*process)) fs::remove_all(entry.path(), ignored);
  }
}

}  // namespace mop::checkpoint
