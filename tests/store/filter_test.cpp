#include "sim/store/filter.h"

#include "tests/store/sample.h"

namespace mop::store {
namespace {

TEST(Filter, ReadsColumnOperatorAndValue) {
  const Filter filter = parse_filter(" context >= 128K ");
  EXPECT_EQ(filter.column->name, "context");
  EXPECT_EQ(filter.sql, ">=");
  EXPECT_EQ(filter.value, Value(int64_t{131072}));
  EXPECT_EQ(parse_filter("hbm_peak_bytes<80GB").value, Value(int64_t{80'000'000'000}));
  EXPECT_EQ(parse_filter("nodes=0").value, Value(int64_t{0}));
  EXPECT_EQ(parse_filter("mfu>0.4").value, Value(0.4));
  EXPECT_EQ(parse_filter("fits==true").value, Value(int64_t{1}));
  EXPECT_EQ(parse_filter("plan=mop:ep=8,sp=2").value, Value(std::string("mop:ep=8,sp=2")));
  EXPECT_EQ(parse_filter("bound_by=").value, Value(std::string()));
  EXPECT_EQ(parse_filter("step_time_s=").value, Value());
}

TEST(Filter, SaysWhatIsWrong) {
  for (const auto& [text, part] : {std::pair{"model", "no operator"},
                                   {"", "no operator"},
                                   {"mod!el", "no operator"},
                                   {"modle=x", "did you mean 'model'?"},
                                   {"=x", "unknown column ''"},
                                   {"rowid=1", "unknown column 'rowid'"},
                                   {"fits=maybe", "fits is true or false, not 'maybe'"},
                                   {"mfu>high", "mfu is a number, not 'high'"},
                                   {"mfu>nan", "mfu is a number, not 'nan'"},
                                   {"mfu>0.4x", "mfu is a number"},
                                   {"context>=x", "context"},
                                   {"context=99999999999999999999", "context"},
                                   {"step_time_s<", "nothing to compare with"}}) {
    EXPECT_SAYS(error_of([text = text] { parse_filter(text); }), part);
  }
}

}  // namespace
}  // namespace mop::store
