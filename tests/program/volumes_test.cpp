// Communication volumes of one rank and step, component by component, against closed forms (mop.md 1, 2, 3,
// 5).
#include <gtest/gtest.h>

#include <cmath>

#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

double d(int64_t n) {
  return static_cast<double>(n);
}

bool in_layer(const Lowered& l, const Op& op) {
  return op.layer >= 0 && op.layer < l.model.layers;
}

// Bytes that a rank receives in a collective whose full buffer has `bytes`.
double received(double bytes, int64_t ranks) {
  return bytes * d(ranks - 1) / d(ranks);
}

const std::vector<const char*>& big_models() {
  static const std::vector<const char*> names{"qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3", "kimi-k2",
                                              "glm-4.5-air"};
  return names;
}

TEST(Volumes, MopDenseGathersAndReduceScatters) {
  for (const char* name : big_models())
    for (const bool wide : {false, true}) {
      SCOPED_TRACE(name);
      const Lowered l =
          lower_model(name, mop_plan(8, 16, 2, 8, wide ? "reduce=fp32" : "reduce=bf16"), 16, 8192);
      const auto dense = [&](const Op& op) {
        return in_layer(l, op) && op.component == Component::dense &&
               l.program.groups[op.group].axis == Axis::shard;
      };
      for (int64_t layer = 0; layer < l.model.layers; ++layer) {
        const double weights = d(dense_elements(l, layer));
        // The last layer brings the final norm along; the correction bias is on every rank.
        const bool corrected = l.model.correction_bias && l.model.moe[static_cast<size_t>(layer)];
        const int64_t counted = l.parameters.layers[static_cast<size_t>(layer)].dense() +
                                (layer + 1 == l.model.layers ? l.model.hidden : 0) -
                                (corrected ? l.model.experts : 0);
        EXPECT_EQ(dense_elements(l, layer), padded(counted, 16)) << layer;
        const auto here = [&](const Op& op) { return dense(op) && op.layer == layer; };
        // Forward and backward; backward finds the last two layers still gathered.
        const double gathers = layer >= l.model.layers - 2 ? 1 : 2;
        EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_gather, 0, here), gathers * 2 * weights) << layer;
        EXPECT_DOUBLE_EQ(sum_of(l, OpKind::reduce_scatter, 0, here), (wide ? 4 : 2) * weights) << layer;
      }
      for (const Op& op : l.program.ops)
        if (is_collective(op.kind) && dense(op)) {
          EXPECT_EQ(l.program.groups[op.group].size, 16);
        }
    }
}

TEST(Volumes, MopHybridShardsReduceOverReplicas) {
  const Lowered l = lower_model("qwen3-30b-a3b", mop_plan(8, 8, 2, 8), 16, 8192);
  for (int64_t layer = 0; layer < l.model.layers; ++layer) {
    const double weights = d(dense_elements(l, layer));
    const double reduced = sum_of(l, OpKind::all_reduce, 0, [&](const Op& op) {
      return op.layer == layer && l.program.groups[op.group].axis == Axis::replicate;
    });
    EXPECT_DOUBLE_EQ(reduced, 2 * weights / 8);  // bf16 shard of a replica
  }
}

TEST(Volumes, MopExpertWeights) {
  for (const char* name : big_models()) {
    SCOPED_TRACE(name);
    const int64_t ep = 4, gpus = 16;
    const Lowered l = lower_model(name, mop_plan(ep, 16, 2, 8), gpus, 8192);
    for (int64_t layer = 0; layer < l.model.layers; ++layer) {
      if (!l.model.moe[static_cast<size_t>(layer)]) continue;
      const double weights = d(expert_elements(l, layer));
      EXPECT_EQ(expert_elements(l, layer),
                padded(l.parameters.layers[static_cast<size_t>(layer)].experts / ep, gpus / ep));
      const auto here = [&](const Op& op) {
        return op.layer == layer && op.component == Component::experts && op.group != kNoGroup &&
               l.program.groups[op.group].axis == Axis::expert_shard;
      };
      const double gathers = layer >= l.model.layers - 2 ? 1 : 2;
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_gather, 0, here), gathers * 2 * weights);
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::reduce_scatter, 0, here), 2 * weights);
      for (const Op& op : l.program.ops)
        if (here(op)) {
          EXPECT_EQ(l.program.groups[op.group].size, gpus / ep);
        }
    }
  }
}

