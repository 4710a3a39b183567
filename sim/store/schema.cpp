#include "sim/store/schema.h"

#include <SQLiteCpp/Database.h>
#include <SQLiteCpp/Transaction.h>
#include <fmt/format.h>

#include <iterator>

#include "sim/base/error.h"

namespace mop::store {
namespace {

// Step i brings version i to version i + 1. A step that was released is never edited: add another.
constexpr const char* kSteps[] = {
    R"sql(
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  kind TEXT NOT NULL CHECK (kind IN ('prediction', 'measurement')),
  created TEXT NOT NULL,
  version TEXT NOT NULL,
  command TEXT NOT NULL,
  machine TEXT NOT NULL,
  sweep TEXT NOT NULL,
  key TEXT NOT NULL,
  scenario TEXT NOT NULL,
  model TEXT NOT NULL,
  cluster TEXT NOT NULL,
  nodes INTEGER NOT NULL,
  gpus INTEGER NOT NULL,
  context INTEGER NOT NULL,
  sequences INTEGER NOT NULL,
  accumulate INTEGER NOT NULL,
  plan_family TEXT NOT NULL,
  plan TEXT NOT NULL,
  calibration TEXT NOT NULL,
  fits INTEGER NOT NULL CHECK (fits IN (0, 1)),
  hbm_allocated_bytes INTEGER,
  hbm_peak_bytes INTEGER,
  hbm_capacity_bytes INTEGER,
  host_peak_bytes INTEGER,
  host_capacity_bytes INTEGER,
  step_time_s REAL CHECK (fits OR step_time_s IS NULL),
  tokens_per_step INTEGER NOT NULL,
  tokens_per_s_per_gpu REAL,
  model_flops_per_token REAL,
  mfu REAL,
  exposed_communication_s REAL,
  bound_by TEXT NOT NULL,
  detail TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX runs_prediction ON runs (sweep, key) WHERE kind = 'prediction';
CREATE INDEX runs_key ON runs (key);
CREATE INDEX runs_scenario ON runs (scenario);
)sql",
    "ALTER TABLE runs ADD COLUMN label TEXT NOT NULL DEFAULT ''"};
static_assert(std::size(kSteps) == kSchemaVersion);

int number(SQLite::Database& db, const char* sql) {
  return db.execAndGet(sql).getInt();
}

// The version of the tables, 0 for a file without any. Inside a transaction, so that the answers are of one
// moment: another process may be making the tables.
int version_of(SQLite::Database& db, const std::filesystem::path& path) {
  const int application = number(db, "PRAGMA application_id");
  const int version = number(db, "PRAGMA user_version");
  if (application == 0 && version == 0 && number(db, "SELECT count(*) FROM sqlite_master") == 0) return 0;
  if (application != kApplicationId) {
    throw UserError(fmt::format(
        "results database '{}': is the database of another program; name another file", path.string()));
  }
  if (version > kSchemaVersion) {
    throw UserError(
        fmt::format("results database '{}': was written by a newer mop (schema {}, this one knows {}); "
                    "update mop or name another file",
                    path.string(), version, kSchemaVersion));
  }
  return version;
}

int snapshot_version(SQLite::Database& db, const std::filesystem::path& path) {
  SQLite::Transaction snapshot(db);
  return version_of(db, path);
}

}  // namespace

void prepare_schema(SQLite::Database& db, const std::filesystem::path& path) {
  snapshot_version(db, path);  // before anything is locked or written: the file may be another program's
  // Immediate: two writers that meet here wait for each other, and the second finds the tables of the first.
  SQLite::Transaction transaction(db, SQLite::TransactionBehavior::IMMEDIATE);
  const int version = version_of(db, path);
  for (int step = version; step < kSchemaVersion; ++step) db.exec(kSteps[step]);
  db.exec(fmt::format("PRAGMA application_id = {}", kApplicationId));
  db.exec(fmt::format("PRAGMA user_version = {}", kSchemaVersion));
  if (version != kSchemaVersion) transaction.commit();
}

void check_schema(SQLite::Database& db, const std::filesystem::path& path) {
  const int version = snapshot_version(db, path);
  if (version == 0)
    throw UserError(
        fmt::format("results database '{}': is empty; record a prediction in it first or name another file",
                    path.string()));
  if (version < kSchemaVersion) prepare_schema(db, path);
}

}  // namespace mop::store
