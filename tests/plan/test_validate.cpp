// Plans that cannot run a model say which setting stands in the way and what to write instead: the values
// that an error names are tried.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <sstream>

#include "sim/base/error.h"
#include "sim/plan/plan.h"

namespace mop::plan {
namespace {

model::ModelConfig small_model() {
  model::ModelConfig c;
  c.name = "small";
  c.layers = 4;
  c.hidden = 64;
  c.vocab = 256;
  c.heads = 12;
  c.kv_heads = 4;
  c.head_dim = 16;
  c.window.assign(4, 0);
  c.moe.assign(4, true);
  c.experts = 24;
  c.top_k = 2;
  c.expert_intermediate = 32;
  return c;
}

std::optional<std::string> error_of(const Plan& plan, const model::ModelConfig& model, int64_t gpus,
                                    int64_t context) {
  try {
    validate(plan, model, gpus, context);
    return {};
  } catch (const UserError& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
}

// The list after "values that do: ", and the values of 1 to `most` that are in fact accepted.
std::vector<int64_t> named(const std::string& message) {
  std::vector<int64_t> values;
  const size_t at = message.find("values that do: ");
  if (at == std::string::npos) return values;
  std::istringstream list(message.substr(at + 16));
  for (std::string value; std::getline(list, value, ',');) values.push_back(std::stoll(value));
  return values;
}

std::vector<int64_t> accepted(Plan plan, const char* name, const model::ModelConfig& model, int64_t gpus,
                              int64_t context, int64_t most) {
  std::vector<int64_t> values;
  for (int64_t v = 1; v <= most; ++v) {
    set_knob(plan, name, std::to_string(v));
    if (!error_of(plan, model, gpus, context)) values.push_back(v);
  }
  return values;
}

// Every value of a degree, on its own: it is accepted when it divides what it must, and the error of each
// other one names exactly the accepted ones.
void expect_values_named(const std::string& base, const char* name, const model::ModelConfig& model,
                         int64_t gpus, int64_t context) {
  const std::vector<int64_t> good = accepted(parse_plan(base), name, model, gpus, context, gpus);
  EXPECT_FALSE(good.empty());
  for (int64_t v = 1; v <= gpus; ++v) {
    Plan plan = parse_plan(base);
    set_knob(plan, name, std::to_string(v));
    const auto message = error_of(plan, model, gpus, context);
    if (!message) continue;
    EXPECT_EQ(message->find(std::string("plan setting ") + name + " is " + std::to_string(v)), 0u)
        << *message;
    EXPECT_EQ(named(*message), good) << *message << " (context " << context << ")";
  }
}

TEST(Validate, ErrorsNameTheValuesThatDivide) {
  const model::ModelConfig model = small_model();
  for (const int64_t gpus : {1, 2, 4, 8, 12, 16, 24, 48}) {
    for (const char* degree : {"ep", "dense-shard", "vp"})
      expect_values_named("mop", degree, model, gpus, 4096);
    for (const char* degree : {"ep", "replicate"}) expect_values_named("fsdp2", degree, model, gpus, 4096);
  }
}

TEST(Validate, HeadChunksDivideTheHeadsOfARank) {
  const model::ModelConfig model = small_model();
  for (const int64_t ulysses : {1, 2, 4, 12})
    expect_values_named("mop:ulysses=" + std::to_string(ulysses), "head-chunks", model, 24, 3 * 4096);
}

TEST(Validate, HeadChunksAreOfWholeGroupsOfHeads) {
  model::ModelConfig model = small_model();  // 12 heads, 4 KV heads: groups of 3
  EXPECT_EQ(accepted(parse_plan("mop:ulysses=1"), "head-chunks", model, 24, 4096, 12),
            (std::vector<int64_t>{1, 2, 4, 12}));  // 3 and 6 would cut groups unevenly
  EXPECT_EQ(accepted(parse_plan("mop:ulysses=4"), "head-chunks", model, 24, 4096, 12),
            (std::vector<int64_t>{1, 3}));
  EXPECT_EQ(
      error_of(parse_plan("mop:ulysses=1,head-chunks=3"), model, 24, 4096),
      "plan setting head-chunks is 3, which makes chunks that are neither whole groups of 3 query heads nor "
      "parts of one; values that do: 1, 2, 4, 12");
  model.qk_norm = model::QkNorm::full;
  EXPECT_EQ(accepted(parse_plan("mop:ulysses=1"), "head-chunks", model, 24, 4096, 12),
            (std::vector<int64_t>{1}));
}

TEST(Validate, NativeFsdp2SharesASequenceOverHeads) {
  const model::ModelConfig model = small_model();  // 12 heads, 4 KV heads
  for (const char* plan : {"ep=4,replicate=2,offload=on", "cp=4", "tp=2,cp=2", "tp=2,cp=2,recompute=none"})
    EXPECT_FALSE(error_of(parse_plan(std::string("fsdp2:runtime=native,") + plan), model, 8, 4096)) << plan;
  EXPECT_EQ(error_of(parse_plan("fsdp2:runtime=native,cp=8"), model, 8, 4096),
            "tp 1 x cp 8 is 8, and runtime native divides the 12 attention heads (4 KV heads) over as many "
            "ranks: it "
            "must divide them; lower one of the two");
  EXPECT_TRUE(error_of(parse_plan("fsdp2:runtime=native,tp=2,cp=4"), model, 8, 4096));
  EXPECT_TRUE(
      error_of(parse_plan("fsdp2:runtime=native,cp=6"), model, 24, 12 * 1024));  // neither 4 nor its multiple
  EXPECT_FALSE(error_of(parse_plan("fsdp2:cp=6"), model, 24, 12 * 1024));
}

// Nothing is split over tp: the weights are sharded over all ranks of a replica.
TEST(Validate, NativeFsdp2ShardsOverAllRanks) {
  const Layout native = layout(parse_plan("fsdp2:runtime=native,tp=2,cp=2,replicate=2"), 16),
               torch = layout(parse_plan("fsdp2:tp=2,cp=2,replicate=2"), 16);
  EXPECT_EQ(native.dense.size, 8);
  EXPECT_EQ(native.dense.stride, 1);
  EXPECT_EQ(torch.dense.size, 4);
  EXPECT_EQ(torch.dense.stride, 2);
  for (const Layout& l : {native, torch}) {
    EXPECT_EQ(l.sequence.size, 4);
    EXPECT_EQ(l.sequence_groups, 4);
  }
}

TEST(Validate, UlyssesTakesDivisorsAndMultiplesOfTheKvHeads) {
  const model::ModelConfig model = small_model();  // 12 heads, 4 KV heads
  EXPECT_EQ(accepted(parse_plan("mop"), "ulysses", model, 24, 4096, 24), (std::vector<int64_t>{1, 2, 4}));
  EXPECT_EQ(accepted(parse_plan("mop"), "ulysses", model, 24, 3 * 4096, 24),
            (std::vector<int64_t>{1, 2, 4, 12}));
  model::ModelConfig mla = model;
  mla.attention = model::Attention::mla;
  EXPECT_EQ(accepted(parse_plan("mop"), "ulysses", mla, 24, 3 * 4096, 24),
            (std::vector<int64_t>{1, 2, 3, 4, 6, 12}));
}

TEST(Validate, TensorAndContextParallelism) {
  const model::ModelConfig model = small_model();
  EXPECT_EQ(accepted(parse_plan("fsdp2"), "tp", model, 24, 4096, 24), (std::vector<int64_t>{1, 2, 4}));
  EXPECT_EQ(accepted(parse_plan("fsdp2"), "cp", model, 24, 4096, 24), (std::vector<int64_t>{1, 2, 4, 8}));
  EXPECT_EQ(accepted(parse_plan("fsdp2"), "cp", model, 8, 8, 8),
            (std::vector<int64_t>{1, 2, 4}));  // half a chunk each
  EXPECT_EQ(accepted(parse_plan("fsdp2:cp-balance=off"), "cp", model, 8, 8, 8),
            (std::vector<int64_t>{1, 2, 4, 8}));
  // Products.
  EXPECT_FALSE(error_of(parse_plan("fsdp2:tp=2,cp=4,replicate=3"), model, 24, 4096));
  const auto product = error_of(parse_plan("fsdp2:tp=4,cp=4"), model, 8, 4096);
  ASSERT_TRUE(product);
  EXPECT_EQ(*product, "tp 4 x cp 4 x replicate 1 is 16, which does not divide the 8 GPUs; lower one of them");
  const auto replica = error_of(parse_plan("fsdp2:ep=8,replicate=2"), model, 8, 4096);
  ASSERT_TRUE(replica);
  EXPECT_EQ(*replica,
            "plan setting ep is 8, which does not divide the 4 GPUs of a replica; values that do: 1, 2, 4");
}

TEST(Validate, EveryLayoutOfTheTable) {
  // The published layouts of the paper's table 3, on shapes like those models.
  model::ModelConfig model = small_model();
  model.heads = 64, model.kv_heads = 8, model.experts = 128;
  EXPECT_FALSE(error_of(parse_plan("fsdp2:ep=16,cp=16"), model, 16, 131072));
  model.attention = model::Attention::mla, model.experts = 256, model.heads = 128;
  EXPECT_FALSE(error_of(parse_plan("fsdp2:ep=8,cp=2,tp=2,offload=on"), model, 64, 65536));
  model.experts = 384, model.heads = 64;
  EXPECT_FALSE(error_of(parse_plan("fsdp2:ep=96,cp=4,tp=8,offload=on"), model, 96, 131072));
}

TEST(Validate, MessagesNameWhatDoesNotDivide) {
  const model::ModelConfig model = small_model();
  EXPECT_EQ(error_of(parse_plan("mop:ep=5"), model, 8, 4096),
            "plan setting ep is 5, which does not divide the 24 experts; values that do: 1, 2, 4, 8");
  EXPECT_EQ(error_of(parse_plan("mop:ep=12"), model, 8, 4096),
            "plan setting ep is 12, which does not divide the 8 GPUs; values that do: 1, 2, 4, 8");
  EXPECT_EQ(error_of(parse_plan("mop:ulysses=4"), model, 8, 1022),
            "plan setting ulysses is 4, which does not divide the 1022 tokens of the context; values that "
            "do: 1, 2");
  EXPECT_EQ(error_of(parse_plan("mop:optimizer=split,optimizer-hbm-layers=5"), model, 8, 4096),
            "plan setting optimizer-hbm-layers is 5, but small has 4 layers");
  EXPECT_EQ(error_of(parse_plan("mop:optimizer=host,optimizer-hbm-layers=2"), model, 8, 4096),
            "plan setting optimizer-hbm-layers is for optimizer=split and optimizer=stream");
  EXPECT_FALSE(error_of(parse_plan("mop:optimizer=stream,optimizer-hbm-layers=2"), model, 8, 4096));
}

TEST(Validate, SettingsOfSpillsAreForLeastLoadedPlanning) {
  const model::ModelConfig model = small_model();
  for (const std::string setting :
       {"capacity-factor=1.2", "spill-min-rows=7", "spill-gate=2", "spill-slots=3"}) {
    EXPECT_FALSE(error_of(parse_plan("mop:" + setting), model, 8, 4096));
    EXPECT_EQ(error_of(parse_plan("mop:least-loaded=off," + setting), model, 8, 4096),
              "plan setting " + setting.substr(0, setting.find('=')) + " is for least-loaded=on");
  }
}

TEST(Validate, OpenDegreesAreNotLookedAt) {
  const model::ModelConfig model = small_model();
  for (const int64_t gpus : {1, 7, 24}) {
    EXPECT_FALSE(error_of(parse_plan("mop"), model, gpus, 4096));
    EXPECT_FALSE(
        error_of(parse_plan("fsdp2:tp=auto,cp=auto,ep=auto,replicate=auto,offload=auto"), model, gpus, 4096));
  }
}

TEST(Validate, KeptLayersAreTheModelsAndKeepAttention) {
  const model::ModelConfig model = model::read_config("qwen3-30b-a3b");
  EXPECT_FALSE(error_of(parse_plan("mop:kept-layers=48"), model, 8, 4096));
  EXPECT_EQ(error_of(parse_plan("mop:kept-layers=49"), model, 8, 4096),
            "plan setting kept-layers is 49, but qwen3-30b-a3b has 48 layers");
  EXPECT_FALSE(error_of(parse_plan("mop:kept-layers=0,save-attention=off"), model, 8, 4096));
  EXPECT_EQ(error_of(parse_plan("mop:kept-layers=1,save-attention=off"), model, 8, 4096),
            "plan setting kept-layers is for save-attention=on");
}

}  // namespace
}  // namespace mop::plan