// Five one-ways of N k H 2 bytes a layer: dispatch, combine, dispatch again with the gradients (two), their
// return. Backward's dispatch brings the gate weights, its return their gradients: 4 bytes a row each.
TEST(Volumes, MopDispatchAndCombine) {
  for (const char* name : big_models())
    for (const char* more : {"", "round-rows=4096", "least-loaded=off"}) {
      SCOPED_TRACE(std::string(name) + " " + more);
      const Lowered l = lower_model(name, mop_plan(8, 16, 2, 8, more), 16, 8192);
      const double one_way = 2 * d(l.copies()) * d(l.model.hidden);
      for (int64_t layer = 0; layer < l.model.layers; ++layer) {
        const double expected =
            l.model.moe[static_cast<size_t>(layer)] ? 5 * one_way + 2 * 4 * d(l.copies()) : 0;
        const auto here = [&](const Op& op) {
          return op.layer == layer && op.component == Component::experts && op.routed != Routed::spill &&
                 (op.stream == Stream::dispatch || op.stream == Stream::combine);
        };
        EXPECT_NEAR(sum_of(l, OpKind::all_to_all, 0, here), expected, 1e-9 * expected);
        EXPECT_NEAR(sum_of(l, OpKind::all_to_all, 1, here), expected, 1e-9 * expected);
      }
    }
}

// Ulysses, each direction x (D - 1) / D on the wire: forward Q, K, V, O; backward Q, K, V again, dQ, dK, dV,
// dO, and the attention output O once more (native/attention.cpp says why).
double ulysses_bytes(const Lowered& l, bool latent) {
  const model::ModelConfig& c = l.model;
  const double n = d(l.tokens()), heads = d(c.heads), qk = d(c.qk_dim()), v = d(c.v_dim());
  const bool mla = c.attention == model::Attention::mla;
  const double kv_heads = mla ? heads : d(std::max(c.kv_heads, l.layout.sequence.size));
  const double q = 2 * n * heads * qk, kv = latent ? 0 : 2 * n * kv_heads * (qk + v), o = 2 * n * heads * v;
  const double forward = q + kv + o;
  const double back = q + kv + 2 * o;
  if (l.plan.family ==
      plan::Family::fsdp2) {  // recompute=full: forward as a whole; Q, K, V once more for backward
    const bool full = l.plan.recompute == plan::Recompute::full;
    return forward + (full ? forward + q + kv : 0) + back;
  }
  const double again = l.plan.save_attention ? 0 : forward;
  return forward + again + (q + kv) + back;
}

TEST(Volumes, MopUlysses) {
  for (const char* name : big_models())
    for (const int64_t degree : {2, 4, 8, 16})
      for (const char* more : {"", "save-attention=off", "head-chunks=2", "windows=off"}) {
        const model::ModelConfig c = model::read_config(name);
        if (c.heads % (2 * degree) != 0) continue;
        if (c.attention == model::Attention::gqa && c.kv_heads % degree != 0 && degree % c.kv_heads != 0)
          continue;
        SCOPED_TRACE(std::string(name) + " " + std::to_string(degree) + " " + more);
        const Lowered l = lower_model(name, mop_plan(8, 16, degree, 8, more), 16, 8192);
        const auto here = [&](const Op& op) {
          return in_layer(l, op) && op.component == Component::attention;
        };
        const double expected = d(c.layers) * ulysses_bytes(l, false);
        EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 0, here), expected);
        EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 1, here), expected);
        EXPECT_EQ(sum_of(l, OpKind::all_gather, 0, here), 0);
        for (const Op& op : l.program.ops)
          if (op.kind == OpKind::all_to_all && here(op)) {
            EXPECT_EQ(l.program.groups[op.group].size, degree);
            EXPECT_EQ(op.stream, Stream::sequence);
          }
      }
}

// tp x cp ranks share a sequence in the same way.
TEST(Volumes, NativeFsdp2Ulysses) {
  for (const char* name : big_models())
    for (const char* more : {"cp=8", "tp=2,cp=4", "cp=2,recompute=none", "tp=4,recompute=none,ep=8"}) {
      SCOPED_TRACE(std::string(name) + " " + more);
      const Lowered l = lower_model(name, std::string("fsdp2:runtime=native,") + more, 16, 8192);
      const auto here = [&](const Op& op) { return in_layer(l, op) && op.component == Component::attention; };
      const double expected = d(l.model.layers) * ulysses_bytes(l, false);
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 0, here), expected);
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 1, here), expected);
    }
}

