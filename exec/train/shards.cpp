#include "exec/train/shards.h"

#include <algorithm>

#include "exec/weights/convert.h"
#include "sim/base/error.h"

namespace mop::train {

using program::Shard;
using program::Type;

namespace {

// Calls visit(row, first column, count, first element) for every run of a piece's row inside [first, last) of its
// group.
template <typename Visit>
void rows_inside(const program::Piece& piece, int64_t first, int64_t last, Visit visit) {
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t begin = piece.offset + r * piece.ld;
    const int64_t from = std::max(begin, first), to = std::min(begin + piece.cols, last);
    if (from < to) visit(r, from - begin, to - from, from);
  }
}

bool inside(const program::Piece& piece, int64_t first, int64_t last) {
  return piece.offset >= first && piece.offset + (piece.rows - 1) * piece.ld + piece.cols <= last;
}

weights::Type stored_as(Type type) {
  return type == Type::f32 ? weights::Type::f32 : weights::Type::bf16;
}

}  // namespace

Shards::Shards(const Prepared& prepared, std::span<const interpreter::Memory> ranks)
    : prepared_(prepared), ranks_(ranks) {}

Shards::Range Shards::range(size_t rank, const Shard& shard) const {
  const auto index = [&](const plan::Span& span) { return static_cast<int64_t>(rank) / span.stride % span.size; };
  const int64_t outer = index(shard.outer) * shard.outer_elements;
  const int64_t end =
      shard.outer_elements > 0 ? outer + shard.outer_elements : prepared_.parameters.elements(shard.flat);
  const int64_t first = std::min(end, outer + index(shard.inner) * shard.elements);
  return {first, std::min(shard.elements, end - first)};
}

std::vector<Shards::Stretch> Shards::stretches(size_t rank, const Shard& shard, What what) const {
  const interpreter::Memory& memory = ranks_[rank];
  const Range all = range(rank, shard);
  const auto whole = [&](program::BufferId buffer, Type type) {
    return std::vector<Stretch>{{all, memory.at(buffer, 0), type}};
  };
  if (what == What::weights) return whole(shard.weights, shard.weights_type);
  if (shard.states == program::kNoBuffer) return {};
  if (what == What::gradient) return whole(shard.gradient, shard.gradient_type);
  if (what == What::master && !shard.master) return whole(shard.weights, shard.weights_type);
  const int64_t copies = shard.master ? 3 : 2;
  const int64_t place = what == What::v ? copies - 1 : what == What::m ? copies - 2 : 0;
  std::vector<Stretch> parts;
  for (int64_t done = 0; done < all.count;) {
    const int64_t at = shard.states_first + done, block = at / shard.states_bucket, inner = at % shard.states_bucket;
    const int64_t count = std::min(all.count - done, shard.states_bucket - inner);
    const int64_t element = (block * copies + place) * shard.states_bucket + inner;
    parts.push_back({{all.first + done, count},
                     memory.at(shard.states, 0) + element * program::size_of(Type::f32),
                     Type::f32});
    done += count;
  }
  return parts;
}

void Shards::fill_shard(size_t rank, const Shard& shard, What what, const Read& read) {
  const std::vector<program::Piece> pieces = prepared_.parameters.pieces(shard.flat);
  for (const Stretch& stretch : stretches(rank, shard, what)) {
    const int64_t first = stretch.range.first, last = first + stretch.range.count;
    std::vector<float> values(static_cast<size_t>(stretch.range.count), 0.0F);
    for (const program::Piece& piece : pieces) {
      if (piece.offset >= last) continue;
      if (inside(piece, first, last)) {
        read(piece.parameter, piece.row, piece.col, piece.rows, piece.cols,
             &values[static_cast<size_t>(piece.offset - first)], piece.ld);
        continue;
      }
      rows_inside(piece, first, last, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
        read(piece.parameter, piece.row + row, piece.col + col, 1, count, &values[static_cast<size_t>(at - first)],
             count);
      });
    }
    weights::from_float(stored_as(stretch.type), values.data(), stretch.range.count, stretch.data);
  }
}

void Shards::fill_weights(const Read& read) {
  for (size_t rank = 0; rank < ranks_.size(); ++rank)
    for (const Shard& shard : prepared_.program.shards) {
      fill_shard(rank, shard, What::weights, read);
      if (shard.states != program::kNoBuffer && shard.master) fill_shard(rank, shard, What::master, read);
    }
}

void Shards::fill(What what, const Read& read) {
  for (size_t rank = 0; rank < ranks_.size(); ++rank)
    for (const Shard& shard : prepared_.program.shards)
      if (shard.states != program::kNoBuffer) fill_shard(rank, shard, what, read);
}

void Shards::read(model::ParameterId id, What what, float* out) const {
  const model::MatrixShape shape = model::shape(prepared_.job.model, id);
  std::vector<bool> found(static_cast<size_t>(shape.rows * shape.cols), false);
  for (const Shard& shard : prepared_.program.shards) {
    std::vector<program::Piece> pieces = prepared_.parameters.pieces(shard.flat);
    std::erase_if(pieces, [&](const program::Piece& piece) { return piece.parameter != id; });
    if (pieces.empty()) continue;
    for (size_t rank = 0; rank < ranks_.size(); ++rank)
      for (const Stretch& stretch : stretches(rank, shard, what))
        for (const program::Piece& piece : pieces)
          rows_inside(piece, stretch.range.first, stretch.range.first + stretch.range.count,
                      [&](int64_t row, int64_t col, int64_t count, int64_t at) {
                        const int64_t to = (piece.row + row) * shape.cols + piece.col + col;
                        if (found[static_cast<size_t>(to)]) return;  // a replica
                        weights::to_float(stored_as(stretch.type),
                                          stretch.data + (at - stretch.range.first) * program::size_of(stretch.type), 1,
                                          count, out + to, 1);
                        std::fill_n(found.begin() + to, count, true);
                      });
  }
  ensure(std::ranges::find(found, false) == found.end(), "the ranks hold every element of every parameter");
}

std::vector<std::vector<checkpoint::Part>> Shards::parts() const {
  std::vector<std::vector<checkpoint::Part>> all(ranks_.size());
  for (size_t rank = 0; rank < ranks_.size(); ++rank)
    for (const Shard& shard : prepared_.program.shards) {
      // One of the ranks that hold the same shard writes it.
      const auto add = [&](What what, checkpoint::What name) {
        for (const Stretch& s : stretches(rank, shard, what))
          if (s.range.count > 0)
            all[rank].push_back({shard.flat, name, s.type, s.range.first,
                                 {s.data, static_cast<size_t>(s.range.count * program::size_of(s.type))}});
      };
      if (shard.states == program::kNoBuffer) {
        if (rank == 0) add(What::weights, checkpoint::What::weights);
        continue;
      }
      bool first_holder = true;
      const Range mine = range(rank, shard);
      for (size_t other = 0; other < rank && first_holder; ++other)
        first_holder = range(other, shard).first != mine.first;
      if (!first_holder) continue;
      add(What::master, checkpoint::What::master);
      add(What::m, checkpoint::What::m);
      add(What::v, checkpoint::What::v);
    }
  return all;
}

}  // namespace mop::train
