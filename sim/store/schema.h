// The tables of the database and their versions. Inside the store only.
#pragma once
#include <filesystem>

namespace SQLite {
class Database;
}

namespace mop::store {

inline constexpr int kApplicationId = 0x6d6f7072;  // "mopr", in the header of every file of ours
inline constexpr int kSchemaVersion = 2;           // the newest, in PRAGMA user_version

// Errors, both: UserError naming `path` when the file belongs to another program or a newer version;
// SQLite::Exception when it cannot be read or written.

// Also UserError when there are no tables yet. Older ones are brought up to date.
void check_schema(SQLite::Database& db, const std::filesystem::path& path);

// Makes the tables, or brings older ones up to date, in one transaction. Up to date already, it writes and
// takes the write back: a file that cannot be written is better found before a long computation than after.
void prepare_schema(SQLite::Database& db, const std::filesystem::path& path);

}  // namespace mop::store
