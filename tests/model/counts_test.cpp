// Properties of the closed forms that hold for every model.
#include "sim/model/counts.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/model/support.h"

namespace mop::model {
namespace {

TEST(MeanKeys, EqualsBruteForce) {
  for (int64_t context = 1; context <= 70; ++context) {
    for (int64_t window = 0; window <= 80; ++window) {
      int64_t keys = 0;  // query q sees itself and those before it, at most `window` in all
      for (int64_t q = 0; q < context; ++q)
        for (int64_t k = 0; k <= q; ++k) keys += window == 0 || q - k < window;
      const double mean = static_cast<double>(keys) / static_cast<double>(context);
      ASSERT_DOUBLE_EQ(mean_keys(context, window), mean) << context << " " << window;
    }
  }
}

TEST(MeanKeys, RefusesNonsense) {
  EXPECT_THROW(mean_keys(0, 0), InternalError);
  EXPECT_THROW(mean_keys(-1, 0), InternalError);
  EXPECT_THROW(mean_keys(8, -1), InternalError);
}

TEST(Counts, ComponentsAddUp) {
  for (const std::string& name : shipped_models()) {
    SCOPED_TRACE(name);
    const ModelConfig c = read_config(name);
    const Parameters p = count_parameters(c);
    ASSERT_EQ(p.layers.size(), static_cast<size_t>(c.layers));
    int64_t total = p.embedding + p.head + p.final_norm, inactive = 0;
    for (size_t layer = 0; layer < p.layers.size(); ++layer) {
      const LayerParameters& l = p.layers[layer];
      EXPECT_EQ(l.total(), l.attention + l.norms + l.router + l.shared + l.dense_mlp + l.experts);
      EXPECT_EQ(l.experts, c.moe[layer] ? c.experts * l.expert : 0);
      EXPECT_EQ(l.expert > 0, c.moe[layer]);
      EXPECT_EQ(l.router > 0, c.moe[layer]);
      EXPECT_EQ(l.dense_mlp > 0, !c.moe[layer]);
      total += l.total();
      inactive += (c.experts - c.top_k) * l.expert;
    }
    EXPECT_EQ(p.total, total);
    EXPECT_EQ(p.active, total - inactive);
    EXPECT_EQ(p.active - p.active_without_embedding, p.embedding);
    const Flops f = flops_per_token(c, 4096);
    EXPECT_DOUBLE_EQ(f.total(),
                     f.attention + f.projections + f.router + f.experts + f.shared + f.dense_mlp + f.head);
  }
}

// Six FLOPs a weight: all that is not attention comes from the active weights that multiply, and those are
// all of them but norms and biases, which are under 3 % of even the tiny models.
TEST(Counts, FlopsFollowActiveWeights) {
  for (const std::string& name : shipped_models()) {
    SCOPED_TRACE(name);
    const ModelConfig c = read_config(name);
    const Flops f = flops_per_token(c, 1024);
    const double weights = 6 * static_cast<double>(count_parameters(c).active_without_embedding);
    EXPECT_LE(f.total() - f.attention, weights);
    EXPECT_GE(f.total() - f.attention, 0.97 * weights);
  }
}

TEST(Counts, FlopsRiseWithContextAndOnlyInAttention) {
  for (const std::string& name : shipped_models()) {
    SCOPED_TRACE(name);
    const ModelConfig c = read_config(name);
    const Flops first = flops_per_token(c, 1);
    double previous = 0;
    for (int64_t context = 1; context <= int64_t{1} << 24; context = context * 3 / 2 + 1) {
      const Flops f = flops_per_token(c, context);
      EXPECT_GT(f.attention, previous) << context;
      EXPECT_NEAR(f.total() - f.attention, first.total() - first.attention, 1e-9 * f.total());
      previous = f.attention;
    }
  }
}

TEST(Counts, WindowCapsAttention) {
  ModelConfig c = read_config("mixtral-8x7b");
  const double full = flops_per_token(c, 65536).attention;
  std::fill(c.window.begin(), c.window.end(), 4096);
  const double windowed = flops_per_token(c, 65536).attention;
  EXPECT_NEAR(windowed / full, mean_keys(65536, 4096) / mean_keys(65536, 0), 1e-12);
  EXPECT_DOUBLE_EQ(flops_per_token(c, 4096).attention, 6.0 * 32 * 256 * 32 * mean_keys(4096, 0));
}

TEST(Counts, TiedHeadIsCountedOnceAndStaysActive) {
  ModelConfig c = read_config("tiny-qwen3-moe");
  const Parameters untied = count_parameters(c);
  c.tied_head = true;
  const Parameters tied = count_parameters(c);
  EXPECT_EQ(tied.head, 0);
  EXPECT_EQ(untied.total - tied.total, tied.embedding);
  EXPECT_EQ(tied.active_without_embedding, untied.active_without_embedding);
  EXPECT_DOUBLE_EQ(flops_per_token(c, 64).head, 6.0 * 256 * 64);
}

TEST(Counts, LayerOutOfRangeIsABug) {
  const ModelConfig c = read_config("tiny-qwen3-moe");
  EXPECT_THROW(count_layer(c, -1), InternalError);
  EXPECT_THROW(count_layer(c, c.layers), InternalError);
}

}  // namespace
}  // namespace mop::model
