// What every lowered program must be, whatever the model and the plan.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string_view>

#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

void expect_well_formed(const Lowered& l) {
  const StepProgram& p = l.program;
  ASSERT_FALSE(p.ops.empty());
  for (const Dependency& d : p.dependencies) {
    ASSERT_LT(d.from, p.ops.size());
    ASSERT_LT(d.to, p.ops.size());
    EXPECT_NE(p.ops[d.from].stream, p.ops[d.to].stream);
    if (d.distance == 0) {
      EXPECT_LT(d.from, d.to) << p.op_name(d.from) << " -> " << p.op_name(d.to);
    }
    EXPECT_LE(d.distance, 2);
    if (d.distance == 2) {
      EXPECT_EQ(p.ops[d.from].region, p.ops[d.to].region);
    }
  }
  // Lifetimes, and buffers written before they are read.
  std::vector<bool> written(p.buffers.size(), false);
  for (OpId id = 0; id < p.ops.size(); ++id) {
    const Op& op = p.ops[id];
    ASSERT_LT(op.shape, p.shapes.size());
    if (op.group != kNoGroup) {
      ASSERT_LT(op.group, p.groups.size());
      EXPECT_GT(p.groups[op.group].size, 1) << p.op_name(id);
    }
    if (is_collective(op.kind)) {
      EXPECT_NE(op.group, kNoGroup) << p.op_name(id);  // local operations may name one for their index in it
    }
    for (const int64_t v : p.shape(op).v) EXPECT_GE(v, 0) << p.op_name(id);
    for (const bool write : {false, true})
      for (const Use& use : p.uses_of(op)) {
        const Buffer& buffer = p.buffers[use.buffer];
        if (use.write != write) continue;
        EXPECT_LE(buffer.first, id);
        EXPECT_GE(buffer.last, id);
        if (!write) {
          EXPECT_TRUE(buffer.persistent || written[use.buffer])
              << p.op_name(id) << " reads " << p.buffer_name(use.buffer) << ", which nothing has written";
        } else {
          written[use.buffer] = true;
        }
      }
  }
  for (BufferId b = 0; b < p.buffers.size(); ++b) {
    const Buffer& buffer = p.buffers[b];
    EXPECT_GE(buffer.bytes, 0);
    EXPECT_TRUE(buffer.first != kNoOp || !buffer.persistent || buffer.bytes == 0)
        << p.buffer_name(b) << " takes memory and is never used";
  }
  // Host operations touch host memory, copies go between the two.
  for (OpId id = 0; id < p.ops.size(); ++id) {
    const Op& op = p.ops[id];
    const bool up = op.kind == OpKind::copy_h2d, down = op.kind == OpKind::copy_d2h;
    if (!up && !down) continue;
    EXPECT_EQ(op.stream, up ? Stream::h2d : Stream::d2h);
    for (const Use& use : p.uses_of(op)) {
      const Buffer& buffer = p.buffers[use.buffer];
      if (buffer.bytes == 0) continue;  // an event
      EXPECT_EQ(buffer.space, use.write == up ? Space::hbm : Space::host)
          << p.op_name(id) << " " << p.buffer_name(use.buffer);
    }
  }
}

