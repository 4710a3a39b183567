#include "sim/validate/op_sums.h"

#include <gtest/gtest.h>

#include "tests/error_of.h"
#include "tests/validate/support.h"

namespace mop::validate {
namespace {

using program::Component;
using program::OpKind;
using program::Stream;

// [0] a product, [1] an all-gather, [2] another product.
program::StepProgram three_operations() {
  program::StepProgram program;
  const auto add = [&](OpKind kind, Stream stream, Component component) {
    program::Op op{};
    op.kind = kind;
    op.stream = stream;
    op.component = component;
    program.ops.push_back(op);
  };
  add(OpKind::gemm, Stream::compute, Component::attention);
  add(OpKind::all_gather, Stream::gather, Component::dense);
  add(OpKind::gemm, Stream::compute, Component::attention);
  return program;
}

const OpSum& find(const OpSums& sums, const std::string& name) {
  for (const OpSum& sum : sums.operations)
    if (sum.name == name) return sum;
  ADD_FAILURE() << "no " << name;
  return sums.operations.front();
}

TEST(OpSums, AreMediansOfRanksAndTheShortestOfCollectives) {
  const program::StepProgram program = three_operations();
  const auto rank = [&](int64_t first, int64_t gather, int64_t again, int64_t second) {
    return program::RankTimeline{"",
                                 &program,
                                 {{0, 0, first, first},
                                  {1, 10, 10 + gather, gather},
                                  {1, 90, 90 + again, again},
                                  {2, 200, 200 + second, second}}};
  };
  // Rank 0 waits in the first gather, ranks 1 and 2 in the second.
  const std::vector<program::RankTimeline> ranks{rank(100, 50, 8, 10), rank(200, 30, 40, 10),
                                                 rank(400, 30, 40, 10)};
  const OpSums sums = sum_operations(ranks);
  ASSERT_EQ(sums.operations.size(), 2U);
  const OpSum &gemm = find(sums, "attention gemm"), &gather = find(sums, "dense all_gather");
  EXPECT_DOUBLE_EQ(gemm.seconds, 210e-9);
  EXPECT_EQ(gemm.count, 2);
  EXPECT_EQ(gemm.stream, "compute");
  EXPECT_DOUBLE_EQ(gather.seconds, 38e-9);  // 30 + 8
  EXPECT_EQ(gather.count, 2);
  EXPECT_NEAR(sums.wait, 32e-9, 1e-15);  // the median rank's 70, less what moved
  EXPECT_EQ(&sums.operations.front(), &gemm);

  const int64_t members[] = {5, 1, 1};  // the first timeline stands for most ranks
  EXPECT_DOUBLE_EQ(find(sum_operations(ranks, members), "attention gemm").seconds, 110e-9);
}

TEST(OpSums, OfAnEvenNumberOfRanksTheMedianIsBetween) {
  const program::StepProgram program = three_operations();
  const std::vector<program::RankTimeline> ranks{{"", &program, {{0, 0, 100, 100}}},
                                                 {"", &program, {{0, 0, 300, 300}}}};
  EXPECT_DOUBLE_EQ(sum_operations(ranks).operations.at(0).seconds, 200e-9);
  const int64_t members[] = {3, 1};
  EXPECT_DOUBLE_EQ(sum_operations(ranks, members).operations.at(0).seconds, 100e-9);
}

TEST(OpSums, WaitsAreNotWork) {
  const program::StepProgram program = three_operations();
  // The product waited for room, and the gather between its pieces: most on rank 0.
  const std::vector<program::RankTimeline> ranks{{"", &program, {{0, 0, 100, 20}, {1, 0, 90, 30}}},
                                                 {"", &program, {{0, 0, 100, 40}, {1, 0, 70, 40}}},
                                                 {"", &program, {{0, 0, 100, 60}, {1, 0, 50, 50}}}};
  const OpSums sums = sum_operations(ranks);
  EXPECT_DOUBLE_EQ(find(sums, "attention gemm").seconds, 40e-9);
  EXPECT_DOUBLE_EQ(find(sums, "dense all_gather").seconds, 30e-9);
  EXPECT_NEAR(sums.wait, 40e-9, 1e-15);  // the median rank's 70, less what moved
}

TEST(OpSums, ReadBackFromJson) {
  OpSums sums{{{"experts grouped_gemm", "compute", 0.25, 12}, {"dense all_gather", "gather", 0.125, 3}},
              0.5,
              1.5,
              "cupti"};
  const OpSums back = op_sums_of(to_json(sums));
  EXPECT_EQ(back.step, 1.5);
  EXPECT_EQ(back.wait, 0.5);
  EXPECT_EQ(back.intervals, "cupti");
  ASSERT_EQ(back.operations.size(), 2U);
  EXPECT_EQ(back.operations[1].name, "dense all_gather");
  EXPECT_EQ(back.operations[1].stream, "gather");
  EXPECT_EQ(back.operations[1].seconds, 0.125);
  EXPECT_EQ(back.operations[1].count, 3);
  EXPECT_EQ(nlohmann::json::parse(to_json(sums)).at("streams").at("compute"), 0.25);
  nlohmann::json old = nlohmann::json::parse(to_json(sums));
  old.erase("intervals");
  EXPECT_EQ(op_sums_of(old.dump()).intervals, "events");
  EXPECT_NE(error_of([] { op_sums_of("{}"); }).find("measure again"), std::string::npos);
}

}  // namespace
}  // namespace mop::validate
