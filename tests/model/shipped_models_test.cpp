// The shipped configs against published figures and against transformers.
#include <gtest/gtest.h>

#include <cmath>

#include "sim/model/counts.h"
#include "tests/model/support.h"

namespace mop::model {
namespace {

struct Published {
  const char* name;
  // Sum over parameters() plus the routers' e_score_correction_bias buffers of
  // AutoModelForCausalLM.from_config on the meta device with these very files, multi-token prediction off:
  // transformers 5.23.0, torch 2.15.0. kimi_k2 is built as deepseek_v3, which is what its own modelling code
  // is. Active counts are the same sum with the tensors under .experts. taken top_k / E times.
  int64_t total, active, active_without_embedding;
};

constexpr Published kPublished[] = {
    {"deepseek-v2-lite", 15706484224, 2661150208, 2451435008},
    {"deepseek-v3", 671026419200, 37552297472, 36625618432},
    {"glm-4.5-air", 106852251264, 13424129664, 12803372672},
    {"gpt-oss-120b", 116829156672, 5711982912, 5132849472},
    {"gpt-oss-20b", 20914757184, 4187440704, 3608307264},
    {"kimi-k2", 1026408232448, 32861500928, 31687095808},
    {"mixtral-8x7b", 46702792704, 12879925248, 12748853248},
    {"olmoe-1b-7b", 6919161856, 1282017280, 1178994688},
    {"qwen3-235b-a22b", 235093634560, 22190763520, 21568433664},
    {"qwen3-30b-a3b", 30532122624, 3353032704, 3041867776},
    {"tiny-deepseek-v3", 276760, 166168, 149784},
    {"tiny-glm4-moe", 275032, 164440, 148056},
    {"tiny-gpt-oss", 286064, 135536, 119152},
    {"tiny-mixtral", 477760, 182848, 166464},
    {"tiny-olmoe", 298048, 150592, 134208},
    {"tiny-qwen3-moe", 281280, 133824, 117440},
};

TEST(ShippedModels, EveryOneIsInTheTable) {
  std::vector<std::string> listed;
  for (const Published& each : kPublished) listed.emplace_back(each.name);
  EXPECT_EQ(shipped_models(), listed);
}

TEST(ShippedModels, ParametersEqualTransformers) {
  for (const Published& each : kPublished) {
    SCOPED_TRACE(each.name);
    const Parameters p = count_parameters(read_config(each.name));
    EXPECT_EQ(p.total, each.total);
    EXPECT_EQ(p.active, each.active);
    EXPECT_EQ(p.active_without_embedding, each.active_without_embedding);
  }
}

TEST(ShippedModels, ParametersEqualPublishedBillions) {
  struct Billions {
    const char* name;
    double total, active, active_without_embedding;  // 1e9, to the digits printed in the models' table
  };
  constexpr Billions kBillions[] = {
      {"gpt-oss-20b", 20.915, 4.187, 3.608},      {"gpt-oss-120b", 116.829, 5.712, 5.133},
      {"qwen3-30b-a3b", 30.532, 3.353, 3.042},    {"qwen3-235b-a22b", 235.094, 22.191, 21.568},
      {"mixtral-8x7b", 46.703, 12.880, 12.749},   {"olmoe-1b-7b", 6.919, 1.282, 1.179},
      {"deepseek-v3", 671.026, 37.552, 36.626},   {"kimi-k2", 1026.408, 32.862, 31.687},
      {"deepseek-v2-lite", 15.706, 2.661, 2.451}, {"glm-4.5-air", 106.852, 13.424, 12.803},
  };
  const auto billions = [](int64_t count) { return std::round(static_cast<double>(count) / 1e6) / 1e3; };
  for (const Billions& each : kBillions) {
    SCOPED_TRACE(each.name);
    const Parameters p = count_parameters(read_config(each.name));
    EXPECT_DOUBLE_EQ(billions(p.total), each.total);
    EXPECT_DOUBLE_EQ(billions(p.active), each.active);
    EXPECT_DOUBLE_EQ(billions(p.active_without_embedding), each.active_without_embedding);
  }
}

TEST(ShippedModels, FlopsMatchCheckFigures) {
  struct Check {
    const char* name;
    int64_t context;
    double gflops;  // forward + backward a token
  };
  constexpr Check kChecks[] = {
      {"qwen3-30b-a3b", 4096, 23.1}, {"qwen3-30b-a3b", 16384, 37.6}, {"qwen3-30b-a3b", 131072, 172.9},
      {"gpt-oss-120b", 4096, 32.7},  {"gpt-oss-120b", 131072, 88.9}, {"deepseek-v3", 4096, 250.5},
      {"kimi-k2", 4096, 205.5},      {"mixtral-8x7b", 4096, 79.7},
  };
  for (const Check& check : kChecks) {
    SCOPED_TRACE(check.name);
    const double gflops = flops_per_token(read_config(check.name), check.context).total() / 1e9;
    EXPECT_NEAR(gflops, check.gflops, 0.005 * check.gflops) << "at " << check.context;
  }
}

TEST(ShippedModels, GptOssOptions) {
  const ModelConfig c = read_config("gpt-oss-20b");
  EXPECT_EQ(c.name, "gpt-oss-20b");
  EXPECT_EQ(c.model_type, "gpt_oss");
  EXPECT_EQ(c.layers, 24);
  EXPECT_EQ(c.hidden, 2880);
  EXPECT_EQ(c.heads, 64);
  EXPECT_EQ(c.kv_heads, 8);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.max_positions, 131072);
  EXPECT_TRUE(c.qkv_bias && c.out_bias && c.sinks && c.expert_bias && c.router_bias);
  EXPECT_TRUE(c.softmax_after_topk);
  EXPECT_FALSE(c.normalise_topk);
  EXPECT_EQ(c.window[0], 128);
  EXPECT_EQ(c.window[1], 0);
  EXPECT_EQ(c.activation, Activation::clamped_swiglu);
  EXPECT_DOUBLE_EQ(c.swiglu_limit, 7);
  EXPECT_DOUBLE_EQ(c.swiglu_alpha, 1.702);
  EXPECT_DOUBLE_EQ(c.rope_theta, 150000);
  EXPECT_DOUBLE_EQ(c.rope.factor, 32);
  EXPECT_EQ(c.rope.original_positions, 4096);
  EXPECT_FALSE(c.rope.truncate);
  EXPECT_DOUBLE_EQ(c.norm_eps, 1e-5);
}

TEST(ShippedModels, DeepSeekOptions) {
  const ModelConfig v3 = read_config("deepseek-v3");
  EXPECT_EQ(v3.attention, Attention::mla);
  EXPECT_EQ(v3.qk_dim(), 192);
  EXPECT_EQ(v3.v_dim(), 128);
  EXPECT_EQ(v3.moe_layers(), 58);
  EXPECT_EQ(v3.dense_intermediate, 18432);
  EXPECT_EQ(v3.shared_experts, 1);
  EXPECT_EQ(v3.scoring, Scoring::sigmoid);
  EXPECT_TRUE(v3.correction_bias && v3.normalise_topk);
  EXPECT_EQ(v3.router_groups, 8);
  EXPECT_EQ(v3.router_top_groups, 4);
  EXPECT_DOUBLE_EQ(v3.routed_scale, 2.5);
  EXPECT_DOUBLE_EQ(v3.rope.factor, 40);
  EXPECT_DOUBLE_EQ(v3.rope.mscale_all_dim, 1);
  EXPECT_TRUE(v3.rope.truncate);

  const ModelConfig lite = read_config("deepseek-v2-lite");
  EXPECT_EQ(lite.q_lora_rank, 0);
  EXPECT_EQ(lite.shared_experts, 2);
  EXPECT_EQ(lite.shared_intermediate, 2816);
  EXPECT_EQ(lite.moe_layers(), 26);
  EXPECT_EQ(lite.scoring, Scoring::softmax);
  EXPECT_FALSE(lite.correction_bias || lite.normalise_topk);
  EXPECT_DOUBLE_EQ(lite.rope.mscale, 0.707);

  const ModelConfig k2 = read_config("kimi-k2");
  EXPECT_EQ(k2.experts, 384);
  EXPECT_EQ(k2.moe_layers(), 60);
  EXPECT_EQ(k2.router_groups, 1);
  EXPECT_DOUBLE_EQ(k2.routed_scale, 2.827);
  EXPECT_DOUBLE_EQ(k2.rope_theta, 50000);
  EXPECT_DOUBLE_EQ(k2.rope.factor, 32);
  EXPECT_DOUBLE_EQ(k2.rope.beta_fast, 1);
}

TEST(ShippedModels, OtherFamiliesOptions) {
  const ModelConfig qwen = read_config("qwen3-235b-a22b");
  EXPECT_EQ(qwen.qk_norm, QkNorm::per_head);
  EXPECT_EQ(qwen.head_dim, 128);  // not hidden / heads
  EXPECT_TRUE(qwen.normalise_topk);
  EXPECT_EQ(qwen.shared_experts, 0);
  EXPECT_EQ(qwen.window, std::vector<int64_t>(94, 0));

  const ModelConfig mixtral = read_config("mixtral-8x7b");
  EXPECT_EQ(mixtral.head_dim, 128);  // absent: hidden / heads
  EXPECT_TRUE(mixtral.normalise_topk);
  EXPECT_EQ(mixtral.qk_norm, QkNorm::none);
  EXPECT_DOUBLE_EQ(mixtral.aux_loss_coefficient, 0.02);

  const ModelConfig olmoe = read_config("olmoe-1b-7b");
  EXPECT_EQ(olmoe.qk_norm, QkNorm::full);
  EXPECT_FALSE(olmoe.normalise_topk);

  const ModelConfig glm = read_config("glm-4.5-air");
  EXPECT_DOUBLE_EQ(glm.rotary_fraction, 0.5);
  EXPECT_TRUE(glm.qkv_bias);
  EXPECT_FALSE(glm.out_bias);
  EXPECT_EQ(glm.moe_layers(), 45);
  EXPECT_TRUE(glm.correction_bias);
}

}  // namespace
}  // namespace mop::model
