#include "sim/store/record.h"

#include <limits>

#include "tests/store/sample.h"

namespace mop::store {
namespace {

constexpr std::string_view kInputs = R"({"model": "m", "nodes": 2, "plan": {"ep": 8, "sp": 2}, "skew": 1,
                                         "calibration": "shipped", "version": "0.1.0"})";

TEST(Keys, StayTheSameForever) {  // the databases that users have depend on it
  EXPECT_EQ(keys_of(kInputs).scenario, "d68ca5749dbc3e7e");
  EXPECT_EQ(keys_of(kInputs).key, "b7584ab461793962");
}

TEST(Keys, DoNotDependOnSpelling) {
  const Keys other = keys_of(R"({"version":"0.1.0","calibration":"shipped","skew":1.0,
                                 "plan":{"sp":2,"ep":8e0},"nodes":2,"model":"m"})");
  EXPECT_EQ(other.key, keys_of(kInputs).key);
  EXPECT_EQ(other.scenario, keys_of(kInputs).scenario);
}

TEST(Keys, EveryInputCounts) {
  const auto with = [](std::string_view from, std::string_view to) {
    std::string text(kInputs);
    text.replace(text.find(from), from.size(), to);
    return keys_of(text);
  };
  const Keys keys = keys_of(kInputs);
  for (const auto& [from, to] : {std::pair{"\"m\"", "\"n\""},
                                 {": 8", ": 16"},
                                 {"\"skew\": 1", "\"skew\": 1.5"},
                                 {"\"ep\"", "\"tp\""}}) {
    EXPECT_NE(with(from, to).key, keys.key) << from;
    EXPECT_NE(with(from, to).scenario, keys.scenario) << from;
  }
  for (const auto& [from, to] : {std::pair{"shipped", "mine"}, {"0.1.0", "0.2.0"}}) {
    EXPECT_NE(with(from, to).key, keys.key) << from;
    EXPECT_EQ(with(from, to).scenario, keys.scenario) << from;
  }
}

TEST(Keys, WantAnObjectWithAllMembers) {
  for (const char* bad : {"", "{", "[1]", "{}", R"({"version": "1"})", R"({"calibration": "c"})"}) {
    EXPECT_THROW(keys_of(bad), InternalError) << bad;
  }
}

TEST(Check, TakesWhatIsWhole) {
  EXPECT_NO_THROW(check(sample(1)));
  RunRecord now = sample(1);
  now.created = now_utc();
  EXPECT_NO_THROW(check(now)) << now.created;
}

TEST(Check, RefusesWhatIsNot) {
  const std::vector<std::pair<std::string, std::function<void(RunRecord&)>>> faults = {
      {"kind", [](RunRecord& r) { r.kind = "guess"; }},
      {"created", [](RunRecord& r) { r.created = "yesterday"; }},
      {"key", [](RunRecord& r) { r.key = "12"; }},
      {"scenario", [](RunRecord& r) { r.scenario = "ABCDEF0123456789"; }},
      {"nodes", [](RunRecord& r) { r.nodes = -1; }},
      {"hbm_peak_bytes", [](RunRecord& r) { r.hbm_peak_bytes = -5; }},
      {"mfu", [](RunRecord& r) { r.mfu = std::numeric_limits<double>::quiet_NaN(); }},
      {"step_time_s", [](RunRecord& r) { r.step_time_s = std::numeric_limits<double>::infinity(); }},
      {"step_time_s", [](RunRecord& r) { r.fits = false; }},
      {"detail", [](RunRecord& r) { r.detail = ""; }},
      {"detail", [](RunRecord& r) { r.detail = "[]"; }},
      {"detail", [](RunRecord& r) { r.detail = "{\"cut"; }},
  };
  for (const auto& [field, spoil] : faults) {
    RunRecord record = sample(1);
    spoil(record);
    try {
      check(record);
      ADD_FAILURE() << field;
    } catch (const InternalError& error) {
      EXPECT_SAYS(std::string(error.what()), field);
    }
  }
}

}  // namespace
}  // namespace mop::store
