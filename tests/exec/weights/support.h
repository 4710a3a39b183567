// Helpers of the weights tests: models with committed name lists, scratch folders, whole parameters.
#pragma once
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "exec/weights/weights.h"
#include "sim/base/paths.h"
#include "sim/model/config.h"
#include "tests/error_of.h"

namespace mop::weights::testing {

namespace fs = std::filesystem;
using Json = nlohmann::json;

inline std::string text_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_text(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// {"folder of a config.json": {"tensor": [shape]}}, as transformers writes them.
inline const Json& names() {
  static const Json json = Json::parse(text_of(data_home() / "tests/data/hf/names.json"));
  return json;
}

inline std::vector<std::string> models() {
  std::vector<std::string> result;
  for (const auto& [folder, tensors] : names().items()) result.push_back(folder);
  return result;
}

inline fs::path config_path(const std::string& folder) {
  return data_home() / folder / "config.json";
}

inline model::ModelConfig config(const std::string& folder) {
  return model::read_config(config_path(folder).string());
}

// For the names of parametrised tests: letters and digits only.
inline std::string test_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
}

class Scratch {
 public:
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "mop-weights-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~Scratch() { fs::remove_all(path_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const fs::path& path() const { return path_; }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

inline std::vector<float> whole(const model::ModelConfig& model, const Source& source,
                                model::ParameterId id) {
  const model::MatrixShape shape = model::shape(model, id);
  std::vector<float> values(static_cast<size_t>(shape.rows * shape.cols));
  source.read(id, 0, 0, shape.rows, shape.cols, values.data(), shape.cols);
  return values;
}

// Writes the source's weights as a Hugging Face folder.
inline void write(const model::ModelConfig& model, const std::string& folder, const Source& source,
                  const fs::path& to, Type type, int64_t max_file_bytes = kShardBytes) {
  write_hugging_face(
      model, config_path(folder), to, type,
      [&](model::ParameterId id, float* out) {
        const model::MatrixShape shape = model::shape(model, id);
        source.read(id, 0, 0, shape.rows, shape.cols, out, shape.cols);
      },
      max_file_bytes);
}

}  // namespace mop::weights::testing
