// Finds a model's config.json: on disk, or among the shipped models by short name.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "sim/base/error.h"
#include "sim/base/paths.h"
#include "sim/base/suggest.h"
#include "sim/model/config.h"

namespace mop::model {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFileName = "config.json";
constexpr size_t kMaxRead =
    (size_t{1} << 20) + 1;  // one byte more than parse_config takes, so that it can refuse

fs::path shipped_folder() {
  return data_home() / "scenarios" / "models";
}

std::string read_text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxRead, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.eof() && !file.good())  // a short read sets eof; anything else is a failure to open or to read
    throw UserError(fmt::format("{}: cannot be read ({})", path.string(), std::strerror(errno)));
  text.resize(static_cast<size_t>(file.gcount()));
  return text;
}

}  // namespace

fs::path config_path(const std::string& where) {
  if (where.empty())
    throw UserError("no model given: name a config.json, a folder that holds one, or a shipped model");
  std::error_code
      ignored;  // a path that cannot be examined (too long, no permission) is one that is not there
  const fs::path path(where);
  if (fs::is_directory(path, ignored)) {
    if (fs::exists(path / kFileName, ignored)) return path / kFileName;
    throw UserError(fmt::format("{}: the folder holds no {}", where, kFileName));
  }
  if (fs::exists(path, ignored)) return path;

  const std::vector<std::string> known = shipped_models();
  if (std::find(known.begin(), known.end(), where) != known.end())
    return shipped_folder() / where / kFileName;
  if (where.find('/') != std::string::npos || path.extension() == ".json")
    throw UserError(fmt::format("{}: no such file or folder", where));
  if (known.empty())
    throw UserError(
        fmt::format("{}: no such file or folder, and no shipped models in {}: set MOP_HOME to the folder "
                    "that holds scenarios/",
                    where, shipped_folder().string()));
  throw UserError(unknown_name("model", where, known));
}

std::string config_text(const std::string& where) {
  return read_text(config_path(where));
}

ModelConfig read_config(const std::string& where) {
  const fs::path path = config_path(where);
  ModelConfig config = parse_config(read_text(path), path.string());
  // "scenarios/models/kimi-k2/config.json" and "kimi-k2.json" are both the model kimi-k2.
  std::error_code ignored;
  const fs::path full = fs::absolute(path, ignored).lexically_normal();
  config.name = full.filename() == kFileName ? full.parent_path().filename().string() : full.stem().string();
  return config;
}

std::vector<std::string> shipped_models() {
  std::vector<std::string> names;
  std::error_code ignored;  // no folder: no shipped models
  for (const fs::directory_entry& entry : fs::directory_iterator(shipped_folder(), ignored)) {
    if (fs::exists(entry.path() / kFileName, ignored)) names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace mop::model
