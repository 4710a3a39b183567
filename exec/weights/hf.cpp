#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_set>
#include <utility>

#include "exec/weights/safetensors.h"
#include "exec/weights/weights.h"
#include "sim/base/error.h"

namespace mop::weights {
namespace {

namespace fs = std::filesystem;

constexpr const char* kBf16 = "give a bf16 version of this checkpoint";

// Beside a quantised tensor lies one with its scales, and its own name may get an ending too.
constexpr std::array kQuantisedEndings{"_blocks", "_scales", "_scale_inv", "_scale", "_packed", ".qweight"};

[[noreturn]] void refuse_quantised(const fs::path& where, const std::string& method) {
  throw UserError(fmt::format("{}: the weights are quantised ({}): {}", where.string(), method, kBf16));
}

// What the checkpoint's own config.json says, if it is there and says it.
void refuse_quantised_config(const fs::path& folder) {
  const fs::path path = folder / "config.json";
  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("quantization_config")) return;
  const auto& quantisation = json["quantization_config"];
  if (!quantisation.is_object()) return;
  refuse_quantised(path, quantisation.contains("quant_method") ? quantisation["quant_method"].dump()
                                                               : "by an unnamed method");
}

// A tensor that is in checkpoints without being a parameter of ours: a head that is tied to the embedding,
// buffers, and what lies beyond the last layer (multi-token prediction).
bool is_extra(const model::ModelConfig& model, const std::string& name) {
  if (name == "lm_head.weight") return model.tied_head;
  if (name.ends_with("rotary_emb.inv_freq")) return true;
  constexpr std::string_view kLayers = "model.layers.";
  if (!name.starts_with(kLayers)) return false;
  int64_t layer = 0;
  size_t i = kLayers.size();
  for (; i < name.size() && name[i] >= '0' && name[i] <= '9' && layer < model.layers; ++i)
    layer = 10 * layer + (name[i] - '0');
  return layer >= model.layers;
}

}  // namespace

struct HuggingFaceSource::Parts {
  model::ModelConfig model;
  Checkpoint checkpoint;
};

HuggingFaceSource::HuggingFaceSource(model::ModelConfig model, const fs::path& folder) {
  refuse_quantised_config(folder);
  parts_.reset(new Parts{std::move(model), Checkpoint(folder)});
  const Checkpoint& checkpoint = parts_->checkpoint;

  std::unordered_set<std::string> known;
  for (const model::ParameterId id : model::parameters(parts_->model)) {
    const model::Stored stored = model::stored(parts_->model, id);
    if (!known.insert(stored.name).second) continue;
    const Checkpoint::Place place = checkpoint.find(stored.name);
    if (!place) {
      for (const char* ending : kQuantisedEndings) {
        const std::string companion = stored.name + ending;
        if (const Checkpoint::Place found = checkpoint.find(companion); found)
          refuse_quantised(found.file->path(),
                           ending == std::string_view("_blocks") ? "mxfp4" : "tensor " + companion);
      }
      throw UserError(
          fmt::format("{}: tensor {} is missing: this is no checkpoint of a {} model with {} layers "
                      "and {} experts",
                      folder.string(), stored.name, parts_->model.model_type, parts_->model.layers,
                      parts_->model.experts));
    }
    const Tensor& tensor = *place.tensor;
    const fs::path& file = place.file->path();
    if (!type_of(tensor.type))
      throw UserError(fmt::format("{}: tensor {} is of type {}, and readable are BF16, F16, F32 and F64: {}",
                                  file.string(), stored.name, tensor.type, kBf16));
    if (tensor.shape != stored.shape)
      throw UserError(fmt::format(
          "{}: tensor {} has shape ({}), and config.json makes it ({}): they belong to "
          "different models",
          file.string(), stored.name, fmt::join(tensor.shape, ", "), fmt::join(stored.shape, ", ")));
  }
  for (const TensorFile& file : checkpoint.files()) {
    for (const auto& [name, tensor] : file.tensors()) {
      if (known.contains(name) || is_extra(parts_->model, name)) continue;
      for (const char* ending : kQuantisedEndings)
        if (name.ends_with(ending)) refuse_quantised(file.path(), "tensor " + name);
      throw UserError(
          fmt::format("{}: tensor {} is of no parameter that config.json gives the model: they belong "
                      "to different models",
                      file.path().string(), name));
    }
  }
}

HuggingFaceSource::~HuggingFaceSource() = default;

void HuggingFaceSource::read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols,
                             float* out, int64_t ld) const {
  const model::MatrixShape shape = model::shape(parts_->model, id);
  ensure(
      row >= 0 && rows >= 0 && row + rows <= shape.rows && col >= 0 && cols >= 0 && col + cols <= shape.cols,
      "a block lies inside its parameter");
  const model::Stored stored = model::stored(parts_->model, id);
  read_block(*parts_->checkpoint.find(stored.name).tensor, stored, row, col, rows, cols, out, ld);
}

}  // namespace mop::weights
