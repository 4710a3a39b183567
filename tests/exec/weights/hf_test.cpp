// Weights out to a Hugging Face folder and in again.
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <set>

#include "exec/weights/safetensors.h"
#include "tests/exec/weights/support.h"

namespace mop::weights::testing {
namespace {

using Vectors = RandomSource::Vectors;

class RoundTrip : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Models, RoundTrip, ::testing::ValuesIn(models()), test_name);

float rounded_to_bf16(float value) {
  std::byte bits[2];
  from_float(Type::bf16, &value, 1, bits);
  to_float(Type::bf16, bits, 1, 1, &value, 1);
  return value;
}

TEST_P(RoundTrip, KeepsEveryElement) {
  const Scratch scratch;
  const model::ModelConfig model = config(GetParam());
  const RandomSource source(model, 4, 0.2, Vectors::random);
  write(model, GetParam(), source, scratch / "fp32", Type::f32);
  write(model, GetParam(), source, scratch / "bf16", Type::bf16);
  const HuggingFaceSource fp32(model::read_config(scratch / "fp32"), scratch / "fp32");
  const HuggingFaceSource bf16(model::read_config(scratch / "bf16"), scratch / "bf16");
  for (const model::ParameterId id : model::parameters(model)) {
    std::vector<float> values = whole(model, source, id);
    ASSERT_EQ(whole(model, fp32, id), values) << model::name(id.role);
    if (id.role != model::Role::correction_bias)  // which stays fp32
      for (float& value : values) value = rounded_to_bf16(value);
    ASSERT_EQ(whole(model, bf16, id), values) << model::name(id.role);
  }
}

TEST_P(RoundTrip, WritesTheTensorsOfTransformers) {
  const Scratch scratch;
  const model::ModelConfig model = config(GetParam());
  write(model, GetParam(), RandomSource(model, 4), scratch / "out", Type::f32);
  const TensorFile file(scratch / "out/model.safetensors");
  Json written = Json::object();
  for (const auto& [name, tensor] : file.tensors()) {
    written[name] = tensor.shape;
    EXPECT_EQ(tensor.type, "F32");
  }
  EXPECT_EQ(written, names()[GetParam()]);
}

TEST_P(RoundTrip, BlocksOfShards) {
  std::mt19937 random(6);
  const Scratch scratch;
  const model::ModelConfig model = config(GetParam());
  const RandomSource source(model, 4, 0.2, Vectors::random);
  constexpr int64_t kMaxBytes = 30000;
  write(model, GetParam(), source, scratch / "out", Type::f32, kMaxBytes);

  // Shards as the format wants them: numbered, no larger than asked unless one tensor is, all in the index.
  const Json index = Json::parse(text_of(scratch / "out/model.safetensors.index.json"));
  std::map<std::string, int64_t> files;
  int64_t total = 0;
  std::set<std::string> listed;
  for (const auto& [name, file] : index["weight_map"].items()) {
    listed.insert(name);
    ++files[file];
  }
  int number = 0;
  for (const auto& [name, tensors] : files) {
    EXPECT_EQ(name, fmt::format("model-{:05}-of-{:05}.safetensors", ++number, files.size()));
    const TensorFile file(scratch / "out" / name);
    EXPECT_EQ(static_cast<int64_t>(file.tensors().size()), tensors);
    int64_t bytes = 0;
    for (const auto& [tensor, place] : file.tensors()) {
      EXPECT_EQ(index["weight_map"][tensor], name);
      bytes += place.bytes;
    }
    EXPECT_TRUE(bytes <= kMaxBytes || tensors == 1);
    total += bytes;
  }
  EXPECT_GT(files.size(), 3u);
  EXPECT_EQ(index["metadata"]["total_size"], total);
  EXPECT_EQ(listed.size(), names()[GetParam()].size());
  EXPECT_FALSE(fs::exists(scratch / "out/model.safetensors"));

  const HuggingFaceSource read(model, scratch / "out");
  for (const model::ParameterId id : model::parameters(model)) {
    const model::MatrixShape shape = model::shape(model, id);
    const auto pick = [&](int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random); };
    const int64_t row = pick(shape.rows), col = pick(shape.cols);
    const int64_t rows = 1 + pick(shape.rows - row), cols = 1 + pick(shape.cols - col), ld = cols + 2;
    std::vector<float> expected(static_cast<size_t>(rows * ld), -9), got = expected;
    source.read(id, row, col, rows, cols, expected.data(), ld);
    read.read(id, row, col, rows, cols, got.data(), ld);
    ASSERT_EQ(got, expected) << model::name(id.role);
  }
}

