// Each operation on a GPU against the same on the CPU.
#include <gtest/gtest.h>

#include <set>

#include "tests/error_of.h"
#include "tests/exec/cuda/sample.h"
#include "tests/exec/train/support.h"
#include "tests/kernels/device_array.h"

namespace mop::cuda::testing {
namespace {

class Parity : public ::testing::TestWithParam<Case> {
 protected:
  // compare(sample) for every seed.
  template <class F>
  void for_each_sample(F compare) {
    for (int seed = 0; seed < GetParam().seeds; ++seed) {
      SCOPED_TRACE("seed " + std::to_string(seed));
      Sample sample(seed);
      GetParam().build(sample);
      sample.finish();
      try {
        compare(sample);
      } catch (const std::exception& error) {
        ADD_FAILURE() << error.what();  // here, where the seed is told
      }
      if (HasFailure()) return;
    }
  }
};

TEST_P(Parity, AGpuComputesWhatTheCpuDoes) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  for_each_sample([](Sample& sample) { expect_alike(sample, run_on_cpu(sample), run_on_gpu(sample)); });
}

// Needs no GPU: with every number of bf16 in fp32, the CPU's results differ by the roundings that the
// tolerances are made for; a unit more, as only one side rounds.
TEST_P(Parity, TheTolerancesAllowRounding) {
  for_each_sample([](Sample& sample) {
    if (sample.widens) expect_alike(sample, run_on_cpu(sample), run_on_cpu(sample, true), 1);
  });
}

INSTANTIATE_TEST_SUITE_P(Operations, Parity, ::testing::ValuesIn(cases()),
                         [](const auto& suite) { return suite.param.name; });

// Every kind of operation that some native program has is compared above.
TEST(Parity, EveryKindOfOperationHasACase) {
  std::set<OpKind> compared;
  for (const Case& one : cases()) {
    Sample sample(0);
    one.build(sample);
    sample.finish();
    for (const program::Op& op : sample.program().ops) compared.insert(op.kind);
  }
  for (const char* model : {"tiny-qwen3-moe", "tiny-gpt-oss", "tiny-deepseek-v3", "tiny-olmoe"})
    for (const bool balanced : {false, true})
      for (const std::string& plan :
           {std::string("fsdp2:runtime=native,offload=on,ep=2,cp=4"),
            std::string("fsdp2:runtime=native,recompute=none,replicate=2"),
            mop_plan(4, 4, 4, 4, "checkpoints=host,optimizer=host"),
            mop_plan(2, 4, 2, 2, "vp-scheme=weights,optimizer=stream"), mop_plan(1, 2, 1, 1, "clip=off")}) {
        train::testing::Trial trial{model, plan, 4, 4, 2};
        trial.precision = plan::Precision::bf16;
        trial.balance_loss = balanced;
        const train::Prepared prepared(trial.job());
        for (const program::Op& op : prepared.program.ops)
          if (!program::is_collective(op.kind)) {
            EXPECT_TRUE(compared.contains(op.kind)) << program::name(op.kind);
          }
      }
}

// What the data did wrong is told alike.
struct Wrong {
  const char* name;
  void (*build)(Sample&);
  const char* part;
};
void PrintTo(const Wrong& wrong, std::ostream* to) {
  *to << wrong.name;
}
class Mistakes : public ::testing::TestWithParam<Wrong> {};

TEST_P(Mistakes, AreToldByBoth) {
  const auto made = [&](Sample& sample) -> Sample& {
    GetParam().build(sample);
    sample.finish();
    return sample;
  };
  Sample here(0), there(0);
  EXPECT_NE(error_of([&] { run_on_cpu(made(here)); }).find(GetParam().part), std::string::npos);
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  EXPECT_NE(error_of([&] { run_on_gpu(made(there)); }).find(GetParam().part), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(
    , Mistakes,
    ::testing::Values(Wrong{"token",
                            [](Sample& s) {
                              s.model.vocab = 10;
                              s.op(OpKind::embedding, {},
                                   {s.whole(1, 4, {1, 9, 10, 3}), s.normal(Type::f32, 10, 8)},
                                   {s.blank(Type::f32, 4, 8)});
                            },
                            "vocabulary"},
                      Wrong{"target",
                            [](Sample& s) {
                              s.model.vocab = 10;
                              s.op(OpKind::cross_entropy, {},
                                   {s.normal(Type::f32, 3, 10), s.whole(1, 3, {1, 11, -100})},
                                   {s.blank(Type::f32, 3, 3, {.dense = true})});
                            },
                            "vocabulary"},
                      Wrong{"norm",
                            [](Sample& s) {
                              s.op(OpKind::clip_factor, {}, {s.number_of(Type::f64, INFINITY)},
                                   {s.blank(Type::f32, 1, 1)});
                            },
                            "gradient norm"}),
    [](const auto& suite) { return std::string(suite.param.name); });

}  // namespace
}  // namespace mop::cuda::testing
