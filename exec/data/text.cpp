#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "exec/data/mapped_file.h"
#include "exec/data/tokens.h"
#include "sim/base/error.h"

namespace mop::data {
namespace {

namespace fs = std::filesystem;

bool indexed(const fs::path& path) {
  return path.extension() == ".bin" || path.extension() == ".idx";
}

std::vector<fs::path> files_of(const fs::path& folder) {
  std::vector<fs::path> files;
  for (auto entry = fs::recursive_directory_iterator(folder); entry != fs::recursive_directory_iterator();
       ++entry) {
    if (entry->path().filename().string().starts_with('.')) {
      entry.disable_recursion_pending();
      continue;
    }
    if (!entry->is_regular_file()) continue;
    if (indexed(entry->path()))
      throw UserError(fmt::format("{} is a folder of text, but holds {}; give one .idx file, or move it away",
                                  folder.string(), entry->path().string()));
    files.push_back(entry->path());
  }
  std::ranges::sort(files);
  return files;
}

class Text final : public Tokens {
 public:
  explicit Text(const std::string& path) : name_(path) {
    if (!fs::is_directory(path))
      add(path);
    else
      for (const fs::path& file : files_of(path)) add(file);
  }

  const std::string& name() const override { return name_; }
  int64_t documents() const override { return static_cast<int64_t>(files_.size()); }
  int64_t begin(int64_t document) const override { return begins_[static_cast<size_t>(document)]; }

  void read(int64_t first, std::span<int32_t> out) const override {
    auto file = static_cast<size_t>(std::ranges::upper_bound(begins_, first) - begins_.begin()) - 1;
    for (auto to = out.begin(); to != out.end(); ++file) {
      const auto bytes = files_[file].bytes().subspan(static_cast<size_t>(first - begins_[file]));
      const auto count = std::min(static_cast<std::ptrdiff_t>(bytes.size()), out.end() - to);
      to = std::transform(bytes.begin(), bytes.begin() + count, to,
                          [](std::byte byte) { return std::to_integer<int32_t>(byte); });
      first += count;
    }
  }

 private:
  void add(const fs::path& path) {
    MappedFile file(path);
    if (file.bytes().empty()) return;
    begins_.push_back(begins_.back() + static_cast<int64_t>(file.bytes().size()));
    files_.push_back(std::move(file));
  }

  std::string name_;
  std::vector<MappedFile> files_;
  std::vector<int64_t> begins_{0};
};

}  // namespace

std::unique_ptr<Tokens> open_text(const std::string& path) try {
  return std::make_unique<Text>(path);
} catch (const fs::filesystem_error& error) {
  throw UserError(fmt::format("cannot read the folder {}: {}; check the name and its permissions",
                              error.path1().string(), error.code().message()));
}

}  // namespace mop::data
