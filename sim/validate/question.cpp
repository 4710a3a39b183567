#include "sim/validate/question.h"

#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/base/paths.h"
#include "sim/model/config.h"
#include "sim/search/settings.h"

namespace mop::validate {

using Json = nlohmann::ordered_json;

std::string locate(const std::string& name) {
  std::error_code ignored;
  const bool shipped = name.find('/') != std::string::npos && !std::filesystem::exists(name, ignored) &&
                       std::filesystem::exists(data_home() / name, ignored);
  return shipped ? (data_home() / name).string() : name;
}

std::string to_json(const predict::Scenario& s, const std::string& model, const std::string& config,
                    const std::string& cluster) {
  return Json{{"model", model},
              {"config", Json::parse(config)},
              {"cluster", cluster},
              {"gpus_per_node", s.used_per_node()},
              {"precision", plan::name(s.workload.precision)},
              {"balance_loss", s.workload.balance_loss},
              {"routing", plan::describe(s.workload.routing)},
              {"calibration", cost::name(s.calibration)}}
      .dump(-1, ' ', false, Json::error_handler_t::replace);
}

namespace {

// Of the place that the record names or, where nothing is there any more, of the record itself.
model::ModelConfig model_of(const Json& question, const std::string& name) {
  try {
    return model::read_config(locate(question.at("model")));
  } catch (const UserError&) {
    if (!question.contains("config")) throw;
    return model::parse_config(question["config"].dump(), name);
  }
}

}  // namespace

predict::Scenario scenario_of(const store::RunRecord& measurement, const store::RunRecord* prediction,
                              const cluster::ClusterModel* cluster) {
  const Json detail = Json::parse(measurement.detail);
  // A prediction's detail has members of the same names.
  Json question;
  if (detail.contains(kQuestion))
    question = detail[kQuestion];
  else if (prediction != nullptr)
    question = Json::parse(prediction->detail);
  else
    throw UserError(
        "the record does not say what cluster and routing it was of, and no prediction is stored beside it; "
        "measure again");
  predict::Scenario s;
  try {
    s.model = model_of(question, measurement.model);
    if (cluster != nullptr)
      s.cluster = *cluster;
    else
      search::set(s, "cluster", locate(question.at("cluster")));
    search::set(s, "precision", question.at("precision"));
    search::set(s, "balance-loss", question.at("balance_loss").get<bool>() ? "on" : "off");
    search::set(s, "routing", question.at("routing"));
    search::set(s, "calibration", question.at("calibration"));
    s.gpus_per_node = question.at("gpus_per_node");
  } catch (const Json::exception& error) {
    throw UserError(fmt::format("the record's question cannot be read ({}); measure again", error.what()));
  }
  s.nodes = measurement.nodes;
  s.workload.context = measurement.context;
  s.workload.sequences = measurement.sequences;
  s.workload.accumulate = measurement.accumulate;
  s.plan = plan::parse_plan(measurement.plan);
  predict::validate(s);
  const double flops = predict::model_flops(s).total();
  if (measurement.model_flops_per_token && std::abs(*measurement.model_flops_per_token / flops - 1) > 1e-9)
    throw UserError(fmt::format(
        "model {} has {:.6g} FLOPs a token now, and had {:.6g} when it was measured: its file has changed",
        s.model.name, flops, *measurement.model_flops_per_token));
  return s;
}

}  // namespace mop::validate
