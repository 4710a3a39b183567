// What transformers computed for the executor's tests: tests/data/hf, written by tests/peers/hf_reference.py.
#pragma once
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "exec/data/sequences.h"
#include "exec/weights/safetensors.h"
#include "sim/model/tensors.h"

namespace mop::train::testing {

inline std::filesystem::path reference_folder(const std::string& family) {
  return std::filesystem::path(MOP_TEST_DATA) / "hf" / family;
}

// The reference's own batch.
class ReferenceBatch final : public data::Sequences {
 public:
  ReferenceBatch(const weights::TensorFile& file, const std::string& kind) {
    const auto ints = [&](const std::string& name) {
      std::vector<int32_t> values(static_cast<size_t>(kRows * 2));
      std::memcpy(values.data(), file.tensors().at(name).data, values.size() * sizeof(int32_t));
      return values;
    };
    tokens_ = ints("tokens");
    targets_ = ints("targets");
    positions_ = ints(kind + ".positions");
    starts_ = ints(kind + ".starts");
  }
  static constexpr int64_t kRows = 64;
  int64_t context() const override { return kRows; }
  int64_t at(data::Position p) const override { return p.sequence; }
  data::Position advance(data::Position p, int64_t n) const override { return {p.epoch, p.sequence + n}; }
  void rows(int64_t sequence, int64_t first, std::span<int32_t> ids, std::span<int32_t> targets,
            std::span<int32_t> positions) const override {
    const auto at = static_cast<size_t>(sequence * kRows + first);
    std::copy_n(tokens_.begin() + static_cast<std::ptrdiff_t>(at), ids.size(), ids.begin());
    std::copy_n(targets_.begin() + static_cast<std::ptrdiff_t>(at), ids.size(), targets.begin());
    std::copy_n(positions_.begin() + static_cast<std::ptrdiff_t>(at), ids.size(), positions.begin());
  }
  void starts(int64_t sequence, std::span<int32_t> starts) const override {
    for (size_t i = 0; i < starts.size(); ++i)
      starts[i] = starts_[static_cast<size_t>(sequence * kRows) + i] - static_cast<int32_t>(sequence * kRows);
  }

 private:
  std::vector<int32_t> tokens_, targets_, positions_, starts_;
};

inline double reference_loss(const weights::TensorFile& file, const std::string& kind) {
  double loss = 0;
  std::memcpy(&loss, file.tensors().at(kind + ".loss").data, sizeof loss);
  return loss;
}

inline std::vector<float> reference_gradient(const weights::TensorFile& file, const std::string& kind,
                                             const model::ModelConfig& model, model::ParameterId id) {
  const model::MatrixShape shape = model::shape(model, id);
  const model::Stored stored = model::stored(model, id);
  std::vector<float> values(static_cast<size_t>(shape.rows * shape.cols));
  weights::read_block(file.tensors().at(kind + ".gradient." + stored.name), stored, 0, 0, shape.rows,
                      shape.cols, values.data(), shape.cols);
  return values;
}

}  // namespace mop::train::testing
