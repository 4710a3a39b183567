#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/plan/plan.h"

namespace mop::plan {
namespace {

// One rule of a degree: what it must divide, in words, and the test.
struct Rule {
  std::string what;
  std::function<bool(int64_t)> holds;
};
Rule divides(int64_t total, const char* what) {
  return {fmt::format("does not divide the {} {}", total, what),
          [total](int64_t value) { return total % value == 0; }};
}

// Throws unless every rule holds; the message has the divisors of `whole` for which all of them would.
void require(const char* knob_name, int64_t value, int64_t whole, const std::vector<Rule>& rules) {
  if (value == 0) return;  // left to the planner
  for (const Rule& broken : rules) {
    if (broken.holds(value)) continue;
    std::vector<int64_t> good;
    for (int64_t d = 1; d <= whole; ++d)
      if (whole % d == 0 &&
          std::all_of(rules.begin(), rules.end(), [&](const Rule& rule) { return rule.holds(d); }))
        good.push_back(d);
    throw UserError(fmt::format("plan setting {} is {}, which {}; values that do: {}", knob_name, value,
                                broken.what, fmt::join(good, ", ")));
  }
}

}  // namespace

bool Plan::resolved() const {
  if (family == Family::fsdp2)
    return tensor > 0 && context > 0 && replicate > 0 && expert > 0 && recompute != Recompute::automatic &&
           offload != Switch::automatic;
  return dense_shard > 0 && sequence > 0 && expert > 0 && vocabulary > 0 &&
         optimizer != Optimizer::automatic && checkpoints != Place::automatic &&
         vocabulary_scheme != VocabularyScheme::automatic && mla_exchange != MlaExchange::automatic;
}

void validate(const Plan& plan, const model::ModelConfig& model, int64_t gpus, int64_t context) {
  const bool gqa = model.attention == model::Attention::gqa;
  if (plan.family == Family::fsdp2) {
    const auto given = [](int64_t degree) { return std::max<int64_t>(1, degree); };
    const int64_t t = given(plan.tensor), c = given(plan.context), r = given(plan.replicate);
    std::vector<Rule> tensor{divides(gpus, "GPUs"), divides(model.heads, "attention heads")};
    if (gqa) tensor.push_back(divides(model.kv_heads, "KV heads"));
    if (context % c == 0) tensor.push_back(divides(context / c, "tokens of a context-parallel rank"));
    require("tp", plan.tensor, gpus, tensor);
    const bool halves = plan.balanced_ring && plan.context > 1;
    std::vector<Rule> ring{divides(gpus, "GPUs"), divides(context, "tokens of the context")};
    if (halves)
      ring.push_back({"leaves no two equal halves of each part, which cp-balance needs",
                      [context](int64_t d) { return d == 1 || context % (2 * d) == 0; }});
    require("cp", plan.context, gpus, ring);
    require("replicate", plan.replicate, gpus, {divides(gpus, "GPUs")});
    if (gpus % (t * c * r) != 0)
      throw UserError(fmt::format(
          "tp {} x cp {} x replicate {} is {}, which does not divide the {} GPUs; lower one of them", t, c, r,
          t * c * r, gpus));
    require("ep", plan.expert, gpus,
            {divides(model.experts, "experts"), divides(gpus / r, "GPUs of a replica")});
    // Our kernels share a sequence over tp x cp ranks by Ulysses: every rank attends for its own heads.
    const int64_t shared = t * c;
    const bool keys = !gqa || model.kv_heads % shared == 0 || shared % model.kv_heads == 0;
    if (plan.runtime == Runtime::native && (model.heads % shared != 0 || !keys))
      throw UserError(
          fmt::format("tp {} x cp {} is {}, and runtime native divides the {} attention heads ({} KV heads) "
                      "over as many ranks: it must "
                      "divide them; lower one of the two",
                      t, c, shared, model.heads, model.kv_heads));
    return;
  }
  require("ep", plan.expert, gpus, {divides(model.experts, "experts"), divides(gpus, "GPUs")});
  require("dense-shard", plan.dense_shard, gpus, {divides(gpus, "GPUs")});
  require("vp", plan.vocabulary, gpus, {divides(gpus, "GPUs")});
  std::vector<Rule> ulysses{divides(gpus, "GPUs"), divides(model.heads, "attention heads"),
                            divides(context, "tokens of the context")};
  if (gqa)
    ulysses.push_back(
        {fmt::format("neither divides the {} KV heads nor is a multiple of them", model.kv_heads),
         [kv = model.kv_heads](int64_t d) { return kv % d == 0 || d % kv == 0; }});
  require("ulysses", plan.sequence, gpus, ulysses);
  if (plan.sequence > 0) {
    const int64_t heads = model.heads / plan.sequence;
    std::vector<Rule> chunks{divides(heads, "heads of a rank")};
    if (gqa) {
      // A chunk's query heads belong to whole key heads, or to a part of one.
      const int64_t keys = std::max<int64_t>(1, model.kv_heads / plan.sequence), group = heads / keys;
      chunks.push_back(
          {fmt::format("makes chunks that are neither whole groups of {} query heads nor parts of one",
                       group),
           [heads, keys, group](int64_t d) {
             const int64_t part = heads / d;
             return keys % d == 0 || part % group == 0 || group % part == 0;
           }});
    }
    if (model.qk_norm == model::QkNorm::full)
      chunks.push_back({"splits heads whose norm spans all of them", [](int64_t d) { return d == 1; }});
    require("head-chunks", plan.head_chunks, heads, chunks);
  }
  if (plan.sequence == 0)  // what no number of heads a rank has
    require("head-chunks", plan.head_chunks, model.heads, {divides(model.heads, "attention heads")});
  const auto are_the_models = [&](const char* setting, int64_t layers) {
    if (layers > model.layers)
      throw UserError(fmt::format("plan setting {} is {}, but {} has {} layers", setting, layers, model.name,
                                  model.layers));
  };
  are_the_models("kept-layers", plan.kept_layers.value_or(0));
  if (plan.kept_layers.value_or(0) > 0 && !plan.save_attention)
    throw UserError("plan setting kept-layers is for save-attention=on");
  if (plan.optimizer_staged_layers > 0 && plan.optimizer != Optimizer::stream &&
      plan.optimizer != Optimizer::automatic)
    throw UserError("plan setting optimizer-staged-layers is for optimizer=stream");
  are_the_models("optimizer-staged-layers", plan.optimizer_staged_layers);
  if (plan.optimizer_hbm_layers > 0 && plan.optimizer != Optimizer::split &&
      plan.optimizer != Optimizer::stream && plan.optimizer != Optimizer::automatic)
    throw UserError("plan setting optimizer-hbm-layers is for optimizer=split and optimizer=stream");
  are_the_models("optimizer-hbm-layers", plan.optimizer_hbm_layers);
  const Plan usual;
  for (const auto& [setting, said] :
       {std::pair{"capacity-factor", plan.capacity_factor != usual.capacity_factor},
        {"spill-min-rows", plan.spill_min_rows != usual.spill_min_rows},
        {"spill-gate", plan.spill_gate != usual.spill_gate},
        {"spill-slots", plan.spill_slots != usual.spill_slots}})
    if (said && !plan.least_loaded)
      throw UserError(fmt::format("plan setting {} is for least-loaded=on", setting));
}

Layout layout(const Plan& plan, int64_t gpus) {
  ensure(plan.resolved(), "the layout is of a resolved plan");
  Layout l;
  l.ranks = gpus;
  if (plan.family == Family::fsdp2) {
    const int64_t replica = gpus / plan.replicate;
    l.tensor = {plan.tensor, 1};
    l.context = {plan.context, plan.tensor};
    // Our kernels split no weight over tp.
    const int64_t split = plan.native() ? 1 : plan.tensor;
    l.dense = {replica / split, split};
    l.dense_replicas = {plan.replicate, replica};
    // Without expert parallelism the experts are sharded like the rest: by tp, then FSDP.
    l.expert = {plan.expert, 1};
    l.expert_shard = plan.expert == 1 ? l.dense : Span{replica / plan.expert, plan.expert};
    l.sequence = {plan.tensor * plan.context, 1};
  } else {
    const int64_t shards = gpus / plan.expert;
    l.dense = {plan.dense_shard, 1};
    l.dense_replicas = {gpus / plan.dense_shard, plan.dense_shard};
    l.sequence = {plan.sequence, 1};
    l.expert =
        plan.expert_placement == ExpertPlacement::inside ? Span{plan.expert, 1} : Span{plan.expert, shards};
    l.expert_shard =
        plan.expert_placement == ExpertPlacement::inside ? Span{shards, plan.expert} : Span{shards, 1};
    l.vocabulary = {plan.vocabulary, 1};
    l.vocabulary_replicas = {gpus / plan.vocabulary, plan.vocabulary};
  }
  l.sequence_groups = gpus / l.sequence.size;
  return l;
}

}  // namespace mop::plan
