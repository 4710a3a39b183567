// Helpers of the model tests: shipped configs as editable JSON, and the message of a UserError.
#pragma once
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "sim/base/error.h"
#include "sim/base/paths.h"
#include "sim/model/config.h"

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

// The message of the UserError that `call` throws; "" and a test failure when it throws none.
template <typename Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const UserError& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find('\n'), std::string::npos) << "not one line: " << message;
    return message;
  }
  ADD_FAILURE() << "no UserError";
  return "";
}

}  // namespace mop::model::testing
