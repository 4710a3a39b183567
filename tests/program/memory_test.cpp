// Memory by component against closed forms.
#include <gtest/gtest.h>

#include "sim/plan/rounds.h"
#include "sim/program/arena.h"
#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

double d(int64_t n) {
  return static_cast<double>(n);
}

const std::vector<const char*>& models() {
  static const std::vector<const char*> names{"qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3",
                                              "kimi-k2",       "glm-4.5-air",  "olmoe-1b-7b"};
  return names;
}

TEST(Memory, MopWeightsGradientsAndStates) {
  for (const char* name : models())
    for (const char* more :
         {"optimizer=hbm", "optimizer=host", "optimizer=stream", "optimizer=hbm,reduce=fp32"}) {
      SCOPED_TRACE(std::string(name) + " " + more);
      const int64_t gpus = 16;
      const Lowered l = lower_model(name, mop_plan(8, gpus, 2, 16, more), gpus, 8192);
      // A shard of everything on each of W ranks; a tied head is held as a shard of its own.
      const double shard =
          (d(l.parameters.total) + (l.model.tied_head ? d(l.parameters.embedding) : 0)) / d(gpus);
      const bool hbm = l.plan.optimizer == plan::Optimizer::hbm,
                 cpu = l.plan.optimizer == plan::Optimizer::host;
      const double unit = l.plan.reduce == plan::Reduce::fp32 ? 4 : 2, rounding = 1e-3;
      EXPECT_NEAR(bytes_held(l, Holds::weights, Space::hbm) / (2 * shard), 1, rounding);
      EXPECT_NEAR(bytes_held(l, Holds::gradients, cpu ? Space::host : Space::hbm) / (unit * shard), 1,
                  rounding);
      EXPECT_NEAR(
          bytes_held(l, Holds::optimizer_states, hbm ? Space::hbm : Space::host) / ((cpu ? 12 : 10) * shard),
          1, rounding);
      EXPECT_EQ(bytes_held(l, Holds::optimizer_states, hbm ? Space::host : Space::hbm), 0);
      EXPECT_EQ(bytes_held(l, Holds::weights, Space::host), 0);
    }
}

TEST(Memory, MopSplitsStatesByLayer) {
  const int64_t gpus = 16, kept = 20;
  const Lowered l = lower_model(
      "deepseek-v3", mop_plan(8, gpus, 2, 16, "optimizer=split,optimizer-hbm-layers=20"), gpus, 8192);
  double in_hbm = d(l.parameters.embedding);  // the embedding comes before the first layer
  for (int64_t layer = 0; layer < kept; ++layer)
    in_hbm += d(l.parameters.layers[static_cast<size_t>(layer)].total());
  EXPECT_NEAR(bytes_held(l, Holds::optimizer_states, Space::hbm) / (10 * in_hbm / d(gpus)), 1, 1e-3);
  EXPECT_NEAR(
      bytes_held(l, Holds::optimizer_states, Space::host) / (12 * (d(l.parameters.total) - in_hbm) / d(gpus)),
      1, 1e-3);
}

TEST(Memory, StreamedStatesStayInHbmForTheFirstLayers) {
  const int64_t gpus = 16, kept = 20;
  const Lowered l = lower_model(
      "deepseek-v3", mop_plan(8, gpus, 2, 16, "optimizer=stream,optimizer-hbm-layers=20"), gpus, 8192);
  double in_hbm = d(l.parameters.embedding);
  for (int64_t layer = 0; layer < kept; ++layer)
    in_hbm += d(l.parameters.layers[static_cast<size_t>(layer)].total());
  EXPECT_NEAR(bytes_held(l, Holds::optimizer_states, Space::hbm) / (10 * in_hbm / d(gpus)), 1, 1e-3);
  EXPECT_NEAR(
      bytes_held(l, Holds::optimizer_states, Space::host) / (10 * (d(l.parameters.total) - in_hbm) / d(gpus)),
      1, 1e-3);
}

