#include "sim/cluster/table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "sim/base/error.h"

namespace mop::cluster {
namespace {

using Points = std::vector<std::vector<double>>;

std::string error_of(size_t kinds, size_t axes, const Points& points) {
  try {
    Table("rate", kinds, axes, points);
  } catch (const UserError& error) {
    return error.what();
  }
  ADD_FAILURE() << "no UserError";
  return "";
}

TEST(Table, IsExactAtEveryPoint) {
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> value(1, 1e15);
  Points points;
  for (double m : {64.0, 128.0, 1000.0})
    for (double n : {8.0, 4096.0})
      for (double k : {1.0, 3.0, 100.0, 1e6}) points.push_back({m, n, k, value(random)});
  const Table table("rate", 0, 3, points);
  for (const auto& p : points) {
    const Table::Value at = table.at({p[0], p[1], p[2]});
    EXPECT_NEAR(at.value / p[3], 1, 1e-12);
    EXPECT_FALSE(at.outside);
  }
}

TEST(Table, IsLogLinearBetween) {
  const Points points{{16, 100}, {256, 400}, {1024, 6400}};
  const Table table("rate", 0, 1, points);
  EXPECT_NEAR(table.at({64}).value, 200, 1e-9);  // halfway in log: the geometric mean
  EXPECT_NEAR(table.at({512}).value, 1600, 1e-8);
  EXPECT_NEAR(table.at({32}).value, 100 * std::pow(4, 0.25), 1e-9);
  const Points square{{2, 2, 1}, {2, 8, 100}, {8, 2, 10000}, {8, 8, 1000000}};
  EXPECT_NEAR(Table("rate", 0, 2, square).at({4, 4}).value, 1000, 1e-6);
}

TEST(Table, ClampsAndFlagsOutside) {
  const Points points{{16, 100}, {256, 400}};
  const Table table("rate", 0, 1, points);
  EXPECT_NEAR(table.at({1}).value, 100, 1e-9);
  EXPECT_TRUE(table.at({1}).outside);
  EXPECT_NEAR(table.at({1e9}).value, 400, 1e-9);
  EXPECT_TRUE(table.at({1e9}).outside);
  EXPECT_FALSE(table.at({15.5}).outside);  // within 5 %
  EXPECT_TRUE(table.at({15}).outside);
  EXPECT_FALSE(table.at({268}).outside);
  EXPECT_TRUE(table.at({269}).outside);
  EXPECT_NEAR(table.at({268}).value, 400, 1e-9);
}

TEST(Table, NeverLeavesTheRangeOfItsCorners) {
  std::mt19937_64 random(4);
  std::uniform_real_distribution<double> log_value(0, 30), log_at(-2, 12);
  for (int trial = 0; trial < 50; ++trial) {
    Points points;
    double low = 1e300, high = 0;
    for (double a : {1.0, 10.0, 100.0})
      for (double b : {5.0, 50.0, 5000.0}) {
        if (random() % 4 == 0 && !points.empty()) continue;
        points.push_back({a, b, std::exp(log_value(random))});
        low = std::min(low, points.back()[2]), high = std::max(high, points.back()[2]);
      }
    const Table table("rate", 0, 2, points);
    for (int i = 0; i < 50; ++i) {
      const double value = table.at({std::exp(log_at(random)), std::exp(log_at(random))}).value;
      EXPECT_GE(value, low * (1 - 1e-9));
      EXPECT_LE(value, high * (1 + 1e-9));
    }
  }
}

TEST(Table, FillsHolesWithTheNearestPoint) {
  // (8, 8) was too large to measure: one step from (8, 2) and from (2, 8); the lower coordinates win.
  const Points points{{2, 2, 10}, {2, 8, 20}, {8, 2, 30}};
  const Table table("rate", 0, 2, points);
  EXPECT_NEAR(table.at({8, 8}).value, 20, 1e-9);
  EXPECT_FALSE(table.at({8, 8}).outside);
  EXPECT_NEAR(table.at({2, 2}).value, 10, 1e-9);
}

TEST(Table, OneCoordinateOnAnAxisIsAConstant) {
  const Points points{{4, 16, 100}, {4, 64, 400}};
  const Table table("rate", 0, 2, points);
  EXPECT_NEAR(table.at({4, 32}).value, 200, 1e-9);
  EXPECT_FALSE(table.at({4, 32}).outside);
  EXPECT_NEAR(table.at({8, 32}).value, 200, 1e-9);
  EXPECT_TRUE(table.at({8, 32}).outside);
}

TEST(Table, BlendsKinds) {
  const Points points{{64, 1024, 100}, {256, 1024, 400}};  // one grid of one point for each kind
  const Table table("rate", 1, 1, points);
  EXPECT_NEAR(table.at({64, 1024}).value, 100, 1e-9);  // a measured kind is not touched by others
  EXPECT_NEAR(table.at({256, 1024}).value, 400, 1e-9);
  EXPECT_NEAR(table.at({128, 1024}).value, 200, 1e-9);  // equally far from both
  EXPECT_FALSE(table.at({128, 1024}).outside);
  const double nearer_low = table.at({96, 1024}).value, nearer_high = table.at({192, 1024}).value;
  EXPECT_GT(nearer_low, 100);
  EXPECT_LT(nearer_low, 200);
  EXPECT_GT(nearer_high, 200);
  EXPECT_LT(nearer_high, 400);
}

TEST(Table, FlagsKindsFarFromAnyMeasuredOne) {
  const Points points{{64, 1024, 100}, {256, 1024, 400}};
  const Table table("rate", 1, 1, points);
  EXPECT_FALSE(table.at({33, 1024}).outside);
  EXPECT_TRUE(table.at({31, 1024}).outside);
  EXPECT_FALSE(table.at({500, 1024}).outside);
  EXPECT_TRUE(table.at({520, 1024}).outside);
}

TEST(Table, AnotherKindsRangeDoesNotHideItsOwn) {
  const Points points{{64, 16, 100}, {64, 64, 100}, {128, 16, 100}, {128, 4096, 100}};
  const Table table("rate", 1, 1, points);
  EXPECT_TRUE(table.at({64, 4096}).outside);
  EXPECT_FALSE(table.at({128, 4096}).outside);
}

TEST(Table, RefusesWhatIsNoTable) {
  EXPECT_EQ(error_of(0, 1, {}), "table rate has no points");
  EXPECT_EQ(error_of(0, 1, {{1, 2, 3}}), "table rate: a point has 3 numbers, not 2");
  EXPECT_EQ(error_of(1, 2, {{1, 2, 3}}), "table rate: a point has 3 numbers, not 4");
  EXPECT_EQ(error_of(0, 1, {{0, 2}}), "table rate: 0 is not a positive number");
  EXPECT_EQ(error_of(0, 1, {{2, -1}}), "table rate: -1 is not a positive number");
  EXPECT_EQ(error_of(0, 1, {{2, std::numeric_limits<double>::quiet_NaN()}}),
            "table rate: nan is not a positive number");
  EXPECT_EQ(error_of(0, 1, {{2, std::numeric_limits<double>::infinity()}}),
            "table rate: inf is not a positive number");
  EXPECT_EQ(error_of(0, 1, {{2, 3}, {4, 5}, {2, 3}}), "table rate: a point is given twice");
}

TEST(Table, AsksForAllCoordinates) {
  const Points points{{64, 1024, 100}};
  const Table table("rate", 1, 1, points);
  EXPECT_THROW(table.at({64}), InternalError);
  EXPECT_THROW(table.at({64, 1024, 1}), InternalError);
  EXPECT_THROW(Table().at({64}), InternalError);
  EXPECT_TRUE(Table().empty());
  EXPECT_FALSE(table.empty());
}

}  // namespace
}  // namespace mop::cluster
