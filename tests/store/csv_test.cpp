#include "sim/store/csv.h"

#include <sstream>

#include "tests/store/sample.h"

namespace mop::store {
namespace {

// A reader by the letter of RFC 4180, for LF and CRLF; a field that was quoted says so.
struct Cell {
  std::string text;
  bool quoted = false;
};
std::vector<std::vector<Cell>> read_csv(const std::string& text) {
  std::vector<std::vector<Cell>> rows(1, std::vector<Cell>(1));
  bool inside = false;
  for (size_t i = 0; i < text.size(); ++i) {
    Cell& cell = rows.back().back();
    if (inside) {
      if (text[i] != '"') {
        cell.text += text[i];
      } else if (i + 1 < text.size() && text[i + 1] == '"') {
        cell.text += text[++i];
      } else {
        inside = false;
      }
    } else if (text[i] == '"') {
      inside = cell.quoted = true;
    } else if (text[i] == ',') {
      rows.back().emplace_back();
    } else if (text[i] == '\n') {
      rows.emplace_back(1);
    } else {
      cell.text += text[i];
    }
  }
  EXPECT_FALSE(inside);
  rows.pop_back();  // after the last line end
  return rows;
}

TEST(Csv, LooksAsExpected) {
  std::ostringstream out;
  RunRecord record = sample(1);
  record.command = "say \"hi\", twice";
  record.mfu = 0.1;
  const std::vector<std::string> names = {"model", "command", "bound_by", "host_peak_bytes", "fits", "mfu"};
  write_csv(out, {&record, 1}, names);
  EXPECT_EQ(out.str(),
            "model,command,bound_by,host_peak_bytes,fits,mfu\n"
            "kimi-k2,\"say \"\"hi\"\", twice\",\"\",,1,0.1\n");
}

TEST(Csv, EveryFieldReadsBack) {
  std::mt19937_64 random(7);
  const std::string alphabet = "ab,\"\n\r\t ;'\xc3\xa9";
  std::vector<RunRecord> records;
  for (uint64_t i = 0; i < 200; ++i) {
    RunRecord& record = records.emplace_back(sample(i));
    for (std::string RunRecord::*field : {&RunRecord::command, &RunRecord::model, &RunRecord::bound_by}) {
      (record.*field).clear();
      for (uint64_t n = random() % 8; n > 0; --n) record.*field += alphabet[random() % alphabet.size()];
    }
    record.step_time_s = std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 200) - 160);
    if (i % 3 == 0) record.hbm_peak_bytes.reset();
  }
  std::vector<std::string> names;
  for (const Column& column : columns()) names.push_back(column.name);
  std::ostringstream out;
  write_csv(out, records, names);
  const auto rows = read_csv(out.str());
  ASSERT_EQ(rows.size(), records.size() + 1);
  for (size_t row = 0; row < rows.size(); ++row) ASSERT_EQ(rows[row].size(), names.size()) << row;
  for (size_t i = 0; i < names.size(); ++i) EXPECT_EQ(rows[0][i].text, names[i]);
  for (size_t row = 0; row < records.size(); ++row) {
    for (size_t i = 0; i < names.size(); ++i) {
      const Cell& cell = rows[row + 1][i];
      const Value value = value_of(records[row], columns()[i]);
      EXPECT_EQ(cell.text, to_text(value)) << names[i];
      EXPECT_EQ(cell.text.empty() && !cell.quoted, value.index() == 0) << names[i];
      if (const auto* real = std::get_if<double>(&value)) {
        EXPECT_EQ(std::stod(cell.text), *real);
      }
    }
  }
}

TEST(Csv, HoldsAllButDetailUnlessAsked) {
  std::ostringstream out;
  write_csv(out, {});
  EXPECT_EQ(read_csv(out.str()).at(0).size(), columns().size() - 1);
  EXPECT_EQ(out.str().find("detail"), std::string::npos);
}

TEST(Csv, SaysWhatIsWrong) {
  std::ostringstream out;
  const std::vector<std::string> names = {"modell"};
  EXPECT_SAYS(error_of([&] { write_csv(out, {}, names); }), "did you mean 'model'?");
  EXPECT_EQ(out.str(), "");
  std::ofstream full("/dev/full");
  EXPECT_SAYS(error_of([&] { write_csv(full, {}); }), "could not be written in full");
}

}  // namespace
}  // namespace mop::store