// The raw elements of a file, without our own mapping on the way back.
TEST(WriteHuggingFace, GptOssLiesAsItsModelCodeReadsIt) {
  const Scratch scratch;
  const std::string folder = "tests/data/hf/gpt_oss";
  const model::ModelConfig model = config(folder);
  const auto value = [](model::ParameterId id, int64_t r, int64_t c) {
    return static_cast<float>(10000000 * static_cast<int>(id.role == model::Role::expert_up) +
                              100000 * id.layer + 10000 * id.expert + 100 * r + c);
  };
  write_hugging_face(model, config_path(folder), scratch / "out", Type::f32,
                     [&](model::ParameterId id, float* out) {
                       const model::MatrixShape shape = model::shape(model, id);
                       for (int64_t r = 0; r < shape.rows; ++r)
                         for (int64_t c = 0; c < shape.cols; ++c) *out++ = value(id, r, c);
                     });
  const TensorFile file(scratch / "out/model.safetensors");
  const auto at = [&](const std::string& name, int64_t index) {
    float result = 0;
    std::memcpy(&result, file.tensors().at("model.layers.1.mlp.experts." + name).data + 4 * index, 4);
    return result;
  };
  const int64_t h = model.hidden, i = model.expert_intermediate;
  for (int32_t e = 0; e < model.experts; ++e) {
    for (int64_t x = 0; x < h; ++x) {
      for (int64_t y = 0; y < i; ++y) {
        ASSERT_EQ(at("gate_up_proj", (e * h + x) * 2 * i + 2 * y),
                  value({model::Role::expert_gate, 1, e}, y, x));
        ASSERT_EQ(at("gate_up_proj", (e * h + x) * 2 * i + 2 * y + 1),
                  value({model::Role::expert_up, 1, e}, y, x));
        ASSERT_EQ(at("down_proj", (e * i + y) * h + x), value({model::Role::expert_down, 1, e}, x, y));
      }
    }
  }
}

TEST(WriteHuggingFace, ConfigIsTheModelsOwn) {
  const Scratch scratch;
  Json json = Json::parse(text_of(config_path("tests/data/hf/olmoe")));
  json["quantization_config"] = {{"quant_method", "fp8"}};
  json["dtype"] = "float16";
  json["something"] = {{"of", "its own"}};
  write_text(scratch / "config.json", json.dump());
  const model::ModelConfig model = model::read_config(scratch / "config.json");
  write_hugging_face(model, scratch / "config.json", scratch / "out", Type::bf16,
                     [&](model::ParameterId id, float* out) {
                       const model::MatrixShape shape = model::shape(model, id);
                       std::fill_n(out, shape.rows * shape.cols, 1.0f);
                     });
  json.erase("quantization_config");
  json.erase("dtype");
  json["torch_dtype"] = "bfloat16";
  EXPECT_EQ(Json::parse(text_of(scratch / "out/config.json")), json);
}

TEST(WriteHuggingFace, ATiedHeadIsReadThroughItsOwnTensorOrWithout) {
  const Scratch scratch;
  Json json = Json::parse(text_of(config_path("tests/data/hf/qwen3_moe")));
  json["tie_word_embeddings"] = true;
  write_text(scratch / "config.json", json.dump());
  const model::ModelConfig tied = model::read_config(scratch / "config.json");
  const RandomSource source(config("tests/data/hf/qwen3_moe"), 1);
  write(config("tests/data/hf/qwen3_moe"), "tests/data/hf/qwen3_moe", source, scratch / "untied", Type::f32);
  write(tied, "tests/data/hf/qwen3_moe", source, scratch / "tied", Type::f32);
  EXPECT_EQ(TensorFile(scratch / "tied/model.safetensors").tensors().count("lm_head.weight"), 0u);
  const model::ParameterId embedding{model::Role::embedding};
  EXPECT_EQ(whole(tied, HuggingFaceSource(tied, scratch / "untied"), embedding),
            whole(tied, source, embedding));
  EXPECT_EQ(whole(tied, HuggingFaceSource(tied, scratch / "tied"), embedding),
            whole(tied, source, embedding));
}

// What the reference gradients claim to be.
class Reference : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Families, Reference,
                         ::testing::Values("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral",
                                           "olmoe", "qwen3_moe"));

TEST_P(Reference, HasAGradientForEveryTrainedParameter) {
  const std::string folder = "tests/data/hf/" + GetParam();
  const TensorFile file(data_home() / folder / "reference.safetensors");
  const model::ModelConfig model = config(folder);
  std::vector<std::string> cases{"plain", "packed"};
  if (model.aux_loss_coefficient > 0) cases.push_back("balanced");
  size_t expected = 2 + 4 + (cases.size() == 3 ? 1 : 0) + cases.size();
  for (const std::string& which : cases) {
    EXPECT_EQ(file.tensors().at(which + ".loss").bytes, 8);
    std::set<std::string> tensors;
    std::set<std::pair<int, int>> idle;  // experts that no token chose
    for (const model::ParameterId id : model::parameters(model)) {
      if (id.role == model::Role::correction_bias) continue;
      const model::Stored stored = model::stored(model, id);
      tensors.insert(stored.name);
      const Tensor& tensor = file.tensors().at(which + ".gradient." + stored.name);
      const model::MatrixShape shape = model::shape(model, id);
      std::vector<float> values(static_cast<size_t>(shape.rows * shape.cols));
      read_block(tensor, stored, 0, 0, shape.rows, shape.cols, values.data(), shape.cols);
      float largest = 0;
      for (const float value : values) largest = std::max(largest, std::abs(value));
      EXPECT_TRUE(std::isfinite(largest)) << stored.name;
      if (largest < 1e-7f) {
        EXPECT_GE(id.expert, 0) << stored.name << " " << largest;
        idle.emplace(id.layer, id.expert);
      }
    }
    EXPECT_LE(idle.size(), 1u);
    expected += tensors.size();
  }
  EXPECT_EQ(file.tensors().size(), expected);
}

}  // namespace
}  // namespace mop::weights::testing
