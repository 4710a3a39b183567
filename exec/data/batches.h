// One rank's part of every micro-batch of a step.
#pragma once
#include <cstdint>

#include "exec/data/sequences.h"
#include "exec/interpreter/step.h"

namespace mop::data {

// Which part. The sequences of a micro-batch go to the sequence groups in order, group_sequences to each; a
// group's rows are its sequences end to end, and its ranks have `tokens` of them each, in order.
struct Share {
  int64_t micro_sequences = 1;  // sequences of a micro-batch, over all groups
  int64_t accumulate = 1;       // micro-batches a step
  int64_t group = 0, group_sequences = 1;
  int64_t rank = 0;    // of this rank in its group
  int64_t tokens = 0;  // rows of a rank
};

class Batches final : public interpreter::BatchSource {
 public:
  // The data outlives this. An epoch's last sequences and the next one's first may share a micro-batch.
  Batches(const Sequences& data, const Share& share);

  // The step reads the sequences from `first` on.
  void begin_step(Position first) { first_ = first; }
  Position end_of_step() const { return data_.advance(first_, share_.accumulate * share_.micro_sequences); }

  // starts: rows of the group. Errors: those of Sequences::rows.
  void fill(int64_t micro, const interpreter::Batch& batch) override;

 private:
  const Sequences& data_;
  Share share_;
  Position first_;
};

}  // namespace mop::data
