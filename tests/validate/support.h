// A small run and its record, as mop run would store it.
#pragma once
#include <nlohmann/json.hpp>
#include <string>

#include "sim/predict/timelines.h"
#include "sim/search/settings.h"
#include "sim/validate/comparison.h"
#include "sim/validate/question.h"

namespace mop::validate {

inline predict::Scenario small_scenario(const std::string& plan =
                                            "mop:ep=2,dense-shard=2,ulysses=1,vp=1,vp-scheme=tokens,"
                                            "mla-exchange=expanded,checkpoints=hbm,optimizer=hbm") {
  predict::Scenario s;
  for (const auto& [name, value] : {std::pair{"model", "tiny-qwen3-moe"},
                                    {"cluster", "h200x4"},
                                    {"gpus-per-node", "2"},
                                    {"context", "512"},
                                    {"sequences", "2"},
                                    {"precision", "fp32"},
                                    {"balance-loss", "on"}})
    search::set(s, name, value);
  s.plan = plan::parse_plan(plan);
  return s;
}

// As if it had been measured just as it is predicted, but for the step, `slower` times as long.
inline store::RunRecord measured(const predict::Scenario& s, double slower = 1, int64_t id = 7) {
  predict::Details details;
  const predict::Prediction p = predict::predict(s, {}, &details);
  store::RunRecord r;
  r.id = id;
  r.kind = store::kMeasurement;
  r.model = s.model.name;
  r.cluster = "gpus";
  r.nodes = s.nodes;
  r.gpus = s.gpus();
  r.context = s.workload.context;
  r.sequences = s.workload.sequences;
  r.accumulate = s.workload.accumulate;
  r.plan_family = plan::family_name(s.plan.family);
  r.plan = plan::describe(s.plan);
  r.fits = true;
  r.hbm_peak_bytes = p.hbm_peak;
  r.host_peak_bytes = p.host_peak;
  r.step_time_s = *p.step_time * slower;
  r.tokens_per_step = p.tokens_per_step;
  r.model_flops_per_token = p.model_flops_per_token;
  OpSums sums = sum_operations(predict::timelines(s, details));
  sums.step = *r.step_time_s;
  nlohmann::json detail{{"backend", "cuda"}};
  detail[kQuestion] =
      nlohmann::json::parse(to_json(s, "tiny-qwen3-moe", model::config_text("tiny-qwen3-moe"), "h200x4"));
  detail[kOpSums] = nlohmann::json::parse(to_json(sums));
  r.detail = detail.dump();
  return r;
}

}  // namespace mop::validate
