// Losses and gradients against Hugging Face transformers (tests/peers/hf_reference.py, computed in fp64), for
// every family, with and without packed documents and the balance loss, on one rank and under a plan that
// splits everything.
#include "tests/exec/support/reference.h"

#include <gtest/gtest.h>

#include "tests/exec/train/support.h"

namespace mop::train::testing {
namespace {

constexpr double kTolerance = 1e-4;  // relative; a gradient by its 2-norm

class Reference : public ::testing::TestWithParam<std::string> {};

void compare(const std::string& family, const std::string& kind, const std::string& plan, int64_t ranks,
             int64_t sequences) {
  SCOPED_TRACE(family + " " + kind + " " + plan);
  const std::filesystem::path folder = reference_folder(family);
  const weights::TensorFile file(folder / "reference.safetensors");
  Trial setup{(folder / "config.json").string(), plan, ranks, sequences, 1, ReferenceBatch::kRows};
  setup.balance_loss = kind == "balanced";
  const Prepared prepared(setup.job());
  const model::ModelConfig& model = prepared.job.model;
  const ReferenceBatch batch(file, setup.balance_loss ? "plain" : kind);
  Trainer trainer(prepared, batch, options());
  trainer.start(weights::RandomSource(model, 7, 0.2, weights::RandomSource::Vectors::random));
  const StepReport report = trainer.step();
  EXPECT_NEAR(report.loss / reference_loss(file, kind), 1, kTolerance);
  for (const model::ParameterId id : model::parameters(model)) {
    if (id.role == model::Role::correction_bias) continue;
    const model::MatrixShape shape = model::shape(model, id);
    std::vector<float> ours(static_cast<size_t>(shape.rows * shape.cols));
    trainer.shards().read(id, What::gradient, ours.data());
    EXPECT_LE(distance(ours, reference_gradient(file, kind, model, id)), kTolerance)
        << model::name(id.role) << " of layer " << id.layer << ", expert " << id.expert;
  }
}

bool has(const std::string& family, const std::string& kind) {
  return weights::TensorFile(reference_folder(family) / "reference.safetensors")
      .tensors()
      .contains(kind + ".loss");
}

TEST_P(Reference, LossAndGradients) {
  for (const char* kind : {"plain", "packed", "balanced"}) {
    if (!has(GetParam(), kind)) continue;
    compare(GetParam(), kind, "fsdp2:runtime=native", 1, 2);
    compare(GetParam(), kind, mop_plan(2, 4, 2, 2, "vp-scheme=weights,vp-tile=16,round-rows=40"), 4, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Reference,
                         ::testing::Values("qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v2", "mixtral",
                                           "olmoe", "glm4_moe"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace mop::train::testing
