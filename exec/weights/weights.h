// Where a model's weights come from and go to: a Hugging Face folder, or a seed.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>

#include "exec/weights/convert.h"
#include "sim/model/tensors.h"

namespace mop::weights {

// Any thread may read, at the same time as others.
class Source {
 public:
  virtual ~Source() = default;

  // Rows [row, row + rows) and columns [col, col + cols) of a parameter to `out`, `ld` elements from row to
  // row. Touches no other elements.
  virtual void read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
                    int64_t ld) const = 0;
};

// A new model. Each element is a function of the seed and of its place in the checkpoint (tensor name, index
// in the tensor) and nothing else, so every plan starts from the same weights.
class RandomSource : public Source {
 public:
  // neutral: norms 1, biases, sinks and correction biases 0, the rest normal(0, std).
  // random: those too, normal(1, std) and normal(0, std): no gradient vanishes, for tests.
  enum class Vectors : uint8_t { neutral, random };

  RandomSource(model::ModelConfig model, uint64_t seed, double std = 0.02,
               Vectors vectors = Vectors::neutral);
  void read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
            int64_t ld) const override;

 private:
  model::ModelConfig model_;
  uint64_t seed_;
  double std_;
  Vectors vectors_;
};

class HuggingFaceSource : public Source {
 public:
  // Errors: UserError that names the file and tensor, for a folder that is not a checkpoint of this model: a
  // tensor missing, of another shape, quantised, or one that the model has no parameter for.
  HuggingFaceSource(model::ModelConfig model, const std::filesystem::path& folder);
  ~HuggingFaceSource() override;
  void read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
            int64_t ld) const override;

 private:
  struct Parts;
  std::unique_ptr<const Parts> parts_;
};

inline constexpr int64_t kShardBytes = 5'000'000'000;

// Whether write_hugging_face can write there, before there is anything to write; the folders around it are
// made. Errors: as of that.
void check_export_folder(const std::filesystem::path& folder);

// Writes a folder that Hugging Face's transformers loads: the weights as bf16 or fp32 (correction biases stay
// fp32) and config.json as it is, but for the type and for a quantisation that no longer holds. `get` fills a
// whole parameter, rows end to end; it is called once for each. In memory are one matrix, or what a fused
// tensor holds of one expert. The folder appears when it is complete; until then it has a temporary name
// beside its own. Errors: UserError for a folder that exists and is not empty, an unreadable config.json or a
// full disk; nothing is left behind.
void write_hugging_face(const model::ModelConfig& model, const std::filesystem::path& config_json,
                        const std::filesystem::path& folder, Type type,
                        const std::function<void(model::ParameterId id, float* out)>& get,
                        int64_t max_file_bytes = kShardBytes);

}  // namespace mop::weights
