// The results database: one SQLite file of predictions and measurements.
//
// Several processes may read and write one file at a time. The journal is SQLite's default (rollback), since
// the write-ahead log does not work on the network file systems of clusters; a writer waits for another until
// the busy timeout. A batch is one transaction: after a crash it is there in full or not at all, and
// everything stored before it is there.
//
// Errors: every method throws UserError, one line with the file, what is wrong and what to do next, for a
// file or folder that cannot be read or written, a file locked too long, a full disk, a damaged file, a file
// of another program and a file of a newer version. Foreign files are never changed.
#pragma once
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sim/store/record.h"

namespace SQLite {
class Database;
}

namespace mop::store {

struct Query {
  // All must hold: "context>=128K", "model=kimi-k2", "fits=1"; see filter.h.
  std::vector<std::string> where = {};
  // Column names, the first decides; "-mfu" is largest first; unknown values come last.
  std::vector<std::string> order = {};
  int64_t limit = 0;        // 0: all
  bool with_detail = true;  // false leaves RunRecord::detail as "{}", for listings of many records
};

enum class Access {
  kRead,   // the file must be there; changes nothing but to undo a batch that was interrupted
  kWrite,  // makes the file and its tables if need be, and tries out that writing works
};

// Not thread-safe: one Store a thread. Not to be carried over fork().
class Store {
 public:
  static constexpr std::chrono::milliseconds kBusyTimeout{10'000};

  Store(const std::filesystem::path& path, Access access,
        std::chrono::milliseconds busy_timeout = kBusyTimeout);
  ~Store();
  Store(Store&&) noexcept;
  Store& operator=(Store&&) noexcept;

  // Stores all records or none; needs Access::kWrite. A prediction replaces the one with its sweep and key;
  // measurements are all kept.
  // Errors also: InternalError as check() when a record is not fit to be stored.
  void insert(std::span<const RunRecord> records);
  void insert(const RunRecord& record);

  // Without an order: as they were stored, oldest first.
  // Errors also: UserError for an unknown column (with the nearest name), a filter without operator, a value
  // that the column cannot hold and a negative limit.
  std::vector<RunRecord> query(const Query& query = {}) const;

  // Is there a record with this kind and key, in whatever sweep?
  bool has(std::string_view kind, std::string_view key) const;

  // The keys that a sweep need not compute again.
  std::set<std::string, std::less<>> finished_keys(std::string_view sweep,
                                                   std::string_view kind = kPrediction) const;

 private:
  std::filesystem::path path_;
  std::chrono::milliseconds busy_timeout_;
  std::unique_ptr<SQLite::Database> db_;
};

}  // namespace mop::store
