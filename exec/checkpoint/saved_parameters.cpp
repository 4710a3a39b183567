#include "exec/checkpoint/saved_parameters.h"

#include <algorithm>

#include "sim/base/error.h"

namespace mop::checkpoint {

SavedParameters::SavedParameters(const Reader& reader, const program::ParameterLayout& saved)
    : reader_(reader) {
  for (const program::FlatGroup flat : saved.groups())
    for (const program::Piece& piece : saved.pieces(flat)) pieces_[piece.parameter].emplace_back(flat, piece);
}

bool SavedParameters::has(model::ParameterId parameter, What what) const {
  const auto found = pieces_.find(parameter);
  return found != pieces_.end() && reader_.has(found->second.front().first, what);
}

void SavedParameters::read(model::ParameterId parameter, What what, int64_t row, int64_t col, int64_t rows,
                           int64_t cols, float* out, int64_t ld) const {
  const auto found = pieces_.find(parameter);
  ensure(found != pieces_.end(), "a parameter of the saved layout");
  int64_t filled = 0;
  for (const auto& [flat, piece] : found->second) {
    const int64_t top = std::max(row, piece.row), bottom = std::min(row + rows, piece.row + piece.rows);
    const int64_t left = std::max(col, piece.col), right = std::min(col + cols, piece.col + piece.cols);
    if (top >= bottom || left >= right) continue;
    const int64_t width = right - left, height = bottom - top;
    const int64_t from = piece.offset + (top - piece.row) * piece.ld + left - piece.col;
    float* const to = out + (top - row) * ld + left - col;
    if (width == piece.ld && width == ld) {  // without gaps on either side
      reader_.read(flat, what, from, {to, static_cast<size_t>(height * width)});
    } else {
      for (int64_t r = 0; r < height; ++r)
        reader_.read(flat, what, from + r * piece.ld, {to + r * ld, static_cast<size_t>(width)});
    }
    filled += height * width;
  }
  ensure(filled == rows * cols, "the saved layout has all of a parameter");
}

}  // namespace mop::checkpoint
