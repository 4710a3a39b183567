// Every plan computes the same: loss and gradients against one rank, weights after five steps, and in all of
// those runs memory as it was planned. fp32, documents and masked targets in the data.
#include <gtest/gtest.h>

#include "tests/exec/support/allocations.h"
#include "tests/exec/train/support.h"

namespace mop::train::testing {
namespace {

constexpr double kGradients = 1e-5;  // relative, 2-norm of each parameter's gradient

// Weights after five steps of AdamW, as a share of what the steps moved. Adam divides by the gradient's own
// size, so where a gradient is noise about zero the update is noise of full size: eps 1e-4, far above the
// noise of these gradients (1e-7) and below most of them, keeps that out of the comparison.
constexpr double kRate = 1e-3, kEps = 1e-4, kWeights = 1e-3;
constexpr int kSteps = 5;
constexpr int64_t kGuard = 512;

struct Result {
  double loss = 0;
  std::optional<double> norm;
  Parameters gradients, weights;
};

// Runs the setup with checks on: guards, addressed bytes, allocations.
Result run(const Trial& setup, const data::Sequences& data) {
  const Prepared prepared(setup.job(), kGuard), plain(setup.job());
  TrainerOptions o = options(kRate, kEps);
  o.check_guards = true;
  Trainer trainer(prepared, data, o);
  trainer.start(weights::RandomSource(prepared.job.model, 7, 0.05, weights::RandomSource::Vectors::random));
  Result result;
  for (int i = 0; i < kSteps; ++i) {
    int64_t allocated = 0;
    StepReport report;
    {
      const test::Allocations count;
      report = trainer.step();
      allocated = count.count();
    }
    // The guards' own bookkeeping is set up in the first step.
    if (i > 0 && test::Allocations::counted()) {
      EXPECT_EQ(allocated, 0) << "step " << i;
    }
    if (i == 0) {
      result.loss = report.loss;
      result.norm = report.gradient_norm;
      result.gradients = read_all(trainer, prepared.job.model, What::gradient);
    }
  }
  trainer.flush();
  result.weights = read_all(trainer, prepared.job.model, What::weights);
  // Operations address all of the arena, to the alignment of its last buffer; and without guards the arena is
  // what the simulator reports.
  const auto expect_full = [](int64_t addressed, int64_t bytes) {
    EXPECT_LE(addressed, bytes);
    EXPECT_GT(addressed, bytes - program::kAlignment);
  };
  expect_full(trainer.bytes_addressed(program::Space::hbm) + kGuard, prepared.memory.arenas.hbm.bytes);
  Trainer unguarded(plain, data, options());
  unguarded.start(weights::RandomSource(prepared.job.model, 7, 0.05));
  unguarded.step();
  EXPECT_EQ(plain.memory.arenas.hbm.bytes, program::plan_arenas(plain.program).hbm.bytes);
  expect_full(unguarded.bytes_addressed(program::Space::hbm), plain.memory.arenas.hbm.bytes);
  return result;
}

void expect_same(const Trial& setup, const Result& one, const Result& many) {
  SCOPED_TRACE(setup.text());
  const model::ModelConfig model = model::read_config(setup.model);
  EXPECT_NEAR(many.loss / one.loss, 1, kGradients);
  if (many.norm && one.norm) {
    EXPECT_NEAR(*many.norm / *one.norm, 1, kGradients);
  }
  std::string where;
  EXPECT_LE(farthest(model, many.gradients, one.gradients, &where), kGradients) << where;
  // Clipping changes what the steps are.
  if (many.norm.has_value() != one.norm.has_value()) return;
  const weights::RandomSource source(model, 7, 0.05, weights::RandomSource::Vectors::random);
  const std::vector<model::ParameterId> ids = model::parameters(model);
  for (size_t i = 0; i < ids.size(); ++i) {
    const model::MatrixShape shape = model::shape(model, ids[i]);
    std::vector<float> start(static_cast<size_t>(shape.rows * shape.cols));
    source.read(ids[i], 0, 0, shape.rows, shape.cols, start.data(), shape.cols);
    double moved = 0, apart = 0;
    for (size_t k = 0; k < start.size(); ++k) {
      moved += std::pow(static_cast<double>(one.weights[i][k]) - static_cast<double>(start[k]), 2);
      apart += std::pow(static_cast<double>(one.weights[i][k]) - static_cast<double>(many.weights[i][k]), 2);
    }
    EXPECT_LE(std::sqrt(apart), kWeights * std::sqrt(moved))
        << model::name(ids[i].role) << " of layer " << ids[i].layer;
  }
}

struct Plan {
  std::string text;
  int64_t ranks, sequences;
};

// Eight sequences a step under each of them. `chunks`: head chunks, where the model's heads can be split.
std::vector<Plan> plans(int64_t chunks) {
  const std::string split = ",head-chunks=" + std::to_string(chunks), native = "fsdp2:runtime=native";
  const std::string skewed = "spill-min-rows=1,spill-gate=1,";
  return {
      {native, 2, 4},
      {native + ",offload=on", 2, 4},
      {native + ",replicate=2,reshard=off,prefetch=off", 4, 2},
      {native + ",ep=4,loss-chunk=24,replicate=2", 8, 1},
      {native + ",tp=2,cp=2,ep=2", 8, 4},
      {native + ",recompute=none", 1, 8},
      {native + ",recompute=none,cp=2,ep=4,offload=on", 4, 4},
      {mop_plan(1, 1, 1, 1), 1, 8},
      {mop_plan(1, 2, 2, 1, "vp-tile=24" + split), 2, 8},
      {mop_plan(4, 4, 4, 4, "vp-tile=24"), 4, 8},
      {mop_plan(2, 8, 2, 2,
                "vp-scheme=weights,vp-tile=10,mla-exchange=latent,checkpoints=host,optimizer=host" + split),
       8, 2},
      {mop_plan(8, 4, 4, 8,
                skewed + "vp-scheme=weights,save-attention=off,optimizer=stream,optimizer-staged-layers=1,"
                         "round-rows=64"),
       8, 4},
      {mop_plan(2, 2, 1, 4,
                skewed + "expert-placement=across,mla-exchange=latent,checkpoints=host,save-attention=off,"
                         "optimizer=split,optimizer-hbm-layers=2,spill-slots=1,round-rows=50"),
       4, 2},
      {mop_plan(4, 4, 2, 4, "least-loaded=off,vp-scheme=weights,clip=off,optimizer=host" + split), 4, 4},
      {mop_plan(4, 2, 2, 2, "clip=off,mla-exchange=latent,optimizer=stream"), 4, 4},
      {mop_plan(4, 2, 2, 2, "clip=off,mla-exchange=latent,optimizer=stream,optimizer-staged-layers=1"), 4, 4},
      {mop_plan(1, 4, 1, 4, "kept-layers=2"), 4, 2},
      {mop_plan(2, 4, 2, 4, "kept-layers=3,checkpoints=host,mla-exchange=latent" + split), 4, 4},
  };
}

class Lossless : public ::testing::TestWithParam<const char*> {};

TEST_P(Lossless, EveryPlanComputesTheSame) {
  Trial setup{GetParam(), "fsdp2:runtime=native", 1, 8};
  const RandomSequences data(setup.context, 256);
  const Result one = run(setup, data);
  // Heads whose norm spans all of them stay together.
  const int64_t chunks = model::read_config(GetParam()).qk_norm == model::QkNorm::full ? 1 : 2;
  for (const Plan& plan : plans(chunks)) {
    setup.plan = plan.text;
    setup.ranks = plan.ranks;
    setup.sequences = plan.sequences;
    expect_same(setup, one, run(setup, data));
    if (HasFailure()) return;
  }
}

TEST_P(Lossless, KeptLayersChangeNoBit) {
  Trial setup{GetParam(), mop_plan(1, 2, 2, 1, "kept-layers=0"), 2, 8};
  const RandomSequences data(setup.context, 256);
  const Result again = run(setup, data);
  setup.plan = mop_plan(1, 2, 2, 1, "kept-layers=4");
  const Result kept = run(setup, data);
  EXPECT_EQ(kept.loss, again.loss);
  EXPECT_EQ(kept.norm, again.norm);
  EXPECT_EQ(kept.gradients, again.gradients);
  EXPECT_EQ(kept.weights, again.weights);
}

TEST_P(Lossless, AccumulationIsALargerBatch) {
  Trial setup{GetParam(), "fsdp2:runtime=native", 1, 8};
  const RandomSequences data(setup.context, 256);
  const Result one = run(setup, data);
  for (const Plan& plan :
       {Plan{"fsdp2:runtime=native", 1, 4}, Plan{"fsdp2:runtime=native,offload=on", 2, 2},
        Plan{mop_plan(4, 2, 2, 2, "optimizer=host"), 4, 2},
        Plan{mop_plan(2, 2, 2, 2, "vp-scheme=weights,checkpoints=host,optimizer=stream"), 4, 2}}) {
    setup.plan = plan.text;
    setup.ranks = plan.ranks;
    setup.sequences = plan.sequences;
    setup.accumulate = 2;
    expect_same(setup, one, run(setup, data));
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Lossless,
                         ::testing::Values("tiny-qwen3-moe", "tiny-gpt-oss", "tiny-deepseek-v3",
                                           "tiny-mixtral", "tiny-olmoe", "tiny-glm4-moe"),
                         [](const auto& suite) {
                           std::string name = suite.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(Lossless, BalanceLoss) {
  for (const char* model : {"tiny-qwen3-moe", "tiny-olmoe"}) {
    Trial setup{model, "fsdp2:runtime=native", 1, 8};
    setup.balance_loss = true;
    const RandomSequences data(setup.context, 256);
    const Result one = run(setup, data);
    setup.plan = mop_plan(4, 4, 2, 2, "vp-scheme=weights");
    setup.ranks = 4;
    setup.sequences = 4;
    expect_same(setup, one, run(setup, data));
  }
}

// The same operations in the same order: bit for bit.
TEST(Lossless, BitwiseWhereTheOrderIsTheSame) {
  Trial setup{"tiny-qwen3-moe", "fsdp2:runtime=native", 1, 8};
  const RandomSequences data(setup.context, 256);
  const Result one = run(setup, data);
  setup.plan = mop_plan(1, 1, 1, 1);
  const Result other = run(setup, data);
  EXPECT_EQ(one.loss, other.loss);
  EXPECT_EQ(one.gradients, other.gradients);
  EXPECT_EQ(one.weights, other.weights);
}

// Where states live, how the master is kept (in bf16 as low bits on the GPU, whole on the CPU), and what
// overlaps, changes nothing at all.
TEST(Lossless, BitwiseWhereverTheStatesAre) {
  const RandomSequences data(32, 256);
  for (const auto precision : {plan::Precision::fp32, plan::Precision::bf16}) {
    Trial setup{"tiny-qwen3-moe", mop_plan(2, 4, 2, 2), 4, 4};
    setup.precision = precision;
    const Result hbm = run(setup, data);
    setup.plan = mop_plan(2, 4, 2, 2, "clip=off");
    const Result free = run(setup, data);
    EXPECT_NE(free.weights, hbm.weights);
    for (const char* more :
         {"optimizer=host", "optimizer=stream", "optimizer=stream,optimizer-staged-layers=1",
          "optimizer=stream,optimizer-staged-layers=2", "optimizer=stream,optimizer-hbm-layers=1",
          "optimizer=stream,optimizer-hbm-layers=1,optimizer-staged-layers=1",
          "checkpoints=host,optimizer=split,optimizer-hbm-layers=1"}) {
      setup.plan = mop_plan(2, 4, 2, 2, more);
      const Result result = run(setup, data);
      EXPECT_EQ(result.loss, hbm.loss) << more;
      EXPECT_EQ(result.gradients, hbm.gradients) << more;
      EXPECT_EQ(result.weights, hbm.weights) << more;
    }
    for (const char* more : {"optimizer=stream", "optimizer=stream,optimizer-staged-layers=1",
                             "optimizer=stream,optimizer-hbm-layers=1,optimizer-staged-layers=1",
                             "optimizer=stream,optimizer-staged-layers=2"}) {
      setup.plan = mop_plan(2, 4, 2, 2, std::string("clip=off,") + more);
      EXPECT_EQ(run(setup, data).weights, free.weights) << more;
    }
  }
}

// A router that sends every token to the same experts: the same memory, the same result.
class HotRouter final : public weights::Source {
 public:
  explicit HotRouter(const model::ModelConfig& model)
      : inner_(model, 7, 0.05, weights::RandomSource::Vectors::random) {}
  void read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
            int64_t ld) const override {
    inner_.read(id, row, col, rows, cols, out, ld);
    if (id.role != model::Role::router_bias) return;
    for (int64_t c = 0; c < cols; ++c) out[c] = col + c < 2 ? 50.0F : 0.0F;
  }

 private:
  weights::RandomSource inner_;
};

TEST(Lossless, EveryTokenToTheSameExperts) {
  const RandomSequences data(32, 256);
  Result one;
  for (const Plan& plan : {Plan{"fsdp2:runtime=native", 1, 8},
                           Plan{mop_plan(4, 4, 2, 2, "round-rows=16,spill-min-rows=1"), 4, 4},
                           Plan{mop_plan(8, 8, 2, 2, "round-rows=16,spill-min-rows=1,spill-slots=1"), 8, 2},
                           Plan{mop_plan(8, 8, 1, 2, "round-rows=16,least-loaded=off"), 8, 1}}) {
    Trial setup{"tiny-gpt-oss", plan.text, plan.ranks, plan.sequences};
    SCOPED_TRACE(setup.text());
    const Prepared prepared(setup.job(), kGuard);
    TrainerOptions o = options(kRate, kEps);
    o.check_guards = true;
    Trainer trainer(prepared, data, o);
    trainer.start(HotRouter(prepared.job.model));
    const StepReport report = trainer.step();
    const Parameters gradients = read_all(trainer, prepared.job.model, What::gradient);
    trainer.step();
    if (plan.ranks == 1) {
      one.loss = report.loss;
      one.gradients = gradients;
      continue;
    }
    EXPECT_NEAR(report.loss / one.loss, 1, kGradients);
    std::string where;
    EXPECT_LE(farthest(prepared.job.model, gradients, one.gradients, &where), kGradients) << where;
  }
}

}  // namespace
}  // namespace mop::train::testing