TEST(Memory, HybridShardsHoldACopyForEachReplica) {
  const Lowered whole = lower_model("qwen3-30b-a3b", mop_plan(8, 16, 2, 16), 16, 8192);
  const Lowered hybrid = lower_model("qwen3-30b-a3b", mop_plan(8, 8, 2, 16), 16, 8192);
  double dense = d(whole.parameters.embedding);
  for (const auto& layer : whole.parameters.layers) dense += d(layer.dense());
  EXPECT_NEAR(bytes_held(hybrid, Holds::weights, Space::hbm) - bytes_held(whole, Holds::weights, Space::hbm),
              2 * (dense / 8 - dense / 16), 1e-3 * dense);
}

TEST(Memory, MopCheckpoints) {
  for (const char* name : models())
    for (const bool saved : {false, true}) {
      SCOPED_TRACE(name);
      const Lowered l = lower_model(
          name, mop_plan(8, 8, 4, 8, saved ? "save-attention=on" : "save-attention=off"), 8, 16384);
      const model::ModelConfig& c = l.model;
      double checkpoints = 0;
      for (const Buffer& b : l.program.buffers)
        if (b.holds == Holds::checkpoints && b.space == Space::hbm) checkpoints += d(b.bytes);
      const double n = d(l.tokens()), layers = d(c.layers);
      // 2NH a layer and the last output; the attention output and its log-sum-exp; 12 bytes a routed copy
      // (expert, gate weight, place) and the plan of the rounds.
      double expected = 2 * n * d(c.hidden) * (layers + 1) +
                        (12 * d(l.copies()) + d(plan::round_plan_bytes(8, static_cast<int>(c.experts), 2))) *
                            d(c.moe_layers());
      if (saved) expected += layers * n * d(c.heads) * (2 * d(c.v_dim()) + 4);
      EXPECT_DOUBLE_EQ(checkpoints, expected);
    }
}

TEST(Memory, MopCheckpointsOnTheHost) {
  const Lowered l = lower_model("kimi-k2", mop_plan(8, 16, 8, 8, "checkpoints=host"), 16, 65536);
  const model::ModelConfig& c = l.model;
  const double n = d(l.tokens()), each = 2 * n * d(c.hidden) + n * d(c.heads) * (2 * d(c.v_dim()) + 4);
  double host = 0, hbm = 0;
  for (const Buffer& b : l.program.buffers) {
    if (b.holds != Holds::checkpoints) continue;
    (b.space == Space::host ? host : hbm) += d(b.bytes);
  }
  EXPECT_DOUBLE_EQ(host, d(c.layers) * each);
  // What is left in HBM does not grow with the layers but for the gates.
  EXPECT_LT(hbm - 8 * d(l.copies()) * d(c.moe_layers()), 6 * each);
}

TEST(Memory, MopGathersTwoLayersAtMost) {
  const Lowered l = lower_model("deepseek-v3", mop_plan(4, 16, 2, 8), 16, 8192);
  const double dense = 2 * d(l.parameters.layers.back().dense());
  double largest = 0;
  for (const auto& layer : l.parameters.layers) largest = std::max(largest, 2 * d(layer.dense()));
  EXPECT_GE(largest, dense);
  EXPECT_DOUBLE_EQ(bytes_held(l, Holds::gathered_weights, Space::hbm),
                   2 * largest + 2 * 2 * d(l.parameters.layers.back().experts) / 4);
}

// Bytes of the experts do not depend on the context: rounds of a fixed capacity. But for the sum over a
// token's experts.
TEST(Memory, MopExpertBuffersAreOfARound) {
  const std::string plan = mop_plan(8, 16, 2, 8, "round-rows=8192");
  const auto expert_bytes = [](const Lowered& l) {
    double bytes = 0;
    for (const Buffer& b : l.program.buffers) {
      if ((b.holds != Holds::expert_activations && b.holds != Holds::expert_exchange) || b.layer != 30)
        continue;
      const std::string label = b.label;
      if (label == "expert_sum") {
        EXPECT_EQ(b.bytes, 4 * l.tokens() * l.model.hidden);
      } else {
        bytes += d(b.bytes);
      }
    }
    return bytes;
  };
  const Lowered l = lower_model("deepseek-v3", plan, 16, 8192);
  EXPECT_DOUBLE_EQ(expert_bytes(l), expert_bytes(lower_model("deepseek-v3", plan, 16, 131072)));
  const model::ModelConfig& c = l.model;
  const double r = 8192, h = d(c.hidden), i = d(c.expert_intermediate), e = d(c.experts);
  // Forward: two slots of 4 exchanges of R rows; one gate/up and activation. Far below N k H. Backward:
  // inputs and output gradients with the gate weights, input gradients with the gates', each sent and
  // received.
  const double forward = 2 * 4 * 2 * r * h + 2 * r * 3 * i,
               backward = 2 * 2 * r * (4 * h + 4) + 2 * 2 * r * (2 * h + 4) + 2 * r * 4 * i,
               counts = 4 * e + 4 * 8 * e;
  EXPECT_DOUBLE_EQ(expert_bytes(l), forward + backward + counts);
}

