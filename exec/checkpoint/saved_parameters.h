// A checkpoint's parameters as matrices, gathered from the flat groups of the plan that saved it.
#pragma once
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "exec/checkpoint/reader.h"
#include "sim/program/parameters.h"

namespace mop::checkpoint {

// Reading is safe from several threads at once.
class SavedParameters {
 public:
  // `saved`: the layout of the plan and ranks in the reader's state. The reader outlives this.
  SavedParameters(const Reader& reader, const program::ParameterLayout& saved);

  // Rows [row, row + rows) and columns [col, col + cols) of a parameter to `out`, `ld` elements from row to
  // row. Errors: those of Reader::read; InternalError for a parameter or a place that the layout does not
  // have.
  void read(model::ParameterId parameter, What what, int64_t row, int64_t col, int64_t rows, int64_t cols,
            float* out, int64_t ld) const;

  bool has(model::ParameterId parameter, What what) const;

 private:
  using Placed = std::pair<program::FlatGroup, program::Piece>;

  const Reader& reader_;
  std::map<model::ParameterId, std::vector<Placed>> pieces_;
};

}  // namespace mop::checkpoint