TEST(Volumes, MopLatentExchange) {
  for (const char* name : {"deepseek-v3", "kimi-k2", "deepseek-v2-lite"})
    for (const char* more : {"mla-exchange=latent", "mla-exchange=latent,head-chunks=2"}) {
      SCOPED_TRACE(std::string(name) + " " + more);
      const Lowered l = lower_model(name, mop_plan(8, 16, 4, 8, more), 16, 8192);
      const model::ModelConfig& c = l.model;
      const auto here = [&](const Op& op) { return in_layer(l, op) && op.component == Component::attention; };
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 0, here), d(c.layers) * ulysses_bytes(l, true));
      // The latents of the whole sequence, gathered in forward and in backward; their gradients scattered
      // once.
      const double latents = 2 * d(l.work.context) * d(c.kv_lora_rank + c.qk_rope_dim);
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_gather, 0, here), d(c.layers) * 2 * latents);
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::reduce_scatter, 0, here), d(c.layers) * latents);
    }
}

TEST(Volumes, NoUlyssesNoExchange) {
  const Lowered l = lower_model("qwen3-30b-a3b", mop_plan(8, 16, 1, 8), 16, 8192);
  for (const Op& op : l.program.ops)
    if (op.component == Component::attention) {
      EXPECT_FALSE(is_collective(op.kind));
    }
}

TEST(Volumes, XGather) {
  for (const char* name : big_models()) {
    SCOPED_TRACE(name);
    const int64_t p = 8;
    const Lowered l = lower_model(name, mop_plan(8, 16, 2, p), 16, 8192);
    const double n = d(l.tokens()), h = d(l.model.hidden);
    const auto tokens = [&](const Op& op) {
      return op.component == Component::vocabulary && op.stream == Stream::gather &&
             l.program.groups[op.group].axis == Axis::vocabulary;
    };
    const double bytes = received(sum_of(l, OpKind::all_gather, 0, tokens), p) +
                         received(sum_of(l, OpKind::reduce_scatter, 0, tokens), p);
    EXPECT_DOUBLE_EQ(bytes, 4 * d(p - 1) * n * h);
    // 12 bytes a token and rank of statistics; everyone's targets once.
    const auto statistics = [&](const Op& op) {
      return op.component == Component::vocabulary && op.stream == Stream::sequence;
    };
    EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_gather, 0, statistics), 12 * n * d(p) * d(p) + 4 * n * d(p));
    double flops_of_head = 0;
    for (const Op& op : l.program.ops)
      if (op.component == Component::vocabulary) flops_of_head += flops(op.kind, l.program.shape(op));
    EXPECT_NEAR(flops_of_head / (6 * n * h * d(l.model.vocab)), 1, 1e-3);  // columns are rounded up
  }
}

TEST(Volumes, VRing) {
  for (const char* name : big_models())
    for (const bool wide : {false, true}) {
      SCOPED_TRACE(name);
      const int64_t p = 8;
      const Lowered l = lower_model(
          name, mop_plan(8, 16, 2, p, wide ? "vp-scheme=weights,reduce=fp32" : "vp-scheme=weights"), 16,
          8192);
      const double block = d((l.model.vocab + p - 1) / p) * d(l.model.hidden);
      const auto ring = [&](const Op& op) { return op.component == Component::vocabulary; };
      // Weights go round twice; gradient blocks ride along the second time and take one hop more to get home.
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::send_recv, 0, ring),
                       2 * block * 2 * d(p - 1) + (wide ? 4 : 2) * block * d(p));
      if (wide) {  // with fp32 gradients: 8HV(P-1)/P and that hop
        EXPECT_NEAR(sum_of(l, OpKind::send_recv, 1, ring) - 4 * block,
                    8 * d(l.model.hidden) * d(l.model.vocab) * d(p - 1) / d(p),
                    1e-3 * 8 * d(l.model.hidden) * d(l.model.vocab));
      }
      EXPECT_EQ(sum_of(l, OpKind::all_gather, 0, ring), 0);
      double flops_of_head = 0;
      for (const Op& op : l.program.ops)
        if (op.component == Component::vocabulary) flops_of_head += flops(op.kind, l.program.shape(op));
      EXPECT_NEAR(flops_of_head / (8 * d(l.tokens()) * d(l.model.hidden) * d(l.model.vocab)), 1, 1e-3);
    }
}

// The table is never gathered: every rank's ids visit every rank's columns, whose rows return; their
// gradients go the other way. Columns are rounded up.
TEST(Volumes, MopEmbedding) {
  for (const int64_t gpus : {16, 48}) {
    const Lowered l = lower_model("kimi-k2", mop_plan(8, gpus, 2, 8), gpus, 8192);
    const auto here = [&](const Op& op) { return op.component == Component::embedding; };
    const double tokens = d(l.tokens()) * d(gpus), columns = d(ceil_div(l.model.hidden, gpus));
    EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_gather, 0, here), 4 * tokens);
    EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 0, here), 2 * 2 * tokens * columns);
    EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 1, here), 2 * 2 * tokens * columns);
  }
}

