#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>

#include "sim/base/error.h"
#include "sim/plan/routing.h"

namespace mop::plan {
namespace {

using Row = std::vector<int64_t>;

int64_t sum(const Row& row) {
  return std::accumulate(row.begin(), row.end(), int64_t{0});
}

Row falling(Row row) {
  std::ranges::sort(row, std::greater());
  return row;
}

// The message of the UserError that `action` throws.
template <typename Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const UserError& error) {
    return error.what();
  }
  ADD_FAILURE() << "no UserError";
  return "";
}

std::string parse_error(const std::string& text) {
  return error_of([&] { parse_routing(text); });
}

class HistogramFile {
 public:
  explicit HistogramFile(const std::string& text)
      : path_((std::filesystem::temp_directory_path() / ("mop_histogram_" + std::to_string(::getpid())))
                  .string()) {
    std::ofstream(path_) << text;
  }
  ~HistogramFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  HistogramFile(const HistogramFile&) = delete;
  HistogramFile& operator=(const HistogramFile&) = delete;
  std::string routing() const { return "histogram:" + path_; }

 private:
  std::string path_;
};

TEST(Routing, ParseAndDescribeRoundTrip) {
  EXPECT_EQ(parse_routing("balanced"), Routing());
  EXPECT_EQ(parse_routing("zipf:1.2").exponent, 1.2);
  EXPECT_EQ(parse_routing("hot:0.3@4").hot_fraction, 0.3);
  EXPECT_EQ(parse_routing("hot:0.3@4").hot_experts, 4);
  EXPECT_EQ(parse_routing("zipf:1,independent,seed=7").seed, 7u);
  EXPECT_TRUE(parse_routing("zipf:1,independent,seed=7").independent_groups);
  const HistogramFile file("[3, 1]");
  for (const std::string& text :
       {std::string("balanced"), std::string("zipf:1.2"), std::string("zipf:0.1"), std::string("hot:0.3@4"),
        std::string("zipf:0.30000000000000004,seed=9"),
        std::string("hot:1@1,seed=18446744073709551615,independent"), file.routing()}) {
    EXPECT_EQ(describe(parse_routing(text)), text);
    EXPECT_EQ(parse_routing(describe(parse_routing(text))), parse_routing(text));
  }
}

TEST(Routing, ParseErrorsSayWhatToWrite) {
  for (const std::string text : {"",
                                 "zipff:1",
                                 ":",
                                 "zipf",
                                 "zipf:",
                                 "zipf:x",
                                 "zipf:-1",
                                 "zipf:nan",
                                 "zipf:inf",
                                 "zipf:1e9",
                                 "zipf:1 ",
                                 "balanced:1",
                                 "balanced,x",
                                 "hot:0.3",
                                 "hot:@4",
                                 "hot:0.3@",
                                 "hot:1.1@4",
                                 "hot:-0.1@4",
                                 "hot:nan@4",
                                 "hot:0.3@0",
                                 "hot:0.3@-1",
                                 "hot:0.3@1.5",
                                 "hot:0.3@99999999999",
                                 "histogram",
                                 "histogram:",
                                 "zipf:1,sead=1"}) {
    const std::string error = parse_error(text);
    EXPECT_NE(error.find("hot:0.3@4"), std::string::npos) << text << ": " << error;
    EXPECT_EQ(error.find('\n'), std::string::npos);
  }
  EXPECT_NE(parse_error("zipff:1").find("did you mean 'zipf'?"), std::string::npos);
  EXPECT_NE(parse_error("zipf:1,seed=-1").find("seed"), std::string::npos);
}

TEST(Routing, RandomDrawsConserveAndRespectTopK) {
  std::mt19937_64 random(3);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int trial = 0; trial < 2000; ++trial) {
    const int experts = static_cast<int>(pick(1, 300)),
              top_k = static_cast<int>(pick(1, std::min(experts, 12)));
    const int64_t tokens = pick(0, int64_t{1} << pick(0, 20));
    const int layer = static_cast<int>(pick(0, 60));
    Routing routing;
    routing.kind = static_cast<Routing::Kind>(pick(0, 3));
    routing.seed = static_cast<uint64_t>(pick(0, 99));
    routing.exponent = static_cast<double>(pick(0, 40)) / 8;
    routing.hot_fraction = static_cast<double>(pick(0, 16)) / 16;
    routing.hot_experts = static_cast<int>(pick(1, std::max(1, experts - 1)));
    if (routing.kind == Routing::Kind::hot && experts == 1) continue;
    Row counts(experts);
    for (int64_t& count : counts) count = pick(0, 2) == 0 ? 0 : pick(0, int64_t{1} << pick(0, 53));
    routing.counts = {counts};
    const Row row = draw(routing, tokens, top_k, experts, layer, 0);
    ASSERT_EQ(row.size(), static_cast<size_t>(experts));
    ASSERT_EQ(sum(row), tokens * top_k);
    ASSERT_LE(*std::ranges::max_element(row), tokens);
    ASSERT_GE(*std::ranges::min_element(row), 0);
    ASSERT_EQ(row, draw(routing, tokens, top_k, experts, layer, 0));
  }
}

