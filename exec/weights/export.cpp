#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#include "exec/weights/safetensors.h"
#include "exec/weights/weights.h"
#include "sim/base/error.h"

namespace mop::weights {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const fs::path& path, const std::error_code& error) {
  throw UserError(fmt::format("cannot write {}: {}; choose another folder", path.string(), error.message()));
}

// A folder under a temporary name beside its own: gone unless kept.
class Folder {
 public:
  explicit Folder(fs::path target) : target_(std::move(target)) {
    if (!target_.has_filename()) target_ = target_.parent_path();  // "out/"
    std::error_code error;
    if (fs::exists(target_, error) && !(fs::is_directory(target_, error) && fs::is_empty(target_, error)))
      throw UserError(fmt::format("{} exists already: remove it or choose another folder", target_.string()));
    if (target_.has_parent_path()) fs::create_directories(target_.parent_path(), error);
    if (error) fail(target_.parent_path(), error);
    std::string pattern = target_.string() + ".XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) fail(target_, {errno, std::generic_category()});
    path_ = pattern;
  }
  ~Folder() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const fs::path& path() const { return path_; }

  void keep() {
    std::error_code error;
    fs::permissions(path_, fs::perms::all & ~fs::perms::group_write & ~fs::perms::others_write, error);
    sync(path_);
    fs::rename(path_, target_, error);
    if (error) fail(target_, error);
    path_.clear();
    sync(target_.has_parent_path() ? target_.parent_path() : fs::path("."));
  }

 private:
  // The names in a folder are on the disk afterwards, on file systems that can promise it.
  static void sync(const fs::path& folder) {
    const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
  }

  fs::path target_, path_;
};

// The config of what is written: its type as transformers reads it, and no quantisation.
std::string exported_config(const fs::path& path, Type type) {
  std::ifstream file(path);
  auto json = nlohmann::ordered_json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object())
    throw UserError(fmt::format("{}: cannot be read as JSON: give the model's config.json", path.string()));
  json.erase("quantization_config");
  json.erase("dtype");
  json["torch_dtype"] = type == Type::bf16 ? "bfloat16" : "float32";
  return json.dump(2) + "\n";
}

// Parameters that are stored together: part of a tensor, from its front to its end.
struct Piece {
  std::vector<model::ParameterId> ids;
  int64_t first = 0, elements = 0;  // in the tensor
};

struct StoredTensor {
  TensorPlan plan;
  std::vector<Piece> pieces;
};

// The tensors in the order of their first parameter. A fused one is a piece an expert.
std::vector<StoredTensor> tensors(const model::ModelConfig& model, Type type) {
  std::vector<StoredTensor> result;
  std::unordered_map<std::string, size_t> index;
  for (const model::ParameterId id : model::parameters(model)) {
    const model::Stored stored = model::stored(model, id);
    const auto [found, is_new] = index.emplace(stored.name, result.size());
    if (is_new) {
      const Type stored_type = id.role == model::Role::correction_bias ? Type::f32 : type;
      result.push_back({{stored.name, stored_type, stored.shape}, {}});
    }
    std::vector<Piece>& pieces = result[found->second].pieces;
    if (pieces.empty() || pieces.back().ids.front().expert != id.expert) {
      const int64_t first = pieces.empty() ? 0 : pieces.back().first + pieces.back().elements;
      pieces.push_back({{}, first, 0});
    }
    const model::MatrixShape shape = model::shape(model, id);
    pieces.back().ids.push_back(id);
    pieces.back().elements += shape.rows * shape.cols;
  }
  return result;
}

bool is_row_major(const model::ModelConfig& model, const Piece& piece) {
  const model::Stored stored = model::stored(model, piece.ids.front());
  const model::MatrixShape shape = model::shape(model, piece.ids.front());
  return piece.ids.size() == 1 && stored.col_stride == 1 &&
         (shape.rows == 1 || stored.row_stride == shape.cols);
}

// Puts a parameter where the piece has it.
void place(const model::ModelConfig& model, model::ParameterId id, const float* values, const Piece& piece,
           float* out) {
  const model::MatrixShape shape = model::shape(model, id);
  const model::Stored stored = model::stored(model, id);
  ensure(stored.offset >= piece.first &&
             stored.offset + (shape.rows - 1) * stored.row_stride + (shape.cols - 1) * stored.col_stride <
                 piece.first + piece.elements,
         "the parameters of an expert lie together");
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t c = 0; c < shape.cols; ++c)
      out[stored.offset - piece.first + r * stored.row_stride + c * stored.col_stride] =
          values[r * shape.cols + c];
}

}  // namespace

void check_export_folder(const fs::path& folder) {
  const Folder tried(folder);
}

void write_hugging_face(const model::ModelConfig& model, const fs::path& config_json, const fs::path& folder,
                        Type type, const std::function<void(model::ParameterId, float*)>& get,
                        int64_t max_file_bytes) {
  ensure(type == Type::bf16 || type == Type::f32, "weights are written as bf16 or fp32");
  const std::string config = exported_config(config_json, type);
  const std::vector<StoredTensor> all = tensors(model, type);
  std::vector<TensorPlan> plan;
  for (const StoredTensor& tensor : all) plan.push_back(tensor.plan);

  Folder temporary(folder);
  OutputFile config_file(temporary.path() / "config.json");
  config_file.write(config);
  config_file.finish();
  Writer writer(temporary.path(), std::move(plan), max_file_bytes);
  std::vector<float> values, arranged;
  for (const StoredTensor& tensor : all) {
    for (const Piece& piece : tensor.pieces) {
      const bool as_is = is_row_major(model, piece);
      arranged.resize(as_is ? 0 : static_cast<size_t>(piece.elements));
      for (const model::ParameterId id : piece.ids) {
        const model::MatrixShape shape = model::shape(model, id);
        values.resize(static_cast<size_t>(shape.rows * shape.cols));
        get(id, values.data());
        if (!as_is) place(model, id, values.data(), piece, arranged.data());
      }
      writer.append(as_is ? values : arranged);
    }
  }
  writer.finish();
  temporary.keep();
}

}  // namespace mop::weights
