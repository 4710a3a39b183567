// Parameters, gradients and optimizer states in the ranks' arenas, by name: filled from weights or a
// checkpoint, read as whole parameters, listed for a checkpoint. Each process does it for its own ranks.
#pragma once
#include <functional>
#include <initializer_list>
#include <map>
#include <span>
#include <vector>

#include "exec/checkpoint/write.h"
#include "exec/train/machine.h"

namespace mop::train {

enum class What : uint8_t { weights, gradient, master, m, v };  // gradient: reduced, before clipping

// Elements of a parameter: rows [row, row + rows), columns [col, col + cols) to out, ld from row to row.
// Called from several threads at once.
using Read = std::function<void(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols,
                                float* out, int64_t ld)>;

class Shards {
 public:
  // Both outlive this.
  Shards(const Prepared& prepared, Machine& machine);

  // Between steps, nothing deferred. Padding becomes zero.
  void fill_weights(const Read& read);  // master copies, too
  void fill(What what, const Read& read);

  // A whole parameter, rows end to end. Collective over the machine's peers: the first of them gets it, the
  // others' `out` is not touched.
  void read(model::ParameterId id, What what, float* out) const;

  // What a checkpoint holds of each rank of this process: master, m and v, and the weights that no optimizer
  // has. The parts point into `copy`, which becomes as large as it must.
  std::vector<std::vector<checkpoint::Part>> copy_state(std::vector<std::byte>& copy) const;

 private:
  struct Range {
    int64_t first = 0, count = 0;  // elements of the flat group
  };
  // A stretch of a shard that lies in one piece in memory: elements [first, first + count) of the group. low:
  // of a master that is kept in two parts, `data` being its bf16 weights.
  struct Stretch {
    Range range;
    std::byte* data = nullptr;
    program::Type type = program::Type::f32;
    std::byte* low = nullptr;
    program::Type read_as() const { return low == nullptr ? type : program::Type::f32; }
  };
  using Placed = std::pair<const program::Shard*, program::Piece>;
  Range range(int rank, const program::Shard& shard) const;
  std::vector<Stretch> stretches(int rank, const program::Shard& shard, What what) const;
  // Elements [at, at + count) of it, as they are read.
  void read_stretch(int rank, const Stretch& stretch, int64_t at, int64_t count, std::byte* to) const;
  void release();
  // The same values to each of `whats`.
  void fill_shard(int rank, const program::Shard& shard, std::initializer_list<What> whats, const Read& read);

  const Prepared& prepared_;
  Machine& machine_;
  std::map<model::ParameterId, std::vector<Placed>> places_;
  // Of a shard on its way: as large as the largest so far, since fresh pages cost more than the work on them.
  std::vector<std::byte> stored_;
};

}  // namespace mop::train