TEST(Routing, BalancedIsEvenAndRotates) {
  EXPECT_EQ(draw(Routing(), 6, 2, 8, 0, 0), (Row{1, 2, 1, 2, 1, 2, 1, 2}));
  EXPECT_EQ(draw(Routing(), 6, 2, 8, 1, 0), (Row{2, 1, 2, 1, 2, 1, 2, 1}));
  EXPECT_EQ(draw(Routing(), 8, 2, 8, 5, 0), Row(8, 2));
  Row over_layers(12);
  for (int layer = 0; layer < 12; ++layer) {
    const Row row = draw(Routing(), 5, 3, 12, layer, 0);
    for (size_t e = 0; e < row.size(); ++e) over_layers[e] += row[e];
  }
  EXPECT_EQ(over_layers, Row(12, 15));
}

TEST(Routing, ZipfFollowsItsWeightsAndZeroIsBalanced) {
  const Row flat = draw(parse_routing("zipf:0"), 1000, 3, 7, 0, 0);
  EXPECT_EQ(falling(flat), falling(draw(Routing(), 1000, 3, 7, 0, 0)));
  // 1, 1/2, 1/3, 1/4 of 2500 copies over 25/12: 1200, 600, 400, 300.
  EXPECT_EQ(falling(draw(parse_routing("zipf:1"), 2500, 1, 4, 0, 0)), (Row{1200, 600, 400, 300}));
  // 1, 1/8, 1/27: the first takes each of the 1300 tokens once, the other 1300 copies go 27 : 8.
  EXPECT_EQ(falling(draw(parse_routing("zipf:3"), 1300, 2, 3, 0, 0)), (Row{1300, 1003, 297}));
}

TEST(Routing, HotFractionIsMetWithinRounding) {
  for (const int64_t tokens : {1000, 1365, 4096, 100003}) {
    const Row row = falling(draw(parse_routing("hot:0.3@4"), tokens, 8, 64, 2, 0));
    const int64_t hot = row[0] + row[1] + row[2] + row[3];
    EXPECT_NEAR(static_cast<double>(hot), 0.3 * static_cast<double>(tokens) * 8, 4);
    EXPECT_LE(row[0] - row[3], 1);
    EXPECT_LE(row[4] - row[63], 1);
  }
  // All copies on one expert: it takes every token once, the others share the rest.
  EXPECT_EQ(falling(draw(parse_routing("hot:1@1"), 30, 2, 4, 0, 0)), (Row{30, 10, 10, 10}));
  EXPECT_EQ(falling(draw(parse_routing("hot:1@1"), 30, 1, 4, 0, 0)), (Row{30, 0, 0, 0}));
  EXPECT_EQ(falling(draw(parse_routing("hot:0@1"), 30, 1, 4, 0, 0)), (Row{10, 10, 10, 0}));
  EXPECT_NE(error_of([] { draw(parse_routing("hot:0.5@8"), 30, 2, 8, 0, 0); }).find("8 experts"),
            std::string::npos);
}

TEST(Routing, SeedLayerAndGroup) {
  const Routing one = parse_routing("zipf:1.2,seed=1"), two = parse_routing("zipf:1.2,seed=2");
  const auto of = [](const Routing& routing, int layer, int group) {
    return draw(routing, 4096, 8, 384, layer, group);
  };
  EXPECT_EQ(of(one, 3, 0), of(one, 3, 0));
  EXPECT_EQ(of(one, 3, 0), of(one, 3, 5));
  EXPECT_NE(of(one, 3, 0), of(one, 4, 0));
  EXPECT_NE(of(one, 3, 0), of(two, 3, 0));
  EXPECT_EQ(falling(of(one, 3, 0)), falling(of(two, 4, 0)));
  Routing independent = one;
  independent.independent_groups = true;
  EXPECT_EQ(of(independent, 3, 0), of(one, 3, 0));
  EXPECT_NE(of(independent, 3, 0), of(independent, 3, 1));
}

TEST(Routing, SameOnEveryMachine) {  // pins the generator: a change here changes every recorded study
  EXPECT_EQ(draw(parse_routing("zipf:1,seed=42"), 100, 2, 8, 1, 0), (Row{74, 9, 18, 10, 12, 37, 25, 15}));
}

