// Helpers of the model tests: shipped configs as editable JSON, and the message of a UserError.
#pragma once
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "sim/base/error.h"
#include "sim/base/paths.h"
#include "sim/model/config.h"
#include "tests/error_of.h"

namespace mop::model::testing {

using Json = nlohmann::json;

inline std::string shipped_text(const std::string& name) {
  std::ifstream file(data_home() / "scenarios" / "models" / name / "config.json");
  return {std::istreambuf_iterator<char>(file), {}};
}

inline Json shipped_json(const std::string& name) {
  return Json::parse(shipped_text(name));
}

inline ModelConfig parse(const Json& json) {
  return parse_config(json.dump(), "test");
}

}  // namespace mop::model::testing
