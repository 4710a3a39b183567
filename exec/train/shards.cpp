#include "exec/train/shards.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "exec/host/workers.h"
#include "exec/weights/convert.h"
#include "sim/base/error.h"

namespace mop::train {

using program::Shard;
using program::Type;

namespace {

// Calls visit(row, rows, first column, columns, first element) for every block of a piece inside [first,
// last) of its group: whole rows together, what is cut by itself.
template <typename Visit>
void blocks_inside(const program::Piece& piece, int64_t first, int64_t last, Visit visit) {
  if (last <= piece.offset) return;
  const int64_t end = std::min(piece.rows, (last - piece.offset + piece.ld - 1) / piece.ld);
  for (int64_t r = std::max<int64_t>(0, (first - piece.offset) / piece.ld), rows = 1; r < end; r += rows) {
    const int64_t begin = piece.offset + r * piece.ld;
    const int64_t from = std::max(begin, first), to = std::min(begin + piece.cols, last);
    const bool whole = from == begin && to == begin + piece.cols;
    rows = whole ? std::min(end - r, (last - begin - piece.cols) / piece.ld + 1) : 1;
    if (from < to) visit(r, rows, from - begin, to - from, from);
  }
}

// The same row by row: visit(row, first column, columns, first element).
template <typename Visit>
void rows_inside(const program::Piece& piece, int64_t first, int64_t last, Visit visit) {
  blocks_inside(piece, first, last, [&](int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t at) {
    for (int64_t r = 0; r < rows; ++r) visit(row + r, col, cols, at + r * piece.ld);
  });
}

// body(i) for i < n on the cores that this process may use. Errors: the first of any.
void parallel_for(size_t n, const std::function<void(size_t)>& body) {
  const size_t threads = std::clamp<size_t>(n, 1, std::max<size_t>(1, host::cores_of_process().size()));
  std::atomic<size_t> next = 0;
  std::exception_ptr first;
  std::mutex mutex;
  const auto work = [&] {
    try {
      for (size_t i = next++; i < n; i = next++) body(i);
    } catch (...) {
      next = n;
      const std::lock_guard lock(mutex);
      if (!first) first = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    for (size_t t = 1; t < threads; ++t) others.emplace_back(work);
    work();
  }
  if (first) std::rethrow_exception(first);
}

// Work is cut to a size that many threads can share evenly, and that stays in the cache of each.
constexpr int64_t kElements = int64_t{1} << 18;

// body(first element, how many), in parallel.
void in_blocks(int64_t elements, const std::function<void(int64_t first, int64_t count)>& body) {
  parallel_for(static_cast<size_t>((elements + kElements - 1) / kElements), [&](size_t i) {
    const int64_t first = static_cast<int64_t>(i) * kElements;
    body(first, std::min(kElements, elements - first));
  });
}

constexpr int64_t kLow = sizeof(uint16_t);  // of the low bits of a master

weights::Type stored_as(Type type) {
  return type == Type::f32 ? weights::Type::f32 : weights::Type::bf16;
}

}  // namespace

Shards::Shards(const Prepared& prepared, Machine& machine) : prepared_(prepared), machine_(machine) {
  for (const Shard& shard : prepared.program.shards)
    for (const program::Piece& piece : prepared.parameters.pieces(shard.flat))
      places_[piece.parameter].emplace_back(&shard, piece);
}

Shards::Range Shards::range(int rank, const Shard& shard) const {
  const int64_t outer = shard.outer.index(rank) * shard.outer_elements;
  const int64_t end =
      shard.outer_elements > 0 ? outer + shard.outer_elements : prepared_.parameters.elements(shard.flat);
  const int64_t first = std::min(end, outer + shard.inner.index(rank) * shard.elements);
  return {first, std::min(shard.elements, end - first)};
}

std::vector<Shards::Stretch> Shards::stretches(int rank, const Shard& shard, What what) const {
  const interpreter::Memory& memory = machine_.memory(rank);
  const Range all = range(rank, shard);
  const auto whole = [&](program::BufferId buffer, Type type) {
    return std::vector<Stretch>{{all, memory.at(buffer, 0), type}};
  };
  if (what == What::weights) return whole(shard.weights, shard.weights_type);
  if (shard.states.empty()) return {};
  if (what == What::gradient) return whole(shard.gradient, shard.gradient_type);
  if (what == What::master && shard.master == program::Master::weights)
    return whole(shard.weights, shard.weights_type);
  const int64_t bytes = program::size_of(Type::f32), m = shard.master == program::Master::states ? 1 : 0;
  const int64_t place = what == What::v ? m + 1 : what == What::m ? m : 0;
  std::vector<Stretch> parts;
  for (int64_t done = 0; done < all.count;) {
    const int64_t at = shard.states_first + done, block = at / shard.states_bucket,
                  inner = at % shard.states_bucket;
    const int64_t count = std::min(all.count - done, shard.states_bucket - inner);
    std::byte* const begin = memory.at(shard.states[static_cast<size_t>(block)], 0);
    if (what == What::master && shard.master == program::Master::low)
      parts.push_back({{all.first + done, count},
                       memory.at(shard.weights, 0) + done * program::size_of(shard.weights_type),
                       shard.weights_type,
                       begin + 2 * shard.states_bucket * bytes + inner * kLow});
    else
      parts.push_back(
          {{all.first + done, count}, begin + (place * shard.states_bucket + inner) * bytes, Type::f32});
    done += count;
  }
  return parts;
}

void Shards::fill_shard(int rank, const Shard& shard, std::initializer_list<What> whats, const Read& read) {
  const Range all = range(rank, shard);
  struct Way {  // of the values into memory: as they are stored, then
    std::vector<Stretch> stretches;
    int64_t element = 0, stored = 0;
  };
  std::vector<Way> ways;
  int64_t bytes = 0;
  for (const What what : whats) {
    Way way{stretches(rank, shard, what), 0, bytes};
    if (way.stretches.empty()) continue;
    way.element = way.stretches[0].low != nullptr ? kLow : program::size_of(way.stretches[0].type);
    bytes += all.count * way.element;
    ways.push_back(std::move(way));
  }
  if (std::ssize(stored_) < bytes) stored_.resize(static_cast<size_t>(bytes));
  const std::vector<program::Piece> pieces = prepared_.parameters.pieces(shard.flat);
  const bool settles = shard.weights_type == Type::bf16 && !shard.states.empty() &&
                       std::ranges::find(whats, What::master) != whats.end();
  // Values stay in a core's cache from where they come from to what is stored.
  in_blocks(all.count, [&](int64_t begin, int64_t some) {
    const int64_t first = all.first + begin, last = first + some;
    std::vector<float> values(static_cast<size_t>(some));
    for (const program::Piece& piece : pieces)
      blocks_inside(piece, first, last,
                    [&](int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t at) {
                      read(piece.parameter, piece.row + row, piece.col + col, rows, cols,
                           &values[static_cast<size_t>(at - first)], piece.ld);
                    });
    if (settles)
      for (float& value : values)
        value = std::bit_cast<float>(program::settled(std::bit_cast<uint32_t>(value)));
    for (const Way& way : ways)
      for (const Stretch& stretch : way.stretches) {
        const int64_t from = std::max(first, stretch.range.first),
                      to = std::min(last, stretch.range.first + stretch.range.count);
        if (from >= to) continue;
        std::byte* const out = stored_.data() + way.stored + (from - all.first) * way.element;
        const float* const in = &values[static_cast<size_t>(from - first)];
        if (stretch.low == nullptr) {
          weights::from_float(stored_as(stretch.type), in, to - from, out);
          continue;
        }
        for (int64_t i = 0; i < to - from; ++i) {
          const uint16_t bits = program::low_part(std::bit_cast<uint32_t>(in[i]));
          std::memcpy(out + i * kLow, &bits, kLow);
        }
      }
  });
  for (const Way& way : ways)
    for (const Stretch& stretch : way.stretches)
      machine_.write(rank, stretch.low != nullptr ? stretch.low : stretch.data,
                     stored_.data() + way.stored + (stretch.range.first - all.first) * way.element,
                     stretch.range.count * way.element);
}

void Shards::fill_weights(const Read& read) {
  for (const int rank : machine_.ranks())
    for (const Shard& shard : prepared_.program.shards)
      if (!shard.states.empty() && shard.master != program::Master::weights)
        fill_shard(rank, shard, {What::weights, What::master}, read);
      else
        fill_shard(rank, shard, {What::weights}, read);
  release();
}

void Shards::read_stretch(int rank, const Stretch& stretch, int64_t at, int64_t count, std::byte* to) const {
  const int64_t element = program::size_of(stretch.type);
  if (stretch.low == nullptr) return machine_.read(rank, stretch.data + at * element, to, count * element);
  std::vector<std::byte> high(static_cast<size_t>(count * element)), low(static_cast<size_t>(count * kLow));
  machine_.read(rank, stretch.data + at * element, high.data(), count * element);
  machine_.read(rank, stretch.low + at * kLow, low.data(), count * kLow);
  in_blocks(count, [&](int64_t begin, int64_t some) {
    for (int64_t i = begin; i < begin + some; ++i) {
      uint16_t h = 0, l = 0;
      std::memcpy(&h, high.data() + i * element, sizeof h);
      std::memcpy(&l, low.data() + i * kLow, sizeof l);
      const uint32_t whole = program::whole(h, l);
      std::memcpy(to + i * static_cast<int64_t>(sizeof whole), &whole, sizeof whole);
    }
  });
}

void Shards::fill(What what, const Read& read) {
  for (const int rank : machine_.ranks())
    for (const Shard& shard : prepared_.program.shards)
      if (!shard.states.empty()) fill_shard(rank, shard, {what}, read);
  release();
}

void Shards::release() {
  stored_ = {};
}

void Shards::read(model::ParameterId id, What what, float* out) const {
  // Of the ranks of this process: runs of elements, each behind where it belongs and how long it is.
  const model::MatrixShape shape = model::shape(prepared_.job.model, id);
  std::vector<bool> found(static_cast<size_t>(shape.rows * shape.cols), false);
  std::vector<std::byte> held;
  std::vector<float> values;
  std::vector<std::array<int64_t, 2>> runs;
  for (const auto& [shard, piece] : places_.at(id))
    for (const int rank : machine_.ranks())
      for (const Stretch& stretch : stretches(rank, *shard, what)) {
        const int64_t element = program::size_of(stretch.read_as());
        rows_inside(piece, stretch.range.first, stretch.range.first + stretch.range.count,
                    [&, &where = piece](int64_t row, int64_t col, int64_t count, int64_t at) {
                      const int64_t to = (where.row + row) * shape.cols + where.col + col;
                      if (found[static_cast<size_t>(to)]) return;  // a replica
                      held.resize(static_cast<size_t>(count * element));
                      read_stretch(rank, stretch, at - stretch.range.first, count, held.data());
                      values.resize(values.size() + static_cast<size_t>(count));
                      weights::to_float(stored_as(stretch.read_as()), held.data(), 1, count,
                                        values.data() + values.size() - count, 1);
                      runs.push_back({to, count});
                      std::fill_n(found.begin() + to, count, true);
                    });
      }
  launch::Peers& peers = machine_.peers();
  const auto bytes = [](const auto& all) { return std::as_bytes(std::span(all)); };
  const std::vector<std::vector<std::byte>> all_runs = peers.gather(bytes(runs)),
                                            all_values = peers.gather(bytes(values));
  if (peers.rank() != 0) return;
  for (size_t peer = 0; peer < all_runs.size(); ++peer) {
    const std::byte* from = all_values[peer].data();
    for (size_t at = 0; at < all_runs[peer].size(); at += sizeof(std::array<int64_t, 2>)) {
      std::array<int64_t, 2> run;
      std::memcpy(&run, all_runs[peer].data() + at, sizeof run);
      std::memcpy(out + run[0], from, static_cast<size_t>(run[1]) * sizeof(float));
      std::fill_n(found.begin() + run[0], run[1], true);
      from += static_cast<size_t>(run[1]) * sizeof(float);
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
  const auto own = machine_.ranks();
  for (const int rank : own)
    for (const Shard& shard : prepared_.program.shards) {
      const auto add = [&](What what, checkpoint::What name) {
        for (const Stretch& s : stretches(rank, shard, what))
          if (s.range.count > 0) {
            all.push_back({rank, &shard, name, s});
            bytes += s.range.count * program::size_of(s.read_as());
          }
      };
      if (shard.states.empty()) {
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
  std::vector<std::vector<checkpoint::Part>> parts(own.size());
  std::byte* to = copy.data();
  for (const Wanted& w : all) {
    const int64_t size = w.stretch.range.count * program::size_of(w.stretch.read_as());
    read_stretch(w.rank, w.stretch, 0, w.stretch.range.count, to);
    parts[static_cast<size_t>(w.rank - own.front())].push_back(
        {w.shard->flat, w.what, w.stretch.read_as(), w.stretch.range.first, {to, static_cast<size_t>(size)}});
    to += size;
  }
  return parts;
}

}  // namespace mop::train
