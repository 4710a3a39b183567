// Parameters against what transformers writes for the same config.json (tests/data/hf/names.json).
#include <map>
#include <set>

#include "sim/model/counts.h"
#include "tests/exec/weights/support.h"

namespace mop::weights::testing {
namespace {

class Names : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Models, Names, ::testing::ValuesIn(models()), test_name);

TEST_P(Names, AndShapesAreThoseOfTransformers) {
  const model::ModelConfig model = config(GetParam());
  Json ours = Json::object();
  for (const model::ParameterId id : model::parameters(model)) {
    const model::Stored stored = model::stored(model, id);
    const auto [known, is_new] = ours.emplace(stored.name, stored.shape);
    EXPECT_EQ(*known, Json(stored.shape)) << stored.name;
  }
  EXPECT_EQ(ours, names()[GetParam()]) << Json::diff(names()[GetParam()], ours).dump();
}

TEST_P(Names, ParametersCoverEveryElementOnce) {
  const model::ModelConfig model = config(GetParam());
  std::map<std::string, std::vector<int>> seen;
  for (const auto& [name, shape] : names()[GetParam()].items()) {
    int64_t elements = 1;
    for (const auto& n : shape) elements *= n.get<int64_t>();
    seen[name].resize(static_cast<size_t>(elements));
  }
  for (const model::ParameterId id : model::parameters(model)) {
    const model::Stored stored = model::stored(model, id);
    const model::MatrixShape shape = model::shape(model, id);
    for (int64_t r = 0; r < shape.rows; ++r)
      for (int64_t c = 0; c < shape.cols; ++c)
        ++seen[stored.name].at(
            static_cast<size_t>(stored.offset + r * stored.row_stride + c * stored.col_stride));
  }
  for (const auto& [name, counts] : seen)
    EXPECT_TRUE(std::all_of(counts.begin(), counts.end(), [](int n) { return n == 1; })) << name;
}

// gpt_oss is the one family that fuses and transposes: element by element, from the layout that its model
// code indexes: gate_up[e, h, 2 i] is gate, + 1 up; down[e, i, h].
TEST(Stored, GptOssIsFusedTransposedAndInterleaved) {
  const model::ModelConfig model = config("tests/data/hf/gpt_oss");
  const int64_t h = model.hidden, i = model.expert_intermediate;
  using model::Role;
  const auto index = [&](Role role, int64_t r, int64_t c) {
    const model::Stored s = model::stored(model, {role, 1, 3});
    return s.offset + r * s.row_stride + c * s.col_stride;
  };
  EXPECT_EQ(index(Role::expert_gate, 5, 7), (3 * h + 7) * 2 * i + 2 * 5);
  EXPECT_EQ(index(Role::expert_up, 5, 7), (3 * h + 7) * 2 * i + 2 * 5 + 1);
  EXPECT_EQ(index(Role::expert_down, 7, 5), (3 * i + 5) * h + 7);
  EXPECT_EQ(index(Role::expert_gate_bias, 0, 5), 3 * 2 * i + 2 * 5);
  EXPECT_EQ(index(Role::expert_up_bias, 0, 5), 3 * 2 * i + 2 * 5 + 1);
  EXPECT_EQ(index(Role::expert_down_bias, 0, 7), 3 * h + 7);
}

TEST(Parameters, OfShippedModelsAddUpToTheirCount) {
  for (const std::string& name : model::shipped_models()) {
    const model::ModelConfig model = model::read_config(name);
    int64_t total = 0;
    std::set<model::ParameterId> ids;
    for (const model::ParameterId id : model::parameters(model)) {
      const model::MatrixShape shape = model::shape(model, id);
      total += shape.rows * shape.cols;
      EXPECT_TRUE(ids.insert(id).second) << name << " " << model::name(id.role);
    }
    EXPECT_EQ(total, model::count_parameters(model).total) << name;
  }
}

TEST(Parameters, NamePublishedTensors) {
  using model::Role;
  const auto name = [](const char* model, model::ParameterId id) {
    return model::stored(model::read_config(model), id).name;
  };
  EXPECT_EQ(name("kimi-k2", {Role::expert_down, 60, 383}),
            "model.layers.60.mlp.experts.383.down_proj.weight");
  EXPECT_EQ(name("deepseek-v3", {Role::kv_a, 0}), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight");
  EXPECT_EQ(name("deepseek-v2-lite", {Role::q, 3}), "model.layers.3.self_attn.q_proj.weight");
  EXPECT_EQ(name("mixtral-8x7b", {Role::expert_up, 31, 7}),
            "model.layers.31.block_sparse_moe.experts.7.w3.weight");
  EXPECT_EQ(name("gpt-oss-120b", {Role::sinks, 35}), "model.layers.35.self_attn.sinks");
  EXPECT_EQ(name("glm-4.5-air", {Role::correction_bias, 1}),
            "model.layers.1.mlp.gate.e_score_correction_bias");
}

TEST(Parameters, ATiedHeadIsNone) {
  model::ModelConfig model = config("tests/data/hf/qwen3_moe");
  const size_t untied = model::parameters(model).size();
  model.tied_head = true;
  EXPECT_EQ(model::parameters(model).size(), untied - 1);
}

TEST(Parameters, WhatTheModelLacksIsRefused) {
  const model::ModelConfig model = config("tests/data/hf/qwen3_moe");
  using model::Role;
  EXPECT_THROW(model::shape(model, {Role::q}), InternalError);
  EXPECT_THROW(model::shape(model, {Role::q, 2}), InternalError);
  EXPECT_THROW(model::shape(model, {Role::expert_up, 0}), InternalError);
  EXPECT_THROW(model::shape(model, {Role::expert_up, 0, 4}), InternalError);
  EXPECT_THROW(model::shape(model, {Role::router, 0, 0}), InternalError);
}

}  // namespace
}  // namespace mop::weights::testing
