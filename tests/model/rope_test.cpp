// Tables against those of Hugging Face transformers 5 for the shipped configs.
#include "sim/model/rope.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

namespace mop::model {
namespace {

struct Expected {
  const char* model;
  int64_t width;
  bool interleaved;
  double attention_scale;
  // Of pairs `pair`, at position 4097.
  std::array<int, 7> pair;
  std::array<double, 7> cos, sin;
};

// Class ...RotaryEmbedding of each model: cos and sin times attention_scaling; attention_scale: `scaling` of
// its attention. kimi-k2: DeepSeek-V3's class.
const Expected kExpected[] = {
    {"gpt-oss-20b",
     64,
     false,
     0.125,
     {0, 1, 8, 10, 16, 24, 31},
     {1.2587392330169678, -0.3894471526145935, 0.9019306898117065, -1.0507103204727173, -0.39719128608703613,
      1.3463835716247559, 1.3465725183486938},
     {0.47836801409721375, 1.2890273332595825, 0.9998906850814819, -0.842180609703064, 1.2866621017456055,
      0.022618155926465988, 0.0016680441331118345}},
    {"qwen3-30b-a3b",
     128,
     false,
     0.08838834764831845,
     {0, 1, 16, 21, 32, 48, 63},
     {0.9347719550132751, -0.9615418910980225, -0.729491114616394, 0.9990150928497314, -0.5772761106491089,
      0.9916190505027771, 0.9999870657920837},
     {0.3552483320236206, 0.2746583819389343, -0.6839902997016907, 0.044372085481882095, -0.8165490031242371,
      0.12919636070728302, 0.005084100179374218}},
    {"glm-4.5-air",
     64,
     false,
     0.08838834764831845,
     {0, 1, 8, 10, 16, 24, 31},
     {0.9347719550132751, -0.916171133518219, -0.729491114616394, -0.3367798924446106, -0.5772761106491089,
      0.9916190505027771, 0.999980092048645},
     {0.3552483320236206, 0.4007872939109802, -0.6839902997016907, -0.9415833950042725, -0.8165490031242371,
      0.12919636070728302, 0.00630903709679842}},
    {"deepseek-v3",
     64,
     true,
     0.1352337788608801,
     {0, 1, 8, 10, 16, 24, 31},
     {0.9347719550132751, 0.9870731234550476, 0.27426862716674805, -0.49326568841934204, -0.8564960360527039,
      0.9947591423988342, 0.9999067187309265},
     {0.3552483320236206, -0.16027063131332397, 0.9616531133651733, -0.8698787093162537, -0.5161536335945129,
      0.1022460013628006, 0.013658168725669384}},
    {"deepseek-v2-lite",
     64,
     true,
     0.1147213867929261,
     {0, 1, 8, 10, 16, 24, 31},
     {0.9347719550132751, 0.9870731234550476, 0.27426862716674805, -0.49326568841934204, -0.8564960360527039,
      0.9947591423988342, 0.9999067187309265},
     {0.3552483320236206, -0.16027063131332397, 0.9616531133651733, -0.8698787093162537, -0.5161536335945129,
      0.1022460013628006, 0.013658168725669384}},
    {"kimi-k2",
     64,
     true,
     0.13086079996295005,
     {0, 1, 8, 10, 16, 24, 31},
     {0.9347719550132751, 0.9978910088539124, -0.7873181104660034, 0.4556063711643219, 0.864212155342102,
      0.999267041683197, 0.9999935626983643},
     {0.3552483320236206, -0.06491123139858246, -0.6165469288825989, 0.8901813626289368, -0.5031276345252991,
      0.038280922919511795, 0.0035907721612602472}},
};

TEST(Rope, TablesAreThoseOfTransformers) {
  for (const Expected& expected : kExpected) {
    SCOPED_TRACE(expected.model);
    const Rope rope = make_rope(read_config(expected.model), 4098);
    ASSERT_EQ(rope.width, expected.width);
    EXPECT_EQ(rope.interleaved, expected.interleaved);
    EXPECT_NEAR(rope.attention_scale, expected.attention_scale, 1e-12);
    ASSERT_EQ(rope.cos.size(), static_cast<size_t>(4098 * expected.width / 2));
    ASSERT_EQ(rope.sin.size(), rope.cos.size());
    for (size_t i = 0; i < expected.pair.size(); ++i) {
      const auto at = static_cast<size_t>(4097 * expected.width / 2 + expected.pair[i]);
      // An angle of 4097 is exact to 2.4e-4 in fp32.
      EXPECT_NEAR(rope.cos[at], expected.cos[i], 4e-4) << "pair " << expected.pair[i];
      EXPECT_NEAR(rope.sin[at], expected.sin[i], 4e-4) << "pair " << expected.pair[i];
    }
  }
}

TEST(Rope, DefaultFrequenciesAreThePaper) {
  ModelConfig config;
  config.model_type = "qwen3_moe";
  config.head_dim = 16;
  config.rotary_fraction = 0.5;
  config.rope_theta = 500;
  const Rope rope = make_rope(config, 100);
  ASSERT_EQ(rope.width, 8);
  for (int p = 0; p < 100; ++p) {
    for (int i = 0; i < 4; ++i) {
      const double angle = p * std::pow(500.0, -2.0 * i / 8);
      EXPECT_NEAR(rope.cos[static_cast<size_t>(4 * p + i)], std::cos(angle), 1e-5);
      EXPECT_NEAR(rope.sin[static_cast<size_t>(4 * p + i)], std::sin(angle), 1e-5);
    }
  }
}

// A correction range of no width would divide by zero.
TEST(Rope, YarnBoundariesMayCoincide) {
  ModelConfig config;
  config.model_type = "gpt_oss";
  config.head_dim = 8;
  config.rope_theta = 10000;
  config.rope.factor = 4;
  config.rope.beta_fast = config.rope.beta_slow = 1;
  config.rope.original_positions = 4096;
  config.rope.truncate = false;
  const Rope rope = make_rope(config, 50);
  for (const float value : rope.cos) EXPECT_TRUE(std::isfinite(value));
  const double factor = 0.1 * std::log(4.0) + 1;
  EXPECT_NEAR(rope.cos[4 * 3], factor * std::cos(3.0), 1e-5);                 // fast: as it is
  EXPECT_NEAR(rope.sin[4 * 49 + 3], factor * std::sin(49 * 1e-3 / 4), 1e-5);  // slow: stretched
}

}  // namespace
}  // namespace mop::model
