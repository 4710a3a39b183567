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

Shards::Range Shards::range(int rank, const Shard& shard) const {
  const auto index = [&](const plan::Span& span) { return rank / span.stride % span.size; };
  const int64_t outer = index(shard.outer) * shard.outer_elements;
  const int64_t end =
      shard.outer_elements > 0 ? outer + shard.outer_elements : prepared_.parameters.elements(shard.flat);
  const int64_t first = std::min(end, outer + index(shard.inner) * shard.elements);
  return {first, std::min(shard.elements, end - first)};
}

std::vector<Shards::Stretch> Shards::stretches(int rank, const Shard& shard, What what) const {
  const interpreter::Memory& memory = machine_.memory(rank);
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

void Shards::fill_shard(int rank, const Shard& shard, What what, const Read& read) {
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
    std::vector<std::byte> stored(static_cast<size_t>(stretch.range.count * program::size_of(stretch.type)));
    weights::from_float(stored_as(stretch.type), values.data(), stretch.range.count, stored.data());
    machine_.write(rank, stretch.data, stored.data(), static_cast<int64_t>(stored.size()));
  }
}

void Shards::fill_weights(const Read& read) {
  for (int rank = 0; rank < prepared_.job.ranks; ++rank)
    for (const Shard& shard : prepared_.program.shards) {
      fill_shard(rank, shard, What::weights, read);
      if (shard.states != program::kNoBuffer && shard.master) fill_shard(rank, shard, What::master, read);
    }
}

void Shards::fill(What what, const Read& read) {
  for (int rank = 0; rank < prepared_.job.ranks; ++rank)
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
    for (int rank = 0; rank < prepared_.job.ranks; ++rank)
      for (const Stretch& stretch : stretches(rank, shard, what)) {
        const int64_t element = program::size_of(stretch.type);
        std::vector<std::byte> held;  // read when the shard turns out to have some of it
        for (const program::Piece& piece : pieces)
          rows_inside(piece, stretch.range.first, stretch.range.first + stretch.range.count,
                      [&](int64_t row, int64_t col, int64_t count, int64_t at) {
                        const int64_t to = (piece.row + row) * shape.cols + piece.col + col;
                        if (found[static_cast<size_t>(to)]) return;  // a replica
                        if (held.empty()) {
                          held.resize(static_cast<size_t>(stretch.range.count * element));
                          machine_.read(rank, stretch.data, held.data(), static_cast<int64_t>(held.size()));
                        }
                        weights::to_float(stored_as(stretch.type), held.data() + (at - stretch.range.first) * element,
                                          1, count, out + to, 1);
                        std::fill_n(found.begin() + to, count, true);
                      });
      }
  }
  ensure(std::ranges::find(found, false) == found.end(), "the ranks hold every element of every parameter");
}

std::vector<std::vector<checkpoint::Part>> Shards::copy_state(std::vector<std::byte>& copy) const {
  struct Wanted {
    int rank;
    const Shard* shard;
    checkpoint::What what;
    Stretch stretch;
  };
  std::vector<Wanted> all;
  int64_t bytes = 0;
  for (int rank = 0; rank < prepared_.job.ranks; ++rank)
    for (const Shard& shard : prepared_.program.shards) {
      const auto add = [&](What what, checkpoint::What name) {
        for (const Stretch& s : stretches(rank, shard, what))
          if (s.range.count > 0) {
            all.push_back({rank, &shard, name, s});
            bytes += s.range.count * program::size_of(s.type);
          }
      };
      if (shard.states == program::kNoBuffer) {
        if (rank == 0) add(What::weights, checkpoint::What::weights);
        continue;
      }
      // One of the ranks that hold the same shard writes it.
      bool first_holder = true;
      const Range mine = range(rank, shard);
      for (int other = 0; other < rank && first_holder; ++other)
        first_holder = range(other, shard).first != mine.first;
      if (!first_holder) continue;
      add(What::master, checkpoint::What::master);
      add(What::m, checkpoint::What::m);
      add(What::v, checkpoint::What::v);
    }
  copy.resize(static_cast<size_t>(bytes));
  std::vector<std::vector<checkpoint::Part>> parts(static_cast<size_t>(prepared_.job.ranks));
  std::byte* to = copy.data();
  for (const Wanted& w : all) {
    const int64_t size = w.stretch.range.count * program::size_of(w.stretch.type);
    machine_.read(w.rank, w.stretch.data, to, size);
    parts[static_cast<size_t>(w.rank)].push_back(
        {w.shard->flat, w.what, w.stretch.type, w.stretch.range.first, {to, static_cast<size_t>(size)}});
    to += size;
  }
  return parts;
}

}  // namespace mop::train
