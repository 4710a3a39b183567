#include "sim/store/faults.h"

#include <fmt/format.h>
#include <sqlite3.h>
#include <unistd.h>

namespace mop::store {
namespace {

namespace fs = std::filesystem;

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

std::string cannot_open(const fs::path& path) {
  std::error_code ignored;
  if (fs::exists(path, ignored) && access(path.c_str(), R_OK) != 0) {
    return "no permission to read it; ask its owner for it or name another file";
  }
  const fs::path folder = folder_of(path);
  if (access(folder.c_str(), W_OK | X_OK) != 0) {
    return fmt::format("folder '{}' cannot be written; change its permissions or name a file elsewhere",
                       folder.string());
  }
  return "cannot be opened; check the permissions of it and its -journal and the limit of open files, or "
         "name another file";
}

}  // namespace

void check_path(const fs::path& path, bool may_be_made) {
  if (path.empty()) throw UserError("the results database has no name; name a file, for example results.db");
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  const auto refuse = [&](const std::string& why) {
    throw UserError(fmt::format("results database '{}': {}", path.string(), why));
  };
  if (status.type() == fs::file_type::none) {
    refuse(fmt::format("cannot be reached ({}); name another file", error.message()));
  }
  if (fs::is_directory(status)) refuse("is a folder; name a file in it, for example results.db");
  if (fs::exists(status) && !fs::is_regular_file(status)) refuse("is not a regular file; name another file");
  if (fs::exists(status)) {
    // No database is shorter than its smallest page, and SQLite would take a file of one byte for an empty
    // one and write over it. Asked by size alone: to open and close the file here would end this process's
    // locks on it.
    const uintmax_t bytes = fs::file_size(path, error);
    if (!error && bytes > 0 && bytes < 512) refuse("is not a results database; name another file");
    return;
  }
  const fs::path folder = folder_of(path);
  if (!fs::is_directory(folder, error)) {
    refuse(fmt::format("there is no folder '{}'; make it or name a file elsewhere", folder.string()));
  }
  if (!may_be_made) refuse("there is no such file; record a prediction in it first or name another file");
}

UserError fault(const fs::path& path, std::chrono::milliseconds busy_timeout,
                const SQLite::Exception& error) {
  const auto because = [&]() -> std::string {
    switch (error.getErrorCode()) {
      case SQLITE_BUSY:
      case SQLITE_LOCKED:
        return fmt::format(
            "another process kept it locked for {} s, nothing of this was stored; "
            "wait for that process to end, or name another file",
            static_cast<double>(busy_timeout.count()) / 1000);
      case SQLITE_NOTADB:
        return "is not a results database; name another file";
      case SQLITE_READONLY:
      case SQLITE_PERM:
        if (error.getExtendedErrorCode() == SQLITE_READONLY_ROLLBACK) {
          return "a writer was interrupted and tidying up needs write permission; "
                 "open it once as a user who may write it";
        }
        if (error.getExtendedErrorCode() == SQLITE_READONLY_DBMOVED) {
          return "was moved or removed while in use, nothing of this was stored; repeat the command";
        }
        return "cannot be written; change its permissions and its folder's, or name another file";
      case SQLITE_CANTOPEN:
        return cannot_open(path);
      case SQLITE_FULL:
        return "the disk is full, nothing of this was stored and what was stored before is intact; "
               "make room or name a file elsewhere";
      case SQLITE_IOERR:
        return "reading or writing failed, nothing of this was stored and what was stored before is intact; "
               "check the disk, its quota and the limit of file sizes, then repeat the command";
      case SQLITE_CORRUPT:
        return fmt::format(
            "is damaged; save what can be saved with: sqlite3 '{}' .recover | sqlite3 recovered.db",
            path.string());
      case SQLITE_TOOBIG:
        return "a record is too large for SQLite, nothing of this was stored; shorten its detail";
      default:
        return fmt::format("SQLite failed ({}); is it damaged? Name another file", error.what());
    }
  };
  return UserError(fmt::format("results database '{}': {}", path.string(), because()));
}

}  // namespace mop::store