// Spilled weights: slots of one expert, forward, recompute and their gradients.
TEST(Volumes, MopSpilledExperts) {
  const Lowered l = lower_model("deepseek-v3", mop_plan(8, 16, 2, 8, "spill-slots=3"), 16, 8192);
  const double expert = d(l.parameters.layers.back().expert);
  EXPECT_NEAR(2 * expert, 88.1e6, 0.1e6);
  const auto here = [&](const Op& op) {
    return op.layer == 10 && op.routed == Routed::spill && op.stream == Stream::spill;
  };
  EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 0, here), 3 * 3 * 2 * expert);
}

TEST(Volumes, Fsdp2GathersTwiceAndReducesOnce) {
  for (const char* plan :
       {"fsdp2", "fsdp2:reduce=fp32", "fsdp2:ep=8", "fsdp2:reshard=off", "fsdp2:replicate=2"}) {
    SCOPED_TRACE(plan);
    const Lowered l = lower_model("qwen3-30b-a3b", plan, 16, 4096);
    const double parameters = d(l.parameters.total);
    double experts = 0;
    for (const auto& layer : l.parameters.layers) experts += d(layer.experts);
    const double held = parameters - experts + experts / d(l.plan.expert);
    const auto all = [](const Op& op) { return op.component == Component::weights; };
    const double gathers = l.plan.reshard ? 2 : 1, unit = l.plan.reduce == plan::Reduce::fp32 ? 4 : 2;
    EXPECT_NEAR(sum_of(l, OpKind::all_gather, 0, all) / (gathers * 2 * held), 1, 1e-9);
    EXPECT_NEAR(sum_of(l, OpKind::reduce_scatter, 0, all) / (unit * held), 1, 1e-9);
    const double reduced = sum_of(l, OpKind::all_reduce, 0, all);
    EXPECT_NEAR(reduced, l.plan.replicate > 1 ? unit * held / 8 : 0, 1e-3 * held);
  }
}

// The same sharding by our executor: flat groups, gathered in the compute type, twice but for the last two
// layers, whose weights backward finds still there. The root group (both ends) is gathered once.
TEST(Volumes, NativeFsdp2GathersTwiceAndReducesOnce) {
  for (const char* plan : {"", ",reduce=fp32", ",ep=8", ",reshard=off", ",replicate=2", ",offload=on"}) {
    SCOPED_TRACE(plan);
    const Lowered l = lower_model("qwen3-30b-a3b", std::string("fsdp2:runtime=native") + plan, 16, 4096);
    double gathered = 0, reduced = 0, shards = 0;
    const double unit = l.plan.reduce == plan::Reduce::fp32 ? 4 : 2;
    const auto add = [&](int64_t elements, int64_t ranks, int64_t gathers) {
      const double held = d(padded(elements, ranks));
      shards += held / d(ranks);
      if (ranks == 1) return;
      gathered += d(gathers) * 2 * held;
      reduced += unit * held;
    };
    const ParameterLayout layout = l.parameter_layout();
    for (int32_t layer = 0; layer < l.model.layers; ++layer) {
      const int64_t gathers = l.plan.reshard && layer < l.model.layers - 2 ? 2 : 1;
      add(layout.elements({FlatPart::dense, layer}), l.layout.dense.size, gathers);
      add(layout.elements({FlatPart::experts, layer}) / l.plan.expert, l.layout.expert_shard.size, gathers);
    }
    add(layout.elements({FlatPart::root, static_cast<int32_t>(l.model.layers)}), l.layout.dense.size, 1);
    const auto weights = [&](const Op& op) {
      return op.stream == Stream::gather && op.component != Component::optimizer &&
             l.program.groups[op.group].axis != Axis::world;
    };
    EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_gather, 0, weights), gathered);
    EXPECT_DOUBLE_EQ(sum_of(l, OpKind::reduce_scatter, 0, weights), reduced);
    EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_reduce, 0, weights), l.plan.replicate > 1 ? 4 * shards : 0);
  }
}

TEST(Volumes, NativeFsdp2Dispatch) {
  const Lowered l = lower_model("qwen3-30b-a3b", "fsdp2:ep=8,runtime=native", 16, 4096);
  const double one_way = 2 * d(l.copies()) * d(l.model.hidden);
  const auto here = [](const Op& op) { return op.component == Component::experts; };
  EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 0, here),
                   d(l.model.layers) * (5 * one_way + 8 * d(l.copies())));
}

