#include "exec/calibrate/families.h"

#include <gtest/gtest.h>

#include "sim/base/error.h"

namespace mop::calibrate {
namespace {

std::string error_of(const std::string& text) {
  try {
    parse_families(text);
  } catch (const UserError& error) {
    return error.what();
  }
  return "";
}

TEST(Families, AllOrThoseThatAreNamed) {
  EXPECT_EQ(parse_families("").size(), families().size());
  EXPECT_EQ(parse_families("memory,adam"), (std::vector<std::string>{"memory", "adam"}));
  // Tables of one clock, and what draws power at it.
  EXPECT_EQ(parse_families("attention,memory"),
            (std::vector<std::string>{"attention", "memory", "matmul", "grouped", "power"}));
  EXPECT_NE(error_of("matmull").find("unknown benchmark 'matmull'; did you mean 'matmul'?"),
            std::string::npos)
      << error_of("matmull");
  EXPECT_NE(error_of(",").find("unknown benchmark ''"), std::string::npos) << error_of(",");
}

TEST(Families, OfTwoSetsOfProcesses) {
  EXPECT_TRUE(any_of({"matmul"}, false));
  EXPECT_FALSE(any_of({"matmul"}, true));
  EXPECT_TRUE(any_of({"network", "matmul"}, true));
  EXPECT_FALSE(any_of({"network"}, false));
}

TEST(Families, AllTakeLessThanSixMinutes) {
  EXPECT_LT(longest(parse_families(""), 4), 360);
  EXPECT_LT(longest({"launch"}, 4), 60);
  EXPECT_LT(longest({"matmul", "network"}, 1), longest({"matmul", "network"}, 2));
}

}  // namespace
}  // namespace mop::calibrate
