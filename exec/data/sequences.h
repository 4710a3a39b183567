// What a rank's batches are made of: sequences of `context` tokens in an order that a position runs through.
#pragma once
#include <cstdint>
#include <span>

namespace mop::data {

// The sequence that comes next; what a checkpoint keeps of the data.
struct Position {
  int64_t epoch = 0, sequence = 0;  // sequence: place in the epoch's order
  bool operator==(const Position&) const = default;
};

// Reading is safe from several threads at once, and allocates nothing.
class Sequences {
 public:
  virtual ~Sequences() = default;
  virtual int64_t context() const = 0;
  virtual int64_t at(Position position) const = 0;  // index of the sequence at a place of an epoch's order
  virtual Position advance(Position position, int64_t sequences) const = 0;  // beyond the end: the next epoch
  // Rows [first, first + ids.size()) of a sequence; `positions` count from the row where their document
  // begins, or from the sequence's first row. Errors: UserError for what the data did wrong.
  virtual void rows(int64_t sequence, int64_t first, std::span<int32_t> ids, std::span<int32_t> targets,
                    std::span<int32_t> positions) const = 0;
  // (context): for each row of a sequence the row where its document begins.
  virtual void starts(int64_t sequence, std::span<int32_t> starts) const = 0;
};

}  // namespace mop::data
