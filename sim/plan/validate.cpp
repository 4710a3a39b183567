#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/plan/plan.h"

namespace mop::plan {
namespace {

std::string divisors(int64_t number, int64_t most) {
  std::vector<int64_t> all;
  for (int64_t d = 1; d <= std::min(number, most); ++d)
    if (number % d == 0) all.push_back(d);
  return fmt::format("{}", fmt::join(all, ", "));
}

// Degree `value` of knob `name` must divide every one of `totals`.
struct Total {
  int64_t count;
  const char* what;
};

void must_divide(const char* name, int64_t value, std::initializer_list<Total> totals) {
  if (value == 0) return;  // left to the planner
  for (const Total& total : totals) {
    if (total.count % value == 0) continue;
    int64_t common = 0;
    for (const Total& t : totals) common = std::gcd(common, t.count);
    throw UserError(fmt::format("plan setting {} is {}, which does not divide the {} {}; values that do: {}", name,
                                value, total.count, total.what, divisors(common, 4096)));
  }
}

}  // namespace

bool Plan::resolved() const {
  if (family == Family::fsdp2) return tensor > 0 && context > 0 && replicate > 0 && expert > 0 && offload != Switch::automatic;
  return dense_shard > 0 && sequence > 0 && expert > 0 && vocabulary > 0 && optimizer != Optimizer::automatic && checkpoints != Place::automatic &&
         vocabulary_scheme != VocabularyScheme::automatic && mla_exchange != MlaExchange::automatic;
}

void validate(const Plan& plan, const model::ModelConfig& model, int64_t gpus, int64_t context) {
  must_divide("ep", plan.expert, {{model.experts, "experts"}, {gpus, "GPUs"}});
  if (plan.family == Family::fsdp2) {
    must_divide("tp", plan.tensor, {{gpus, "GPUs"}, {model.heads, "attention heads"}});
    if (model.attention == model::Attention::gqa) must_divide("tp", plan.tensor, {{model.kv_heads, "KV heads"}});
    must_divide("cp", plan.context, {{gpus, "GPUs"}, {plan.balanced_ring && plan.context > 1 ? context / 2 : context,
                                                      "tokens of the context (half of it with cp-balance)"}});
    must_divide("replicate", plan.replicate, {{gpus, "GPUs"}});
    const int64_t t = std::max<int64_t>(1, plan.tensor), c = std::max<int64_t>(1, plan.context),
                  r = std::max<int64_t>(1, plan.replicate), e = std::max<int64_t>(1, plan.expert);
    if (gpus % (t * c * r) != 0)
      throw UserError(fmt::format("tp {} x cp {} x replicate {} is {}, which does not divide the {} GPUs; lower one of them",
                                  t, c, r, t * c * r, gpus));
    if ((gpus / r) % e != 0)
      throw UserError(fmt::format("plan setting ep is {}, which does not divide the {} GPUs of a replica; values that do: {}",
                                  e, gpus / r, divisors(std::gcd(gpus / r, model.experts), 4096)));
    must_divide("tp", plan.tensor, {{context / c, "tokens of a context-parallel rank"}});
    return;
  }
  must_divide("dense-shard", plan.dense_shard, {{gpus, "GPUs"}});
  must_divide("ulysses", plan.sequence, {{gpus, "GPUs"}, {model.heads, "attention heads"}, {context, "tokens of the context"}});
  must_divide("vp", plan.vocabulary, {{gpus, "GPUs"}});
  if (plan.sequence > 0) {
    must_divide("head-chunks", plan.head_chunks, {{model.heads / plan.sequence, "heads of a rank"}});
    if (model.attention == model::Attention::gqa && plan.sequence > 1 && model.kv_heads % plan.sequence != 0 &&
        plan.sequence % model.kv_heads != 0)
      throw UserError(fmt::format("plan setting ulysses is {}: it must divide the {} KV heads or be a multiple of them; values that do: {}",
                                  plan.sequence, model.kv_heads, divisors(std::gcd(gpus, model.heads), 4096)));
  }
  if (plan.optimizer_hbm_layers > model.layers)
    throw UserError(fmt::format("plan setting optimizer-hbm-layers is {}, but {} has {} layers",
                                plan.optimizer_hbm_layers, model.name, model.layers));
}

Layout layout(const Plan& plan, int64_t gpus) {
  ensure(plan.resolved(), "the layout is of a resolved plan");
  Layout l;
  l.ranks = gpus;
  if (plan.family == Family::fsdp2) {
    const int64_t replica = gpus / plan.replicate;
    l.tensor = {plan.tensor, 1};
    l.context = {plan.context, plan.tensor};
    l.dense = {replica / plan.tensor, plan.tensor};
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
    l.expert = plan.expert_placement == ExpertPlacement::inside ? Span{plan.expert, 1} : Span{plan.expert, shards};
    l.expert_shard = plan.expert_placement == ExpertPlacement::inside ? Span{shards, plan.expert} : Span{shards, 1};
    l.vocabulary = {plan.vocabulary, 1};
    l.vocabulary_replicas = {gpus / plan.vocabulary, plan.vocabulary};
  }
  l.sequence_groups = gpus / l.sequence.size;
  return l;
}

}  // namespace mop::plan
