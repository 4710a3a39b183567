#include "sim/store/store.h"

#include <SQLiteCpp/Database.h>
#include <SQLiteCpp/Statement.h>
#include <SQLiteCpp/Transaction.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "sim/base/error.h"
#include "sim/store/columns.h"
#include "sim/store/faults.h"
#include "sim/store/filter.h"
#include "sim/store/schema.h"

namespace mop::store {
namespace {

void bind(SQLite::Statement& statement, int index, const Value& value) {
  std::visit(
      [&](const auto& held) {
        if constexpr (std::is_same_v<decltype(held), const std::monostate&>) {
          statement.bind(index);
        } else {
          statement.bind(index, held);
        }
      },
      value);
}

Value read(SQLite::Statement& statement, int index) {
  const SQLite::Column cell = statement.getColumn(index);
  if (cell.isNull()) return {};
  if (cell.isInteger()) return cell.getInt64();
  if (cell.isFloat()) return cell.getDouble();
  return cell.getString();
}

// Of our own column names only: never of what a user typed.
std::string insert_sql() {
  std::vector<std::string_view> names;
  for (const Column& column : columns()) names.push_back(column.name);
  return fmt::format("INSERT OR REPLACE INTO runs ({}) VALUES ({})", fmt::join(names, ", "),
                     fmt::join(std::vector<std::string_view>(names.size(), "?"), ", "));
}

// "-mfu" -> "mfu DESC NULLS LAST"
std::string order_sql(std::string_view text) {
  const bool descending = text.starts_with('-');
  return fmt::format("{}{} NULLS LAST", column(text.substr(descending)).name, descending ? " DESC" : "");
}

}  // namespace

Store::Store(const std::filesystem::path& path, Access access, std::chrono::milliseconds busy_timeout)
    : path_(path), busy_timeout_(busy_timeout) {
  const bool write = access == Access::kWrite;
  check_path(path_, write);
  try {
    // Absolute, since SQLite takes ":memory:" for no file at all. Never OPEN_READONLY: a reader that may
    // write the file must be able to undo a batch that was interrupted; SQLite falls back to reading where it
    // may not.
    db_ = std::make_unique<SQLite::Database>(std::filesystem::absolute(path_).string(),
                                             SQLite::OPEN_READWRITE | (write ? SQLite::OPEN_CREATE : 0),
                                             static_cast<int>(busy_timeout.count()));
    if (write) {
      prepare_schema(*db_, path_);
    } else {
      check_schema(*db_, path_);
      db_->exec("PRAGMA query_only = TRUE");
    }
  } catch (const SQLite::Exception& error) {
    throw fault(path_, busy_timeout_, error);
  }
}

Store::~Store() = default;
Store::Store(Store&&) noexcept = default;
Store& Store::operator=(Store&&) noexcept = default;

void Store::insert(std::span<const RunRecord> records) {
  for (const RunRecord& record : records) check(record);
  if (records.empty()) return;
  try {
    SQLite::Transaction transaction(*db_, SQLite::TransactionBehavior::IMMEDIATE);
    SQLite::Statement statement(*db_, insert_sql());
    for (const RunRecord& record : records) {
      int index = 0;
      for (const Column& column : columns())  // SQLite gives the id
        bind(statement, ++index, column.name == "id" ? Value() : value_of(record, column));
      statement.exec();
      statement.reset();
    }
    transaction.commit();
  } catch (const SQLite::Exception& error) {
    throw fault(path_, busy_timeout_, error);
  }
}

void Store::insert(const RunRecord& record) {
  insert({&record, 1});
}

std::vector<RunRecord> Store::query(const Query& query) const {
  if (query.limit < 0) throw UserError(fmt::format("limit {} is negative; 0 means all records", query.limit));
  std::vector<const Column*> wanted;
  std::vector<std::string_view> names;
  for (const Column& column : columns()) {
    if (column.name == "detail" && !query.with_detail) continue;
    wanted.push_back(&column);
    names.push_back(column.name);
  }
  std::string sql = fmt::format("SELECT {} FROM runs WHERE TRUE", fmt::join(names, ", "));
  std::vector<Value> values;
  for (const std::string& text : query.where) {
    Filter filter = parse_filter(text);
    sql += fmt::format(" AND {} {} ?", filter.column->name, filter.sql);
    values.push_back(std::move(filter.value));
  }
  sql += " ORDER BY ";
  for (const std::string& text : query.order) sql += order_sql(text) + ", ";
  sql += "id LIMIT ?";
  values.emplace_back(query.limit == 0 ? int64_t{-1} : query.limit);  // -1 is SQLite's "no limit"
  try {
    SQLite::Statement statement(*db_, sql);
    for (size_t i = 0; i < values.size(); ++i) bind(statement, static_cast<int>(i) + 1, values[i]);
    std::vector<RunRecord> records;
    while (statement.executeStep()) {
      RunRecord& record = records.emplace_back();
      for (size_t i = 0; i < wanted.size(); ++i)
        set_value(record, *wanted[i], read(statement, static_cast<int>(i)));
    }
    return records;
  } catch (const SQLite::Exception& error) {
    throw fault(path_, busy_timeout_, error);
  }
}

bool Store::has(std::string_view kind, std::string_view key) const {
  try {
    SQLite::Statement statement(*db_, "SELECT 1 FROM runs WHERE key = ? AND kind = ? LIMIT 1");
    statement.bind(1, std::string(key));
    statement.bind(2, std::string(kind));
    return statement.executeStep();
  } catch (const SQLite::Exception& error) {
    throw fault(path_, busy_timeout_, error);
  }
}

std::set<std::string, std::less<>> Store::finished_keys(std::string_view sweep, std::string_view kind) const {
  try {
    // Spelled with the constant where it can be, so that SQLite takes the index of predictions.
    SQLite::Statement statement(*db_, kind == kPrediction
                                          ? "SELECT key FROM runs WHERE sweep = ?1 AND kind = 'prediction'"
                                          : "SELECT key FROM runs WHERE sweep = ?1 AND kind = ?2");
    statement.bind(1, std::string(sweep));
    if (kind != kPrediction) statement.bind(2, std::string(kind));
    std::set<std::string, std::less<>> keys;
    while (statement.executeStep()) keys.insert(statement.getColumn(0).getString());
    return keys;
  } catch (const SQLite::Exception& error) {
    throw fault(path_, busy_timeout_, error);
  }
}

}  // namespace mop::store
