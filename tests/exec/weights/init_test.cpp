#include <gmock/gmock.h>

#include <cmath>
#include <random>

#include "exec/weights/weights.h"
#include "tests/exec/weights/support.h"

namespace mop::weights::testing {
namespace {

using model::Role;
using Vectors = RandomSource::Vectors;

float element(const Source& source, model::ParameterId id, int64_t row, int64_t col) {
  float value = 0;
  source.read(id, row, col, 1, 1, &value, 1);
  return value;
}

// The same formula in tests/peers/hf_reference.py, whose gradients belong to these weights.
TEST(RandomSource, AgreesWithTheReferenceScript) {
  const RandomSource source(config("tests/data/hf/gpt_oss"), 7, 0.2, Vectors::random);
  const auto near = [](float expected) { return ::testing::FloatNear(expected, 1e-7f); };
  EXPECT_THAT(element(source, {Role::final_norm}, 0, 0), near(1.1083732843399048f));
  EXPECT_THAT(element(source, {Role::final_norm}, 0, 31), near(0.7895589470863342f));
  EXPECT_THAT(element(source, {Role::head}, 0, 17), near(0.030741186812520027f));
  EXPECT_THAT(element(source, {Role::expert_gate, 1, 0}, 0, 0), near(-0.021182889118790627f));
  EXPECT_THAT(element(source, {Role::expert_up, 1, 0}, 0, 0), near(0.18852055072784424f));
  EXPECT_THAT(element(source, {Role::expert_gate, 1, 2}, 3, 5), near(0.13211998343467712f));
  EXPECT_THAT(element(source, {Role::expert_up, 1, 2}, 3, 5), near(0.05430081859230995f));
}

TEST(RandomSource, ABlockIsPartOfTheWhole) {
  std::mt19937 random(1);
  for (const std::string& folder : models()) {
    const model::ModelConfig model = config(folder);
    const RandomSource source(model, 3, 0.02, Vectors::random);
    for (const model::ParameterId id : model::parameters(model)) {
      const model::MatrixShape shape = model::shape(model, id);
      const std::vector<float> all = whole(model, source, id);
      const auto pick = [&](int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random); };
      const int64_t row = pick(shape.rows), col = pick(shape.cols);
      const int64_t rows = 1 + pick(shape.rows - row), cols = 1 + pick(shape.cols - col), ld = cols + 3;
      std::vector<float> block(static_cast<size_t>(rows * ld), -9);
      source.read(id, row, col, rows, cols, block.data(), ld);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < ld; ++c)
          ASSERT_EQ(block[static_cast<size_t>(r * ld + c)],
                    c < cols ? all[static_cast<size_t>((row + r) * shape.cols + col + c)] : -9);
    }
  }
}

TEST(RandomSource, IsNormal) {
  model::ModelConfig model = config("tests/data/hf/qwen3_moe");
  model.vocab = 20000;
  const RandomSource source(model, 11);
  const std::vector<float> x = whole(model, source, {Role::embedding});
  const std::vector<float> y = whole(model, source, {Role::head});
  const std::vector<float> z = whole(model, RandomSource(model, 12), {Role::embedding});
  const auto n = static_cast<double>(x.size());
  double mean = 0, square = 0, fourth = 0, next = 0, other = 0, seed = 0, within = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double v = x[i] / 0.02;
    mean += v / n;
    square += v * v / n;
    fourth += v * v * v * v / n;
    within += (std::abs(v) < 1) / n;
    if (i > 0) next += v * x[i - 1] / 0.02 / n;
    other += v * y[i] / 0.02 / n;
    seed += v * z[i] / 0.02 / n;
  }
  const double sigma = 1 / std::sqrt(n);  // of the mean, and of the products' means
  EXPECT_NEAR(mean, 0, 4 * sigma);
  EXPECT_NEAR(square, 1, 4 * std::sqrt(2.0) * sigma);
  EXPECT_NEAR(fourth, 3, 4 * std::sqrt(96.0) * sigma);
  EXPECT_NEAR(within, 0.682689, 4 * 0.47 * sigma);
  EXPECT_NEAR(next, 0, 4 * sigma);
  EXPECT_NEAR(other, 0, 4 * sigma);
  EXPECT_NEAR(seed, 0, 4 * sigma);
}

TEST(RandomSource, ANewModelHasNeutralVectors) {
  for (const std::string& folder : models()) {
    const model::ModelConfig model = config(folder);
    const RandomSource source(model, 5);
    for (const model::ParameterId id : model::parameters(model)) {
      const std::string name = model::name(id.role);
      const bool norm = name.find("norm") != std::string::npos;
      const bool zero = name == "sinks" || name.find("bias") != std::string::npos;
      for (const float value : whole(model, source, id)) {
        if (norm || zero)
          ASSERT_EQ(value, norm ? 1 : 0) << name;
        else
          ASSERT_TRUE(value != 0 && std::abs(value) < 0.02 * 7) << name << value;
      }
    }
  }
}

TEST(RandomSource, ABlockBeyondTheParameterIsADefect) {
  const RandomSource source(config("tests/data/hf/olmoe"), 5);
  std::vector<float> out(64);
  EXPECT_THROW(source.read({Role::final_norm}, 0, 30, 1, 3, out.data(), 3), InternalError);
  EXPECT_THROW(source.read({Role::final_norm}, -1, 0, 1, 1, out.data(), 1), InternalError);
}

}  // namespace
}  // namespace mop::weights::testing
