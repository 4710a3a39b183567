#include "sim/store/store.h"

#include <SQLiteCpp/Database.h>

#include <bit>
#include <cmath>
#include <limits>

#include "tests/store/sample.h"

namespace mop::store {
namespace {

class StoreTest : public Folder {
 protected:
  std::vector<std::string> keys(const Store& store, const Query& query) {
    std::vector<std::string> found;
    for (const RunRecord& record : store.query(query)) found.push_back(record.key.substr(15));
    return found;
  }
};
using Names = std::vector<std::string>;

TEST_F(StoreTest, KeepsARecordWhole) {
  const RunRecord record = sample(1);
  Store(path, Access::kWrite).insert(record);
  const std::vector<RunRecord> found = Store(path, Access::kRead).query();
  ASSERT_EQ(found.size(), 1);
  EXPECT_EQ(found[0], record);
}

TEST_F(StoreTest, LeavesOneFile) {
  Store(path, Access::kWrite).insert(sample(1));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder), {}), 1);
}

// Text of any bytes, whole numbers and doubles of any bits that a record may hold.
RunRecord random_record(std::mt19937_64& random, uint64_t question) {
  RunRecord record = sample(question);
  const auto whole = [&] { return static_cast<int64_t>(random() >> (1 + random() % 63)); };
  const auto real = [&] {
    constexpr double kEdges[] = {0.0, 5e-324, 1.0, 0.1, 1e15, 9007199254740993.0, 1.7976931348623157e308};
    for (;;) {
      const double value =
          random() % 4 ? std::bit_cast<double>(random() >> 1) : kEdges[random() % std::size(kEdges)];
      if (std::isfinite(value)) return value;
    }
  };
  const bool fits = random() % 2;
  for (const Column& column : columns()) {
    if (std::holds_alternative<std::string RunRecord::*>(column.field)) {
      if (column.name == "kind" || column.name == "created" || column.name == "key" ||
          column.name == "scenario" || column.name == "detail") {
        continue;
      }
      std::string text(random() % 40, '\0');
      for (char& c : text) c = static_cast<char>(random());
      set_value(record, column, text);
    } else if (std::holds_alternative<bool RunRecord::*>(column.field)) {
      set_value(record, column, int64_t{fits});
    } else if (std::holds_alternative<int64_t RunRecord::*>(column.field)) {
      set_value(record, column, whole());
    } else if (random() % 4 == 0 || (column.name == "step_time_s" && !fits)) {
      set_value(record, column, Value());
    } else if (std::holds_alternative<std::optional<int64_t> RunRecord::*>(column.field)) {
      set_value(record, column, whole());
    } else {
      set_value(record, column, real());
    }
  }
  record.detail = fmt::format("{{\"x\": \"{}\"}}", std::string(random() % 5000, 'x'));
  return record;
}

// Equal to the last bit; == would take -0.0 for 0.0.
void expect_same_bits(const RunRecord& a, const RunRecord& b) {
  EXPECT_EQ(a, b);
  for (const Column& column : columns()) {
    const Value left = value_of(a, column), right = value_of(b, column);
    if (const auto* real = std::get_if<double>(&left)) {
      EXPECT_EQ(std::bit_cast<uint64_t>(*real), std::bit_cast<uint64_t>(std::get<double>(right)))
          << column.name;
    }
  }
}

TEST_F(StoreTest, AnyRecordSurvivesBitForBit) {
  for (const uint64_t seed : {1, 2, 3, 4}) {
    std::mt19937_64 random(seed);
    std::vector<RunRecord> records;
    for (uint64_t i = 0; i < 500; ++i) records.push_back(random_record(random, i));
    const std::filesystem::path file = folder / fmt::format("{}.db", seed);
    Store(file, Access::kWrite).insert(records);
    const std::vector<RunRecord> found = Store(file, Access::kRead).query();
    ASSERT_EQ(found.size(), records.size());
    for (size_t i = 0; i < found.size(); ++i) expect_same_bits(found[i], records[i]);
  }
}

