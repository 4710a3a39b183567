// Reads a checkpoint, whatever the number of ranks that wrote it.
#pragma once
#include <atomic>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "exec/checkpoint/manifest.h"
#include "exec/data/mapped_file.h"

namespace mop::checkpoint {

// Reading is safe from several threads at once.
class Reader {
 public:
  // Maps the files of a checkpoint. Errors: UserError when the manifest or a rank's file is missing, damaged
  // or not as long as it should be. Contents are checked when they are read.
  explicit Reader(const std::filesystem::path& checkpoint);

  const State& state() const { return manifest_.state; }
  const std::filesystem::path& path() const { return path_; }
  bool has(program::FlatGroup flat, What what) const { return covers_.contains({flat, what}); }

  // Elements [first, first + out.size()) of a flat group as the saving plan orders it. Errors: UserError when
  // the checkpoint lacks some of them, or when they are damaged: names the file, and the checkpoint before.
  void read(program::FlatGroup flat, What what, int64_t first, std::span<float> out) const;

 private:
  struct Range {
    const Entry* entry;
    size_t file;
    size_t checked;  // its first piece in checked_
  };
  using Key = std::pair<program::FlatGroup, What>;

  [[noreturn]] void lacks(program::FlatGroup flat, What what, int64_t first, int64_t last) const;
  void check(const Range& range, int64_t begin, int64_t end) const;

  std::filesystem::path path_;
  Manifest manifest_;
  std::vector<data::MappedFile> files_;
  // Ranges by rising begin and end, overlapping where shards are replicated, none of them superfluous.
  std::map<Key, std::vector<Range>> covers_;
  std::unique_ptr<std::atomic<bool>[]> checked_;  // of all pieces with a checksum
};

// The newest complete checkpoint of a folder, and why newer ones were passed over: one line each, for a
// warning.
struct Newest {
  std::optional<Reader> reader;
  std::vector<std::string> skipped;
};
Newest open_newest(const std::filesystem::path& folder);

}  // namespace mop::checkpoint