TEST(Routing, HistogramIsScaledInPlace) {
  const HistogramFile json("[[0, 30, 10, 60], [1, 1, 1, 1]]");
  const Routing routing = parse_routing(json.routing());
  EXPECT_EQ(draw(routing, 1000, 1, 4, 0, 0), (Row{0, 300, 100, 600}));
  EXPECT_EQ(draw(routing, 1000, 1, 4, 1, 0), Row(4, 250));
  EXPECT_EQ(draw(routing, 100, 2, 4, 0, 0), (Row{0, 75, 25, 100}));  // the most popular takes each token once
  EXPECT_EQ(draw(routing, 100, 4, 4, 0, 0), Row(4, 100));            // top_k beyond those with counts
  EXPECT_NE(error_of([&] { draw(routing, 100, 1, 4, 2, 0); }).find("2 rows"), std::string::npos);
  EXPECT_NE(error_of([&] { draw(routing, 100, 1, 8, 0, 0); }).find("counts 4 experts, the model has 8"),
            std::string::npos);
}

TEST(Routing, HistogramForms) {
  const auto counts = [](const std::string& text) {
    return parse_routing(HistogramFile(text).routing()).counts;
  };
  EXPECT_EQ(counts("[1, 2, 3]"), (std::vector<Row>{{1, 2, 3}}));
  EXPECT_EQ(counts("# recorded\n1, 2,3\r\n\n4,5,6"), (std::vector<Row>{{1, 2, 3}, {4, 5, 6}}));
  EXPECT_EQ(counts("7\n"), (std::vector<Row>{{7}}));
}

TEST(Routing, HistogramErrors) {
  EXPECT_NE(parse_error("histogram:/no/such/file.json").find("no such file"), std::string::npos);
  EXPECT_NE(parse_error("histogram:/tmp").find("not a regular file"), std::string::npos);
  const auto error = [](const std::string& text) {
    const HistogramFile file(text);
    return parse_error(file.routing());
  };
  EXPECT_NE(error("").find("empty"), std::string::npos);
  EXPECT_NE(error("# only\n").find("no counts"), std::string::npos);
  EXPECT_NE(error("[1, 2").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error("{\"a\": 1}").find("not a JSON array"), std::string::npos);
  EXPECT_NE(error("[]").find("not a JSON array"), std::string::npos);
  EXPECT_NE(error("[[1], 2]").find("row 2 is not an array"), std::string::npos);
  EXPECT_NE(error("[1, 2.5]").find("expert 1 is not a whole number"), std::string::npos);
  EXPECT_NE(error("[1, \"x\"]").find("not a whole number"), std::string::npos);
  EXPECT_NE(error("[1, -2]").find("expert 1 is negative (-2)"), std::string::npos);
  EXPECT_NE(error("[1, 18446744073709551615]").find("above 2^53"), std::string::npos);
  EXPECT_NE(error("[[1, 2], [1]]").find("row 2 has 1 counts, row 1 has 2"), std::string::npos);
  EXPECT_NE(error("[[1, 2], [0, 0]]").find("row 2 has no copies"), std::string::npos);
  EXPECT_NE(error("[[]]").find("no copies"), std::string::npos);
  EXPECT_NE(error("1,2\n3,x\n").find("row 2, expert 1 is not a whole number"), std::string::npos);
  EXPECT_NE(error("1,,2").find("expert 1 is not a whole number"), std::string::npos);
  EXPECT_NE(error("1,-2").find("negative"), std::string::npos);
  EXPECT_NE(error("1,9007199254740993").find("above 2^53"), std::string::npos);
  EXPECT_NE(error(std::string("\0\1\2\xff", 4)).find("not a whole number"), std::string::npos);
}

TEST(Routing, Imbalance) {
  EXPECT_EQ(imbalance(Row{}), 1);
  EXPECT_EQ(imbalance(Row{0, 0}), 1);
  EXPECT_EQ(imbalance(Row{5, 5}), 1);
  EXPECT_EQ(imbalance(Row{30, 10, 10, 10}), 2);
}

TEST(Routing, EffectiveExperts) {
  EXPECT_EQ(effective_experts(Row{}), 1);
  EXPECT_EQ(effective_experts(Row{0, 0}), 1);
  EXPECT_EQ(effective_experts(Row{7, 7, 7, 7}), 4);
  EXPECT_EQ(effective_experts(Row{0, 9, 0, 9}), 2);
  EXPECT_EQ(effective_experts(Row{1000, 1, 1, 1}), 1);  // the small ones hardly count
  const Row zipf = draw(parse_routing("zipf:1"), 4096, 4, 64, 0, 0);
  EXPECT_GT(effective_experts(zipf), 4);
  EXPECT_LT(effective_experts(zipf), 64);
}

TEST(Routing, DrawChecksItsArguments) {
  EXPECT_THROW(draw(Routing(), 10, 9, 8, 0, 0), InternalError);
  EXPECT_THROW(draw(Routing(), 10, 0, 8, 0, 0), InternalError);
  EXPECT_THROW(draw(Routing(), -1, 2, 8, 0, 0), InternalError);
}

}  // namespace
}  // namespace mop::plan
