// What can go wrong with a database file, in words that say what to do next. Inside the store only.
#pragma once
#include <SQLiteCpp/Exception.h>

#include <chrono>
#include <filesystem>

#include "sim/base/error.h"

namespace mop::store {

// Errors: UserError when `path` cannot be a database: without a name, a folder or a device, too short, in a
// folder that is not there, or, unless it `may_be_made`, not there.
void check_path(const std::filesystem::path& path, bool may_be_made);

UserError fault(const std::filesystem::path& path, std::chrono::milliseconds busy_timeout,
                const SQLite::Exception& error);

}  // namespace mop::store