TEST(Lowering, TinyProgramsAreWellFormed) {
  for (const Case& c : tiny_cases()) {
    SCOPED_TRACE(c.text());
    expect_well_formed(c.lower());
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(Lowering, ShippedModelsAreWellFormed) {
  for (const std::string& name : model::shipped_models())
    for (const std::string& plan : {std::string("fsdp2"), std::string("fsdp2:ep=8,offload=on"),
                                    std::string("fsdp2:ep=8,runtime=native"), mop_plan(8, 16, 2, 8),
                                    mop_plan(4, 8, 1, 16, "optimizer=host,checkpoints=host")}) {
      if (name.starts_with("tiny") || (name == "mixtral-8x7b" && plan.find("ep=16") != std::string::npos))
        continue;
      SCOPED_TRACE(name + " " + plan);
      expect_well_formed(lower_model(name, plan, 16, 8192));
      if (::testing::Test::HasFailure()) return;
    }
}

TEST(Lowering, IsDeterministic) {
  for (const Case& c : {tiny_pytorch_cases("tiny-qwen3-moe")[0], tiny_native_cases("tiny-deepseek-v3")[0]}) {
    const Lowered a = c.lower(), b = c.lower();
    ASSERT_EQ(a.program.ops.size(), b.program.ops.size());
    ASSERT_EQ(a.program.dependencies.size(), b.program.dependencies.size());
    for (size_t i = 0; i < a.program.dependencies.size(); ++i) {
      EXPECT_EQ(a.program.dependencies[i].from, b.program.dependencies[i].from);
      EXPECT_EQ(a.program.dependencies[i].to, b.program.dependencies[i].to);
    }
    EXPECT_EQ(a.program.shapes, b.program.shapes);
  }
}

// Every weight shard that is spread over ranks is read by a gather, in forward and again in backward, and
// written by an update.
TEST(Lowering, EveryWeightIsGatheredAndUpdated) {
  for (const Case& c : tiny_cases()) {
    SCOPED_TRACE(c.text());
    const Lowered l = c.lower();
    const StepProgram& p = l.program;
    std::vector<int> read(p.buffers.size(), 0), written(p.buffers.size(), 0);
    std::vector<bool> gathered(p.buffers.size(), false);
    for (const Op& op : p.ops)
      for (const Use& use : p.uses_of(op)) {
        const BufferId b = use.buffer;
        if (use.write)
          ++written[b];
        else if (op.phase != Phase::optimizer)
          ++read[b], gathered[b] = gathered[b] || op.kind == OpKind::all_gather;
      }
    for (BufferId b = 0; b < p.buffers.size(); ++b) {
      const Buffer& buffer = p.buffers[b];
      if (!buffer.persistent || buffer.holds != Holds::weights || buffer.bytes == 0) continue;
      if (std::string(buffer.label) == "correction_bias") {  // fixed, on every rank
        EXPECT_GE(read[b], 1) << p.buffer_name(b);
        EXPECT_EQ(written[b], 0) << p.buffer_name(b);
        continue;
      }
      EXPECT_GE(read[b], 1) << p.buffer_name(b) << " is never used";
      EXPECT_GE(written[b], 1) << p.buffer_name(b) << " is never updated";
      const bool layer = buffer.layer >= 0 && buffer.layer < l.model.layers;
      if (l.plan.family != plan::Family::mop || !layer) continue;
      const bool dense = std::string(buffer.label) == "dense_weights";
      const bool spread = dense ? l.layout.dense.size > 1 : l.layout.expert_shard.size > 1;
      EXPECT_EQ(gathered[b], spread) << p.buffer_name(b);
    }
    if (::testing::Test::HasFailure()) return;
  }
}

// FLOPs of what a layer's attention projects for its heads from the latents of MLA, forward, of one token.
double head_projections(const model::ModelConfig& c) {
  if (c.attention == model::Attention::gqa) return 0;
  const auto heads = static_cast<double>(c.heads);
  return 2 * heads *
         (static_cast<double>((c.q_lora_rank > 0 ? c.q_lora_rank : c.hidden) * c.qk_dim()) +
          static_cast<double>(c.kv_lora_rank * (c.qk_nope_dim + c.v_head_dim)));
}

// Model FLOPs of one rank's tokens, plus what the plan computes again.
double expected_flops(const Lowered& l) {
  model::ModelConfig c = l.model;
  if (!l.plan.windows) std::fill(c.window.begin(), c.window.end(), 0);
  const model::Flops f = model::flops_per_token(c, l.work.context);
  const double tokens = static_cast<double>(l.tokens() * l.work.accumulate);
  // Forward is a third; attention's backward is 2.5 of its forwards where model FLOPs count 2.
  const double attention = f.attention / 3;
  double whole = 0;
  if (!l.plan.native()) {
    const bool again = l.plan.recompute == plan::Recompute::full;
    const double blocks = f.projections + f.router + f.experts + f.shared + f.dense_mlp;
    whole = blocks * (again ? 4.0 / 3 : 1) + attention * (again ? 4.5 : 3.5) +
            f.head * (l.plan.loss_chunk > 0 ? 4.0 / 3 : 1);
  } else {
    const bool mop = l.plan.family == plan::Family::mop;
    const bool kept = !mop && l.plan.recompute == plan::Recompute::none,
               saved = kept || (mop && l.plan.save_attention),
               ring = mop && l.plan.vocabulary_scheme == plan::VocabularyScheme::weights &&
                      l.plan.vocabulary > 1;
    const double again = kept ? 1 : 4.0 / 3;
    // Gate and up again, down not. Rows that came from elsewhere are not kept.
    const double gated = 1 + 2.0 / 9, experts = kept && l.plan.expert == 1 ? 1 : gated;
    whole = (f.projections + f.router) * again + f.experts * experts +
            (f.shared + f.dense_mlp) * (kept ? 1 : gated) + attention * (saved ? 3.5 : 4.5) +
            f.head * (ring ? 4.0 / 3 : 1);
    if (!saved) {
      // Queries, keys and values are projected once more for the attention that is run again.
      const double projected =
          c.attention == model::Attention::mla
              ? head_projections(c)
              : 2 * static_cast<double>(c.hidden * c.head_dim * (c.heads + 2 * c.kv_heads));
      whole += projected * static_cast<double>(c.layers);
    }
    if (l.plan.kept_layers.value_or(0) > 0) {
      // All experts of a layer are alike; only the last layers may have them.
      const auto kept_layers = static_cast<double>(*l.plan.kept_layers);
      const int64_t first = c.layers - *l.plan.kept_layers;
      const auto moe = static_cast<double>(
          std::count(c.moe.begin() + static_cast<std::ptrdiff_t>(first), c.moe.end(), true));
      const double of_moe = moe / static_cast<double>(c.moe_layers());
      whole -= kept_layers * (f.projections / 3 / static_cast<double>(c.layers) - head_projections(c));
      if (l.plan.expert == 1 && l.program.round_rows == l.copies()) whole -= f.experts * of_moe * 2 / 9;
      whole -= f.shared * of_moe * 2 / 9;
      if (c.moe_layers() < c.layers)
        whole -= f.dense_mlp * 2 / 9 * (kept_layers - moe) / static_cast<double>(c.layers - c.moe_layers());
    }
  }
  return whole * tokens;
}

TEST(Lowering, FlopsAreTheModelsPlusRecompute) {
  for (const Case& c : tiny_cases()) {
    SCOPED_TRACE(c.text());
    const Lowered l = c.lower();
    const bool ring = l.plan.context > 1 && !l.plan.native();
    if (ring && !l.plan.balanced_ring) continue;                   // differs by rank, see below
    if (ring && std::string(c.model) == "tiny-gpt-oss") continue;  // the ring knows no windows
    const double ratio = total_flops(l) / expected_flops(l);
    if (l.plan.native()) {
      EXPECT_NEAR(ratio, 1, 1e-9);
    } else if (l.plan.tensor > 1 && l.model.attention == model::Attention::mla) {
      EXPECT_GT(ratio, 1);  // every tensor-parallel rank projects the latents
      EXPECT_LT(ratio, 1.1);
    } else if (l.plan.tensor > 1 || l.plan.context > 1) {
      EXPECT_NEAR(ratio, 1, 2e-2);  // half a query of the ring's diagonal; routers
    } else {
      EXPECT_NEAR(ratio, 1, 1e-9);
    }
  }
}

TEST(Lowering, FlopsOfShippedModels) {
  for (const char* name : {"qwen3-30b-a3b", "deepseek-v3", "kimi-k2", "gpt-oss-120b", "glm-4.5-air",
                           "olmoe-1b-7b", "deepseek-v2-lite"})
    for (const std::string& plan :
         {std::string("fsdp2"), std::string("fsdp2:recompute=none,loss-chunk=0"),
          std::string("fsdp2:runtime=native"), std::string("fsdp2:runtime=native,recompute=none,cp=2"),
          mop_plan(8, 8, 4, 8),
          mop_plan(8, 8, 2, 8, "vp-scheme=weights,head-chunks=2,mla-exchange=latent")}) {
      SCOPED_TRACE(std::string(name) + " " + plan);
      // The norm of OLMoE's queries spans all heads: they cannot be split.
      if (std::string(name) == "olmoe-1b-7b" && plan.find("head-chunks") != std::string::npos) continue;
      const Lowered l = lower_model(name, plan, 8, 8192);
      EXPECT_NEAR(total_flops(l) / expected_flops(l), 1, 2e-3);
    }
  for (const char* name : {"qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"})
    for (const int64_t kept : {1, 20})
      for (const int64_t experts : {1, 8}) {
        SCOPED_TRACE(std::string(name) + " " + std::to_string(kept));
        const Lowered l = lower_model(
            name, mop_plan(experts, 8, 4, 8, "round-rows=64K,kept-layers=" + std::to_string(kept)), 8, 8192);
        EXPECT_NEAR(total_flops(l) / expected_flops(l), 1, 1e-9);
      }
}

// However many rounds there are: a token is read, and its fp32 sum read and written, once.
TEST(Lowering, RoutedRowsReadATokenOnce) {
  for (const char* name : {"qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"})
    for (const char* rounds : {"round-rows=4K", "round-rows=16K", "round-rows=256K"}) {
      SCOPED_TRACE(std::string(name) + " " + rounds);
      const Lowered l = lower_model(name, mop_plan(2, 4, 1, 4, rounds), 4, 8192);
      const auto tokens = static_cast<double>(l.tokens() * l.model.hidden),
                 all_rounds = static_cast<double>(l.copies()) / static_cast<double>(l.program.round_rows);
      for (const Op& op : l.program.ops) {
        const Shape& shape = l.program.shape(op);
        const auto in_all = [&](int i) {
          return all_rounds * static_cast<double>(shape.v[static_cast<size_t>(i)]);
        };
        const double matrices =
            op.phase == Phase::backward ? 2 : 1;  // inputs; in backward their gradients, too
        if (op.kind == OpKind::permute) {
          EXPECT_NEAR(in_all(1), matrices * 2 * tokens, 1e-6 * tokens);
          EXPECT_NEAR(in_all(2), matrices * 2 * tokens * static_cast<double>(l.model.top_k), 1e-6 * tokens);
        }
        if (op.kind == OpKind::unpermute || op.kind == OpKind::unpermute_bwd) {
          EXPECT_NEAR(in_all(2), 4 * tokens, 1e-6 * tokens);
        }
      }
    }
}

// Prices of rotations go by it; backward of a norm reads what entered it, too.
TEST(Lowering, RotationsKnowTheNormBeforeThem) {
  for (const auto& [name, norm] :
       {std::pair{"olmoe-1b-7b", 2048}, {"qwen3-30b-a3b", 128}, {"gpt-oss-20b", 0}, {"deepseek-v3", 0}})
    for (const std::string& plan : {std::string("fsdp2:runtime=native"), mop_plan(1, 4, 2, 4)}) {
      SCOPED_TRACE(std::string(name) + " " + plan);
      const Lowered l = lower_model(name, plan, 4, 8192);
      int rotations = 0;
      for (const Op& op : l.program.ops) {
        if (op.kind != OpKind::rope && op.kind != OpKind::rope_bwd) continue;
        const Shape& shape = l.program.shape(op);
        EXPECT_EQ(shape.v[3], norm);
        EXPECT_EQ(shape.v[2], 2 * shape.v[0]);
        EXPECT_EQ(shape.v[1], (op.kind == OpKind::rope_bwd && norm > 0 ? 2 : 1) * shape.v[2]);
        ++rotations;
      }
      EXPECT_GT(rotations, 0);
    }
}

TEST(Lowering, UnbalancedRingDoesTheWorkOfAllRanks) {
  const Case c{"tiny-qwen3-moe", "fsdp2:cp=4,cp-balance=off", 4, 256, 1, 1};
  Lowered l = c.lower();
  double pairs = 0, most = 0, least = 1e300;
  for (int64_t rank = 0; rank < 4; ++rank) {
    std::vector<ExpertLoad> loads(static_cast<size_t>(l.model.layers));
    for (ExpertLoad& load : loads) load.computed = load.sent = l.copies(), load.experts = l.model.experts;
    const StepProgram p = lower({l.model, l.parameters, l.plan, l.layout, l.work, rank, loads});
    double own = 0;
    for (const Op& op : p.ops)
      if (op.kind == OpKind::attention_fwd && op.phase == Phase::forward && op.layer == 0)
        own += AttentionShape::of(p.shape(op)).pairs();
    pairs += own;
    most = std::max(most, own);
    least = std::min(least, own);
  }
  EXPECT_DOUBLE_EQ(pairs, 256.0 * 257 / 2);
  EXPECT_GT(most, 5 * least);
}

// Who issues operations waits for each layer's routing: the CPU's first updates come before all of them, as
// many as their rings hold, and each before its weights are used.
TEST(Lowering, TheCpusUpdatesAreIssuedAhead) {
  for (const char* states : {"optimizer=host", "optimizer=split,optimizer-hbm-layers=8"}) {
    const Lowered l = lower_model("olmoe-1b-7b", mop_plan(1, 2, 1, 2, states), 2, 4096);
    const StepProgram& p = l.program;
    std::vector<OpId> updates;
    std::map<int, OpId> fresh;  // by layer: its weights have come up
    OpId first_routing = kNoOp;
    for (OpId id = 0; id < p.ops.size(); ++id) {
      const Op& op = p.ops[id];
      if (op.kind == OpKind::adam_host) updates.push_back(id);
      if (op.kind == OpKind::copy_h2d && op.component == Component::optimizer) fresh[op.layer] = id;
      if (op.kind == OpKind::plan_routing && first_routing == kNoOp) first_routing = id;
      const bool gathers =
          op.kind == OpKind::all_gather && op.phase == Phase::forward && op.component == Component::experts;
      if (const auto up = fresh.find(op.layer); gathers && up != fresh.end()) {
        EXPECT_LT(up->second, id);
      }
    }
    ASSERT_EQ(updates.size(), fresh.size());
    ASSERT_GE(updates.size(), 8U);
    EXPECT_LT(updates[1], first_routing) << states;
    for (size_t i = 2; i < updates.size(); ++i) EXPECT_LT(updates[i - 1], updates[i]);
  }
}

// Of one step: whether `to` has to wait for `from`.
bool waits(const StepProgram& p, OpId from, OpId to) {
  return std::ranges::any_of(
      p.dependencies, [&](const Dependency& d) { return d.from == from && d.to == to && d.distance == 0; });
}

// A layer's blocks of states come up while others go down: none waits for another one's way.
TEST(Lowering, BlocksOfStreamedStatesCrossOneAnother) {
  const Lowered l = lower_model("qwen3-30b-a3b", mop_plan(1, 2, 1, 2, "optimizer=stream"), 2, 4096);
  const StepProgram& p = l.program;
  std::vector<OpId> up, down;
  for (OpId id = 0; id < p.ops.size(); ++id) {
    const Op& op = p.ops[id];
    if (op.component != Component::optimizer || op.layer != 7) continue;
    if (op.kind == OpKind::copy_h2d) up.push_back(id);
    if (op.kind == OpKind::copy_d2h) down.push_back(id);
  }
  ASSERT_EQ(up.size(), down.size());
  ASSERT_GE(up.size(), 4U);
  for (size_t i = 0; i + 1 < up.size(); ++i) {
    EXPECT_FALSE(waits(p, down[i], up[i + 1])) << i;
    if (i + 3 < up.size()) {
      EXPECT_TRUE(waits(p, down[i], up[i + 3])) << i;  // its place in the ring of three
    }
  }
}

// States that wait in HBM leave it and come again at once where they all do; else behind those that forward
// waits for.
TEST(Lowering, StagedStatesMakeWayForTheOthers) {
  for (const int staged : {20, 24}) {
    const Lowered l = lower_model(
        "gpt-oss-20b",
        mop_plan(1, 4, 1, 4, "optimizer=stream,optimizer-staged-layers=" + std::to_string(staged)), 4, 4096);
    const StepProgram& p = l.program;
    OpId last_update = kNoOp;
    std::map<int, OpId> down, up, update;  // by layer: the first
    for (OpId id = 0; id < p.ops.size(); ++id) {
      const Op& op = p.ops[id];
      if (op.kind == OpKind::adam) last_update = id, update.emplace(op.layer, id);
      if (op.component != Component::optimizer) continue;
      if (op.kind == OpKind::copy_d2h) down.emplace(op.layer, id);
      if (op.kind == OpKind::copy_h2d) up.emplace(op.layer, id);
    }
    for (int layer = 0; layer < staged; ++layer) {
      EXPECT_LT(update.at(layer), down.at(layer));
      EXPECT_LT(down.at(layer), up.at(layer));
      EXPECT_EQ(down.at(layer) > last_update, staged < 24) << layer;
    }
    for (int layer = staged; layer < 24; ++layer) EXPECT_LT(up.at(layer), update.at(layer));
    const bool ring = std::ranges::any_of(
        p.buffers, [](const Buffer& b) { return std::string_view(b.label) == "state_bucket"; });
    EXPECT_EQ(ring, staged < 24);
  }
}

// Two regions a layer and micro-batch: more than 16 bits count.
TEST(Lowering, HundredsOfMicroBatches) {
  const Lowered l = lower_model("qwen3-30b-a3b", mop_plan(8, 8, 1, 8), 8, 4096, 1, 700);
  EXPECT_GT(l.program.regions.size(), 65536U);
  uint32_t last = 0;
  for (const Op& op : l.program.ops) last = std::max<uint32_t>(last, op.region);
  EXPECT_EQ(last, l.program.regions.size() - 1);
}

}  // namespace
}  // namespace mop::program::testing