TEST(Memory, MopLogitsAreOfATile) {
  for (const char* scheme : {"tokens", "weights"}) {
    const Lowered l = lower_model(
        "kimi-k2", mop_plan(8, 16, 1, 8, std::string("vp-scheme=") + scheme + ",vp-tile=512"), 16, 65536);
    double most = 0;
    for (const Buffer& b : l.program.buffers)
      if (std::string(b.label) == "logits") most = std::max(most, d(b.bytes));
    EXPECT_NEAR(most / (2 * 512 * d(l.model.vocab)), 1, 1e-3) << scheme;
  }
}

TEST(Memory, Fsdp2States) {
  for (const char* name : models())
    for (const char* plan :
         {"fsdp2", "fsdp2:offload=on", "fsdp2:ep=8", "fsdp2:ep=4,cp=2", "fsdp2:replicate=2"}) {
      SCOPED_TRACE(std::string(name) + " " + plan);
      const int64_t gpus = 16;
      const Lowered l = lower_model(name, plan, gpus, 8192);
      const double shard = d(l.parameters.total) / d(gpus / l.plan.replicate);
      const Space home = l.plan.offloaded() ? Space::host : Space::hbm;
      EXPECT_NEAR(bytes_held(l, Holds::weights, home) / (4 * shard), 1, 1e-3);
      EXPECT_NEAR(bytes_held(l, Holds::optimizer_states, home) / (8 * shard), 1, 1e-3);
      EXPECT_EQ(bytes_held(l, Holds::weights, l.plan.offloaded() ? Space::hbm : Space::host), 0);
      double gradients = 0;
      for (const Buffer& b : l.program.buffers)
        if (std::string(b.label) == "sharded_gradients") {
          EXPECT_EQ(b.space, home);
          gradients += d(b.bytes);
        }
      EXPECT_NEAR(gradients / (4 * shard), 1, 1e-3);  // 16 bytes a parameter in all
      if (l.plan.offloaded()) {
        EXPECT_NEAR(d(plan_arenas(l.program).host.live_bytes) / (16 * shard), 1, 0.01);
      }
    }
}

TEST(Memory, Fsdp2Checkpoints) {
  for (const char* plan : {"fsdp2", "fsdp2:cp=4", "fsdp2:tp=4", "fsdp2:tp=2,cp=2,ep=8"}) {
    SCOPED_TRACE(plan);
    const Lowered l = lower_model("mixtral-8x7b", plan, 8, 8192, 2);
    double checkpoints = 0;
    for (const Buffer& b : l.program.buffers)
      if (b.holds == Holds::checkpoints) checkpoints += d(b.bytes);
    EXPECT_DOUBLE_EQ(checkpoints, 2 * d(l.tokens()) * d(l.model.hidden) * d(l.model.layers + 1));
  }
}

TEST(Memory, AdamStatesAreShardedOverAllRanks) {
  for (const int64_t gpus : {8, 16, 32, 64}) {
    const Lowered l = lower_model("qwen3-235b-a22b", mop_plan(8, gpus, 2, 8), gpus, 8192);
    double layers = d(l.parameters.embedding);
    for (const auto& layer : l.parameters.layers) layers += d(layer.total());
    const double head = d(l.parameters.head) / 8;  // over P, replicated over W / P
    EXPECT_NEAR(bytes_held(l, Holds::optimizer_states, Space::hbm) / (10 * (layers / d(gpus) + head)), 1,
                1e-3);
  }
}

}  // namespace
}  // namespace mop::program::testing
