// Losses and gradients against Hugging Face transformers (tests/peers/hf_reference.py, computed in fp64), for every
// family, with and without packed documents and the balance loss, on one rank and under a plan that splits everything.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "exec/weights/safetensors.h"
#include "tests/exec/train/support.h"

namespace mop::train::testing {
namespace {

constexpr double kTolerance = 1e-4;  // relative; a gradient by its 2-norm

// The reference's own batch.
class ReferenceBatch final : public data::Sequences {
 public:
  ReferenceBatch(const weights::TensorFile& file, const std::string& kind) {
    const auto ints = [&](const std::string& name) {
      std::vector<int32_t> values(static_cast<size_t>(kRows * 2));
      std::memcpy(values.data(), file.tensors().at(name).data, values.size() * sizeof(int32_t));
      return values;
    };
    tokens_ = ints("tokens");
    targets_ = ints("targets");
    positions_ = ints(kind + ".positions");
    starts_ = ints(kind + ".starts");
  }
  static constexpr int64_t kRows = 64;
  int64_t context() const override { return kRows; }
  int64_t at(data::Position p) const override { return p.sequence; }
  data::Position advance(data::Position p, int64_t n) const override { return {p.epoch, p.sequence + n}; }
  void rows(int64_t sequence, int64_t first, std::span<int32_t> ids, std::span<int32_t> targets,
            std::span<int32_t> positions) const override {
    const auto at = static_cast<size_t>(sequence * kRows + first);
    std::copy_n(tokens_.begin() + static_cast<std::ptrdiff_t>(at), ids.size(), ids.begin());
    std::copy_n(targets_.begin() + static_cast<std::ptrdiff_t>(at), ids.size(), targets.begin());
    std::copy_n(positions_.begin() + static_cast<std::ptrdiff_t>(at), ids.size(), positions.begin());
  }
  void starts(int64_t sequence, std::span<int32_t> starts) const override {
    for (size_t i = 0; i < starts.size(); ++i)
      starts[i] = starts_[static_cast<size_t>(sequence * kRows) + i] - static_cast<int32_t>(sequence * kRows);
  }

 private:
  std::vector<int32_t> tokens_, targets_, positions_, starts_;
};

class Reference : public ::testing::TestWithParam<std::string> {};

void compare(const std::string& family, const std::string& kind, const std::string& plan, int64_t ranks,
             int64_t sequences) {
  SCOPED_TRACE(family + " " + kind + " " + plan);
  const std::filesystem::path folder = std::filesystem::path(MOP_TEST_DATA) / "hf" / family;
  const weights::TensorFile file(folder / "reference.safetensors");
  Trial setup{(folder / "config.json").string(), plan, ranks, sequences, 1, ReferenceBatch::kRows};
  setup.balance_loss = kind == "balanced";
  const Prepared prepared(setup.job());
  const model::ModelConfig& model = prepared.job.model;
  const ReferenceBatch batch(file, setup.balance_loss ? "plain" : kind);
  Trainer trainer(prepared, batch, options());
  trainer.start(weights::RandomSource(model, 7, 0.2, weights::RandomSource::Vectors::random));
  const StepReport report = trainer.step();
  double loss = 0;
  std::memcpy(&loss, file.tensors().at(kind + ".loss").data, sizeof loss);
  EXPECT_NEAR(report.loss / loss, 1, kTolerance);
  for (const model::ParameterId id : model::parameters(model)) {
    if (id.role == model::Role::correction_bias) continue;
    const model::MatrixShape shape = model::shape(model, id);
    std::vector<float> ours(static_cast<size_t>(shape.rows * shape.cols)), theirs(ours.size());
    trainer.shards().read(id, What::gradient, ours.data());
    const model::Stored stored = model::stored(model, id);
    weights::read_block(file.tensors().at(kind + ".gradient." + stored.name), stored, 0, 0, shape.rows, shape.cols,
                        theirs.data(), shape.cols);
    EXPECT_LE(distance(ours, theirs), kTolerance)
        << model::name(id.role) << " of layer " << id.layer << ", expert " << id.expert;
  }
}

bool has(const std::string& family, const std::string& kind) {
  const std::filesystem::path folder = std::filesystem::path(MOP_TEST_DATA) / "hf" / family;
  return weights::TensorFile(folder / "reference.safetensors").tensors().contains(kind + ".loss");
}

TEST_P(Reference, LossAndGradients) {
  for (const char* kind : {"plain", "packed", "balanced"}) {
    if (!has(GetParam(), kind)) continue;
    compare(GetParam(), kind, "fsdp2:runtime=native", 1, 2);
    compare(GetParam(), kind, mop_plan(2, 4, 2, 2, "vp-scheme=weights,vp-tile=16,round-rows=40"), 4, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Reference,
                         ::testing::Values("qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v2", "mixtral", "olmoe",
                                           "glm4_moe"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace mop::train::testing