TEST_F(StoreTest, ANewerPredictionReplacesTheOlder) {
  Store store(path, Access::kWrite);
  store.insert(sample(1));
  store.insert(sample(2));
  RunRecord newer = sample(1);
  newer.step_time_s = 1.5;
  store.insert(newer);
  const std::vector<RunRecord> found = store.query();
  ASSERT_EQ(found.size(), 2);
  EXPECT_EQ(found[0].key, hex(2));
  EXPECT_EQ(found[1], newer);
}

TEST_F(StoreTest, MeasurementsAreAllKept) {
  Store store(path, Access::kWrite);
  store.insert(sample(1));
  for (int i = 0; i < 3; ++i) store.insert(sample(1, kMeasurement));
  EXPECT_EQ(store.query({.where = {"kind=measurement"}}).size(), 3);
  EXPECT_EQ(store.query({.where = {"key=" + hex(1)}}).size(), 4);  // beside their prediction
}

TEST_F(StoreTest, EachSweepKeepsItsOwnPredictions) {
  Store store(path, Access::kWrite);
  store.insert(sample(1, kPrediction, "a"));
  store.insert(sample(1, kPrediction, "b"));
  store.insert(sample(1));
  EXPECT_EQ(store.query().size(), 3);
}

TEST_F(StoreTest, ASweepResumes) {
  const auto run = [&](uint64_t up_to) {
    Store store(path, Access::kWrite);
    const auto done = store.finished_keys("s");
    uint64_t computed = 0;
    for (uint64_t i = 0; i < up_to; ++i) {
      if (done.contains(hex(i))) continue;
      store.insert(sample(i, kPrediction, "s"));
      ++computed;
    }
    return computed;
  };
  EXPECT_EQ(run(10), 10);
  EXPECT_EQ(run(25), 15);
  EXPECT_EQ(run(25), 0);
  Store store(path, Access::kRead);
  EXPECT_EQ(store.query().size(), 25);
  EXPECT_TRUE(store.finished_keys("other").empty());
  EXPECT_TRUE(store.finished_keys("s", kMeasurement).empty());
  EXPECT_TRUE(store.has(kPrediction, hex(24)));
  EXPECT_FALSE(store.has(kPrediction, hex(25)));
  EXPECT_FALSE(store.has(kMeasurement, hex(24)));
}

TEST_F(StoreTest, AMeasuredSweepResumesToo) {
  Store store(path, Access::kWrite);
  store.insert(sample(1, kMeasurement, "s"));
  store.insert(sample(1, kMeasurement, "s"));
  EXPECT_EQ(store.finished_keys("s", kMeasurement).size(), 1);
  EXPECT_TRUE(store.finished_keys("s").empty());
}

TEST_F(StoreTest, ABatchIsStoredInFullOrNotAtAll) {
  Store store(path, Access::kWrite);
  std::vector<RunRecord> batch = {sample(1), sample(2), sample(3)};
  batch[2].nodes = -1;
  EXPECT_THROW(store.insert(batch), InternalError);
  EXPECT_TRUE(store.query().empty());
  store.insert(std::span<const RunRecord>());
  EXPECT_TRUE(store.query().empty());
}

