#include "sim/store/columns.h"

#include <SQLiteCpp/SQLiteCpp.h>

#include "tests/store/sample.h"

namespace mop::store {
namespace {

class Columns : public Folder {};

TEST_F(Columns, AreThoseOfTheTable) {
  Store(path, Access::kWrite);
  SQLite::Database db(path.string());
  SQLite::Statement statement(db, "SELECT name FROM pragma_table_info('runs') ORDER BY cid");
  std::vector<std::string> in_table, listed;
  while (statement.executeStep()) in_table.push_back(statement.getColumn(0).getString());
  for (const Column& column : columns()) listed.push_back(column.name);
  EXPECT_EQ(listed, in_table);
}

TEST_F(Columns, AnUnknownOneNamesTheNearest) {
  EXPECT_SAYS(error_of([] { column("contxt"); }), "did you mean 'context'?");
}

TEST_F(Columns, CopyARecordFieldByField) {
  const RunRecord from = sample(3);
  RunRecord to;
  for (const Column& column : columns()) set_value(to, column, value_of(from, column));
  EXPECT_EQ(to, from);
}

}  // namespace
}  // namespace mop::store