TEST(Volumes, Fsdp2Dispatch) {
  const Lowered l = lower_model("qwen3-30b-a3b", "fsdp2:ep=8", 16, 4096);
  const double one_way = 2 * d(l.copies()) * d(l.model.hidden);
  const auto here = [](const Op& op) { return op.component == Component::experts; };
  // Forward, recompute and backward: dispatch and combine each.
  EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_to_all, 0, here), d(l.model.layers) * 6 * one_way);
}

TEST(Volumes, Fsdp2Ring) {
  const int64_t cp = 4;
  const Lowered l = lower_model("qwen3-30b-a3b", "fsdp2:cp=4", 8, 16384);
  const double kv = 2 * d(l.work.context / cp) * d(2 * l.model.kv_heads * l.model.head_dim);
  const auto here = [](const Op& op) { return op.component == Component::attention; };
  // Keys and values go round in forward and recompute, with their gradients in backward.
  EXPECT_DOUBLE_EQ(sum_of(l, OpKind::send_recv, 0, here), d(l.model.layers) * d(cp - 1) * (2 * kv + 2 * kv));
}

TEST(Volumes, Fsdp2TensorParallel) {
  const Lowered l = lower_model("mixtral-8x7b", "fsdp2:tp=4", 8, 4096);
  const double full = 2 * d(l.work.context) * d(l.model.hidden);
  const auto here = [&](const Op& op) {
    return in_layer(l, op) && op.group != kNoGroup && l.program.groups[op.group].axis == Axis::tensor;
  };
  // Attention and feed-forward each gather before and reduce-scatter after, in forward, recompute and
  // backward.
  EXPECT_DOUBLE_EQ(sum_of(l, OpKind::all_gather, 0, here), d(l.model.layers) * 6 * full);
  EXPECT_DOUBLE_EQ(sum_of(l, OpKind::reduce_scatter, 0, here), d(l.model.layers) * 6 * full);
}

TEST(Volumes, Accumulation) {
  for (const std::string& plan : {std::string("fsdp2"), mop_plan(4, 8, 2, 8)}) {
    const Lowered once = lower_model("olmoe-1b-7b", plan, 8, 4096),
                  thrice = lower_model("olmoe-1b-7b", plan, 8, 4096, 1, 3);
    const auto weights = [](const Op& op) { return op.phase != Phase::optimizer; };
    for (const OpKind kind : {OpKind::all_gather, OpKind::all_to_all, OpKind::reduce_scatter})
      EXPECT_DOUBLE_EQ(sum_of(thrice, kind, 0, weights), 3 * sum_of(once, kind, 0, weights))
          << plan << " " << name(kind);
    const auto updates = [](const Op& op) { return op.component == Component::optimizer; };
    EXPECT_DOUBLE_EQ(sum_of(thrice, OpKind::adam, 0, updates), sum_of(once, OpKind::adam, 0, updates));
  }
}

// Each parameter is updated once a step, wherever its states are.
TEST(Volumes, EachShardIsUpdatedOnce) {
  for (const Case& c : tiny_cases()) {
    SCOPED_TRACE(c.text());
    const Lowered l = c.lower();
    const auto all = [](const Op& op) { return op.component == Component::optimizer; };
    const double updated = sum_of(l, OpKind::adam, 0, all) + sum_of(l, OpKind::adam_host, 0, all);
    if (l.plan.native()) {
      double shard = 0;  // the padded shards of all groups
      for (const Shard& s : l.program.shards)
        if (s.gradient != kNoBuffer) shard += d(l.program.buffers[s.weights].bytes / size_of(s.weights_type));
      EXPECT_DOUBLE_EQ(updated, shard);
      EXPECT_DOUBLE_EQ(sum_of(l, OpKind::adam_host, 1, all), 28 * sum_of(l, OpKind::adam_host, 0, all));
      continue;
    }
    double shard = 0;
    for (const Buffer& b : l.program.buffers)
      if (b.persistent && b.holds == Holds::weights) shard += d(b.bytes) / 4;
    EXPECT_NEAR(updated, shard, 1e-4 * shard + 64);
    // CPU Adam reads and writes 28 bytes a parameter.
    EXPECT_NEAR(sum_of(l, OpKind::adam_host, 1, all), 28 * sum_of(l, OpKind::adam_host, 0, all),
                1e-6 * shard + 28);
  }
}

}  // namespace
}  // namespace mop::program::testing