TEST_F(StoreTest, FiltersOrdersAndLimits) {
  Store store(path, Access::kWrite);
  for (uint64_t i = 0; i < 6; ++i) {
    RunRecord record = sample(i);
    record.context = 65536 << (i / 2);  // 64K 64K 128K 128K 256K 256K
    record.fits = i < 4;
    record.step_time_s = i < 4 ? std::optional(10.0 - static_cast<double>(i)) : std::nullopt;
    record.model = i % 2 ? "glm-4.5" : "kimi-k2";
    store.insert(record);
  }
  EXPECT_EQ(keys(store, {}), (Names{"0", "1", "2", "3", "4", "5"}));
  EXPECT_EQ(keys(store, {.where = {"context>=128K"}}), (Names{"2", "3", "4", "5"}));
  EXPECT_EQ(keys(store, {.where = {"context>=131072", "model=kimi-k2"}}), (Names{"2", "4"}));
  EXPECT_EQ(keys(store, {.where = {"fits=1", "step_time_s<8"}}), (Names{"3"}));
  EXPECT_EQ(keys(store, {.where = {"step_time_s="}}), (Names{"4", "5"}));
  EXPECT_EQ(keys(store, {.where = {"step_time_s!="}}), (Names{"0", "1", "2", "3"}));
  EXPECT_EQ(keys(store, {.where = {"step_time_s!=10"}}), (Names{"1", "2", "3", "4", "5"}));
  EXPECT_EQ(keys(store, {.order = {"step_time_s"}}), (Names{"3", "2", "1", "0", "4", "5"}));
  EXPECT_EQ(keys(store, {.order = {"-step_time_s"}}), (Names{"0", "1", "2", "3", "4", "5"}));
  EXPECT_EQ(keys(store, {.order = {"model", "-context"}, .limit = 4}), (Names{"5", "3", "1", "4"}));
  EXPECT_EQ(store.query({.limit = 1, .with_detail = false}).at(0).detail, "{}");
  EXPECT_SAYS(error_of([&] { store.query({.where = {"stp_time_s<1"}}); }), "did you mean 'step_time_s'?");
  EXPECT_SAYS(error_of([&] { store.query({.order = {"-mfuu"}}); }), "did you mean 'mfu'?");
  EXPECT_SAYS(error_of([&] { store.query({.limit = -1}); }), "limit -1 is negative");
}

TEST_F(StoreTest, AnOlderFileIsBroughtUpToDate) {
  const auto make_older = [&] {
    SQLite::Database(path.string(), SQLite::OPEN_READWRITE)
        .exec("ALTER TABLE runs DROP COLUMN label; PRAGMA user_version = 1");
  };
  Store(path, Access::kWrite).insert(sample(1));
  make_older();
  EXPECT_EQ(Store(path, Access::kRead).query(), std::vector{sample(1)});
  Store(path, Access::kRead);  // nothing is left to do
  Store(path, Access::kWrite);
  make_older();
  Store store(path, Access::kWrite);
  RunRecord labelled = sample(2);
  labelled.label = "night";
  store.insert(labelled);
  const std::vector<RunRecord> all = store.query();
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(all[0], sample(1));
  EXPECT_EQ(all[1], labelled);
  EXPECT_EQ(store.query({.where = {"label=night"}}).at(0).id, 2);
}

TEST_F(StoreTest, SqlInAValueIsText) {
  Store store(path, Access::kWrite);
  RunRecord odd = sample(1);
  odd.model = "x'; DROP TABLE runs; --";
  store.insert({sample(2)});
  store.insert(odd);
  EXPECT_EQ(keys(store, {.where = {"model=" + odd.model}}), Names{"1"});
  EXPECT_EQ(keys(store, {.where = {"model=kimi-k2' OR '1'='1"}}), Names{});
  EXPECT_EQ(store.finished_keys("' OR '1'='1").size(), 0);
  EXPECT_FALSE(store.has(kPrediction, "' OR '1'='1"));
  for (const char* column : {"1=1 OR model", "model; DROP TABLE runs; --", "model) OR (1", "\"model\""}) {
    EXPECT_SAYS(error_of([&] { store.query({.where = {std::string(column) + "=x"}}); }), "unknown column");
    EXPECT_SAYS(error_of([&] { store.query({.order = {column}}); }), "unknown column");
  }
  EXPECT_EQ(store.query().size(), 2);
}

TEST_F(StoreTest, SpecialNamesOfSqliteAreFiles) {
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(folder);
  for (const char* name : {":memory:", "file:x.db?mode=memory", "a b's.db"}) {
    Store(name, Access::kWrite).insert(sample(1));
    EXPECT_TRUE(std::filesystem::exists(folder / name)) << name;
    EXPECT_EQ(Store(name, Access::kRead).query().size(), 1) << name;
  }
  std::filesystem::current_path(before);
}

TEST_F(StoreTest, AMovedStoreWorks) {
  Store first(path, Access::kWrite);
  Store second(std::move(first));
  second.insert(sample(1));
  first = std::move(second);
  EXPECT_EQ(first.query().size(), 1);
}

}  // namespace
}  // namespace mop::store
