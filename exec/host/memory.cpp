#include "exec/host/memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace mop::host {
namespace {

namespace fs = std::filesystem;

// The number behind a name, of lines "name value ...".
std::optional<int64_t> number_of(const fs::path& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  for (int64_t value = 0; file >> word >> value; file.ignore(1 << 12, '\n'))
    if (word == name) return value;
  return std::nullopt;
}

int64_t of_meminfo(const fs::path& root, const std::string& name) {  // in bytes
  return number_of(root / "proc/meminfo", name).value_or(0) * 1024;
}

// A file of one number; nothing for "max".
std::optional<int64_t> number_in(const fs::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? std::optional(value) : std::nullopt;
}

// What a group leaves of its limit; pages of files that nothing uses come back when they are needed.
int64_t left_of(const fs::path& group) {
  const std::optional<int64_t> most = number_in(group / "memory.max"),
                               now = number_in(group / "memory.current");
  if (!most || !now) return std::numeric_limits<int64_t>::max();
  const int64_t files = number_of(group / "memory.stat", "inactive_file").value_or(0);
  return std::max<int64_t>(0, *most - *now + files);
}

}  // namespace

int64_t total_memory(const fs::path& root) {
  return of_meminfo(root, "MemTotal:");
}

int64_t available_memory(const fs::path& root) {
  int64_t left = of_meminfo(root, "MemAvailable:");
  const fs::path groups = root / "sys/fs/cgroup";
  std::ifstream file(root / "proc/self/cgroup");
  const std::string mark = "0::/";
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(mark)) continue;
    for (fs::path group = fs::path(line.substr(mark.size())); !group.empty(); group = group.parent_path())
      left = std::min(left, left_of(groups / group));
  }
  return std::min(left, left_of(groups));  // a container's own
}

bool memory_grows(const fs::path& root) {
  for (const char* driver : {"sys/bus/virtio/drivers/virtio_balloon", "sys/bus/virtio/drivers/virtio_mem"}) {
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(root / driver, ignored))
      if (entry.path().filename().string().starts_with("virtio")) return true;
  }
  return false;
}

}  // namespace mop::host
