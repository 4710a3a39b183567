// Helpers of the program tests: models lowered under a plan, with balanced loads.
#pragma once
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "sim/base/integer.h"
#include "sim/model/config.h"
#include "sim/model/counts.h"
#include "sim/plan/plan.h"
#include "sim/program/lower.h"
#include "sim/program/parameters.h"
#include "tests/plan_text.h"

namespace mop::program::testing {

// A model under a plan, lowered; owns all that the program was made from.
struct Lowered {
  model::ModelConfig model;
  model::Parameters parameters;
  plan::Plan plan;
  plan::Layout layout;
  plan::Workload work;
  int64_t gpus = 1;
  StepProgram program;

  int64_t tokens() const { return tokens_per_rank(layout, work); }
  int64_t copies() const { return tokens() * model.top_k; }  // routed rows of a rank's tokens
  ParameterLayout parameter_layout() const { return {model, plan, layout}; }
};

// Elements of a vector that `ranks` shards hold together: each is padded to whole vectors of 8 elements.
inline int64_t padded(int64_t elements, int64_t ranks) {
  return ceil_div(ceil_div(elements, ranks), 8) * 8 * ranks;
}

// Elements of a layer's dense weights and of a rank's experts as they are gathered and reduced: padded.
inline int64_t dense_elements(const Lowered& l, int64_t layer) {
  return padded(l.parameter_layout().elements({FlatPart::dense, static_cast<int32_t>(layer)}),
                l.layout.dense.size);
}
inline int64_t expert_elements(const Lowered& l, int64_t layer) {
  return padded(
      l.parameter_layout().elements({FlatPart::experts, static_cast<int32_t>(layer)}) / l.layout.expert.size,
      l.layout.expert_shard.size);
}

inline Lowered lower_model(const std::string& name, const std::string& plan_text, int64_t gpus,
                           const plan::Workload& work) {
  Lowered l;
  l.model = model::read_config(name);
  l.parameters = model::count_parameters(l.model);
  l.plan = plan::parse_plan(plan_text);
  l.gpus = gpus;
  l.work = work;
  plan::validate(l.plan, l.model, gpus, work.context);
  l.layout = plan::layout(l.plan, gpus);
  ExpertLoad load;
  load.computed = load.sent = l.copies();
  load.experts = l.model.experts / l.layout.expert.size;
  if (l.plan.family == plan::Family::mop)
    load.rounds = (load.sent + l.plan.round_capacity() - 1) / l.plan.round_capacity();
  const std::vector<ExpertLoad> loads(static_cast<size_t>(l.model.layers), load);
  l.program = lower({l.model, l.parameters, l.plan, l.layout, l.work, 0, loads});
  return l;
}

inline Lowered lower_model(const std::string& name, const std::string& plan_text, int64_t gpus,
                           int64_t context, int64_t sequences = 1, int64_t accumulate = 1) {
  plan::Workload work;
  work.context = context;
  work.sequences = sequences;
  work.accumulate = accumulate;
  return lower_model(name, plan_text, gpus, work);
}

// How often an operation runs in a step, in whole rounds' worth: a routed one works on all rows of its layer,
// which is this many times its capacity.
inline double times(const Lowered& l, const Op& op) {
  if (op.routed == Routed::no || op.region == 0) return 1;
  return static_cast<double>(l.copies()) / static_cast<double>(l.program.round_rows);
}

inline double total_flops(const Lowered& l) {
  double sum = 0;
  for (const Op& op : l.program.ops) sum += times(l, op) * flops(op.kind, l.program.shape(op));
  return sum;
}

// Sum of a shape's parameter over the operations of one kind and component, of one rank and step.
template <typename Keep>
double sum_of(const Lowered& l, OpKind kind, int parameter, Keep keep) {
  double sum = 0;
  for (const Op& op : l.program.ops)
    if (op.kind == kind && keep(op))
      sum += times(l, op) * static_cast<double>(l.program.shape(op).v[static_cast<size_t>(parameter)]);
  return sum;
}

inline double bytes_held(const Lowered& l, Holds holds, Space space) {
  double sum = 0;
  for (const Buffer& b : l.program.buffers)
    if (b.persistent && b.holds == holds && b.space == space) sum += static_cast<double>(b.bytes);
  return sum;
}

// Plans of both families that touch every part of the lowerings, for the tiny models on 4 and 8 GPUs.
struct Case {
  const char* model;
  std::string plan;
  int64_t gpus, context, sequences, accumulate;
  plan::Precision precision = plan::Precision::bf16;
  bool balance_loss = false;
  std::string text() const {
    return std::string(model) + " " + plan + " on " + std::to_string(gpus) + ", " + std::to_string(context) +
           " x " + std::to_string(sequences) + " x " + std::to_string(accumulate) +
           (precision == plan::Precision::fp32 ? ", fp32" : "") + (balance_loss ? ", balance loss" : "");
  }
  Lowered lower() const {
    plan::Workload work;
    work.context = context;
    work.sequences = sequences;
    work.accumulate = accumulate;
    work.precision = precision;
    work.balance_loss = balance_loss;
    return lower_model(model, plan, gpus, work);
  }
};

// fsdp2 as PyTorch runs it.
inline std::vector<Case> tiny_pytorch_cases(const char* model) {
  std::vector<Case> cases;
  for (const char* plan :
       {"fsdp2", "fsdp2:offload=on", "fsdp2:reshard=off,prefetch=off", "fsdp2:recompute=none",
        "fsdp2:ep=4,cp=2", "fsdp2:tp=2,ep=2", "fsdp2:replicate=2,reduce=fp32,loss-chunk=0",
        "fsdp2:cp=4,cp-balance=off,runtime=compiled,clip=off"})
    cases.push_back({model, plan, 4, 256, 2, 1});
  cases.push_back({model, "fsdp2", 4, 128, 1, 3});
  return cases;
}

// What our executor runs.
inline std::vector<Case> tiny_native_cases(const char* model) {
  constexpr auto fp32 = plan::Precision::fp32, bf16 = plan::Precision::bf16;
  const std::string name = model;
  // The norm of OLMoE's queries spans all heads: they cannot be split.
  const std::string chunks = name == "tiny-olmoe" ? "head-chunks=1" : "head-chunks=2";
  std::vector<Case> cases;
  for (const std::string& plan :
       {mop_plan(4, 8, 2, 4), mop_plan(8, 8, 1, 8, "vp-scheme=weights"), mop_plan(1, 4, 1, 1),
        mop_plan(2, 8, 2, 2, "checkpoints=host,optimizer=host"),
        mop_plan(4, 4, 2, 2, "optimizer=stream,reduce=fp32"),
        mop_plan(2, 8, 2, 4, chunks + ",save-attention=off,mla-exchange=latent,clip=off"),
        mop_plan(4, 8, 2, 8, "optimizer=split,optimizer-hbm-layers=2,round-rows=64,vp-tile=32"),
        mop_plan(2, 8, 1, 4, "expert-placement=across,least-loaded=off,optimizer=host,clip=off"),
        mop_plan(8, 8, 4, 8, "vp-scheme=weights,vp-tile=8"),
        mop_plan(2, 8, 2, 2, "kept-layers=1,mla-exchange=latent,checkpoints=host," + chunks)})
    cases.push_back({model, plan, 8, 256, 2, 1});
  cases.push_back({model, mop_plan(4, 8, 2, 4, "optimizer=host,checkpoints=host"), 8, 128, 1, 3});
  cases.push_back({model, mop_plan(1, 1, 1, 1, "optimizer=host,clip=off"), 1, 128, 1, 2});
  const int64_t layers = model::read_config(model).layers;
  cases.push_back(
      {model, mop_plan(1, 4, 1, 4, "kept-layers=" + std::to_string(layers) + "," + chunks), 4, 128, 1, 2});
  cases.push_back({model, mop_plan(4, 8, 2, 4, "vp-scheme=weights"), 8, 128, 1, 2, fp32, true});
  cases.push_back({model, mop_plan(2, 4, 2, 2, "optimizer=stream,clip=off," + chunks), 8, 128, 2, 1, fp32});
  for (const char* plan :
       {"fsdp2:runtime=native", "fsdp2:runtime=native,offload=on",
        "fsdp2:runtime=native,ep=4,offload=on,clip=off", "fsdp2:runtime=native,ep=2,replicate=2",
        "fsdp2:runtime=native,reshard=off,prefetch=off",
        "fsdp2:runtime=native,replicate=2,reduce=fp32,loss-chunk=64,ep=2",
        "fsdp2:runtime=native,loss-chunk=0,clip=off,prefetch=off", "fsdp2:runtime=native,cp=4",
        "fsdp2:runtime=native,tp=2,cp=2,ep=4,recompute=none", "fsdp2:runtime=native,recompute=none",
        "fsdp2:runtime=native,recompute=none,cp=2,offload=on"})
    cases.push_back({model, plan, 4, 128, 2, 1});
  cases.push_back({model, "fsdp2:runtime=native,ep=2,offload=on", 4, 128, 1, 3});
  cases.push_back({model, "fsdp2:runtime=native", 1, 128, 1, 1});
  cases.push_back({model, "fsdp2:runtime=native,ep=2,loss-chunk=100", 4, 128, 2, 2, fp32, true});
  cases.push_back({model, "fsdp2:runtime=native,offload=on,ep=4", 4, 128, 1, 1, bf16, true});
  cases.push_back({model, "fsdp2:runtime=native,tp=2,recompute=none", 4, 128, 1, 2, fp32, true});
  return cases;
}

inline constexpr std::array kTinyModels{"tiny-qwen3-moe", "tiny-deepseek-v3", "tiny-gpt-oss",
                                        "tiny-olmoe",     "tiny-glm4-moe",    "tiny-mixtral"};

inline std::vector<Case> tiny_native_cases() {
  std::vector<Case> cases;
  for (const char* model : kTinyModels)
    for (const Case& c : tiny_native_cases(model)) cases.push_back(c);
  return cases;
}

inline std::vector<Case> tiny_cases() {
  std::vector<Case> cases;
  for (const char* model : kTinyModels) {
    for (const Case& c : tiny_pytorch_cases(model)) cases.push_back(c);
    for (const Case& c : tiny_native_cases(model)) cases.push_back(c);
  }
  return cases;
}

}  // namespace mop::program::testing
