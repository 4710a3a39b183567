// Whole steps that are small enough for the sanitizers (presets tsan-small and asan-small): every stream,
// collective and kind of plan, two families that together have every operation.
#include <gtest/gtest.h>

#include "tests/exec/train/support.h"

namespace mop::train::testing {
namespace {

class SmallRuns : public ::testing::TestWithParam<const char*> {};

TEST_P(SmallRuns, ThreeSteps) {
  const RandomSequences data(16, 256);
  std::optional<double> last;
  for (const auto& [plan, ranks, sequences] :
       {std::tuple{std::string("fsdp2:runtime=native,offload=on,ep=2,cp=2,recompute=none"), 4, 2},
        {mop_plan(2, 4, 2, 2, "vp-tile=6,head-chunks=2,spill-min-rows=1,spill-gate=1,round-rows=16"), 4, 2},
        {mop_plan(4, 2, 2, 4,
                  "vp-scheme=weights,vp-tile=2,mla-exchange=latent,checkpoints=host,optimizer=host,spill-min-"
                  "rows=1,"
                  "spill-gate=1,spill-slots=1,round-rows=16"),
         4, 2},
        {mop_plan(4, 4, 4, 2, "save-attention=off,optimizer=stream,clip=off,spill-min-rows=1,spill-gate=1"),
         4, 4}}) {
    Trial trial{GetParam(), plan, ranks, sequences, 1, 16};
    SCOPED_TRACE(trial.text());
    const Prepared prepared(trial.job(), 512);
    TrainerOptions o = options();
    o.check_guards = true;
    o.trace = true;
    Trainer trainer(prepared, data, o);
    trainer.start(weights::RandomSource(prepared.job.model, 7, 0.05, weights::RandomSource::Vectors::random));
    trainer.step();
    const double loss = trainer.step().loss;
    trainer.flush();
    EXPECT_GT(trainer.step().loss, 0);
    if (plan.find("clip=off") != std::string::npos) continue;  // other steps
    if (last) {
      EXPECT_NEAR(loss / *last, 1, 1e-4);
    }
    last = loss;
  }
}

INSTANTIATE_TEST_SUITE_P(, SmallRuns, ::testing::Values("tiny-gpt-oss", "tiny-deepseek-v3"),
                         [](const auto& suite) { return std::string(suite.param).substr(5, 3); });

}  // namespace
}  // namespace mop::train::testing
