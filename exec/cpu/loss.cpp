// Cross entropy over a block of the vocabulary's columns: per row (maximum, sum of exp(logit - maximum), the
// target's logit); the statistics of blocks merge into those of the whole.
#include <fmt/core.h>

#include <cmath>

#include "exec/cpu/operations.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {
namespace {

struct Statistics {
  double highest = -std::numeric_limits<double>::infinity(), sum = 0, target = 0;

  void merge(const Statistics& other) {
    target += other.target;
    if (other.sum == 0) return;  // no columns
    const double now = std::max(highest, other.highest);
    sum = sum * std::exp(highest - now) + other.sum * std::exp(other.highest - now);
    highest = now;
  }
  double log_sum() const { return highest + std::log(sum); }
};

Statistics load_statistics(const Run& run) {
  std::array<float, 3> values;
  load(run, values.data());
  return {values[0], values[1], values[2]};
}

// Columns that the block of this call has of the vocabulary.
struct Block {
  int64_t first, columns;
  Block(const Call& call, const Operand& logits, const Constants& constants) {
    const int64_t block = ((call.index - call.op->does.a) % call.size + call.size) % call.size;
    first = block * logits.view.cols;
    columns = std::clamp<int64_t>(constants.model.vocab - first, 0, logits.view.cols);
  }
};

// The target of row r of the logits.
int64_t target_of(const Operand& targets, int64_t r, int64_t vocab) {
  const int64_t cols = targets.view.cols;
  const Run run = row(targets, r / cols).part(r % cols, 1);
  const int64_t target = *reinterpret_cast<const int32_t*>(run.data);
  if (target != kNoTarget && (target < 0 || target >= vocab)) {
    throw UserError(
        fmt::format("target {} at position {} is beyond the vocabulary of {}: tokenize the data "
                    "with the tokenizer of this model",
                    target, r, vocab));
  }
  return target;
}

void check(const Operand& logits, const Operand& statistics, const Operand& targets) {
  ensure(rows(logits) == targets.view.elements() && statistics.view.rows == rows(logits) &&
             statistics.view.cols == 3 && targets.view.type == Type::i32,
         "every row of the logits has a target and statistics");
}

}  // namespace

void cross_entropy(const Call& call, const Constants& constants) {
  const Operand &logits = required(call.in, 0), &targets = required(call.in, 1),
                &statistics = required(call.out, 0);
  check(logits, statistics, targets);
  const Block block(call, logits, constants);
  Piece piece;
  for (int64_t r = 0; r < rows(logits); ++r) {
    const Run values = row(logits, r);
    Statistics all;
    for (int64_t at = 0; at < block.columns; at += kPiece) {
      const int64_t n = std::min(kPiece, block.columns - at);
      load(values.part(at, n), piece.data());
      Statistics part{*std::max_element(piece.data(), piece.data() + n)};
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) part.sum += std::exp(piece[i] - part.highest);
      all.merge(part);
    }
    const int64_t target = target_of(targets, r, constants.model.vocab);
    if (target >= block.first && target < block.first + block.columns) {
      float logit = 0;
      load(values.part(target - block.first, 1), &logit);
      all.target = logit;
    }
    const Run run = row(statistics, r);
    if (call.op->does.accumulate) all.merge(load_statistics(run));
    const std::array<float, 3> result{static_cast<float>(all.highest), static_cast<float>(all.sum),
                                      static_cast<float>(all.target)};
    store(result.data(), run);
  }
}

void cross_entropy_bwd(const Call& call, const Constants& constants) {
  const Operand &logits = required(call.in, 0), &statistics = required(call.in, 1),
                &targets = required(call.in, 2), &gradient = required(call.out, 0);
  const Operand loss = optional(call.out, 1);
  const double valid = scalar(required(call.in, 3));
  check(logits, statistics, targets);
  const Block block(call, logits, constants);
  const int64_t counted = targets.view.cols;
  const int64_t first = call.op->does.c != 0 ? call.index * counted : 0;
  const int64_t last = call.op->does.c != 0 ? first + counted : rows(logits);
  double losses = 0;
  Piece piece;
  for (int64_t r = 0; r < rows(logits); ++r) {
    const Run from = row(logits, r), to = row(gradient, r);
    const int64_t target = target_of(targets, r, constants.model.vocab);
    if (target == kNoTarget) {
      clear(to);
      continue;
    }
    Statistics all;
    for (int64_t b = 0; b < statistics.view.count; ++b)
      all.merge(load_statistics(matrix(statistics, b).row(r)));
    const double log_sum = all.log_sum();
    if (r >= first && r < last) losses += log_sum - all.target;
    for (int64_t at = 0; at < block.columns; at += kPiece) {
      const int64_t n = std::min(kPiece, block.columns - at);
      load(from.part(at, n), piece.data());
      for (int64_t i = 0; i < n; ++i) {
        float& value = piece[static_cast<size_t>(i)];
        const double one_hot = block.first + at + i == target ? 1 : 0;
        value = static_cast<float>((std::exp(value - log_sum) - one_hot) / valid);
      }
      store(piece.data(), to.part(at, n));
    }
    clear(to.part(block.columns, to.n - block.columns));
  }
  // Without any target in the step there is no loss either.
  if (loss) set_scalar(loss, losses == 0 ? 0 : losses / valid, call.op->does.accumulate);
}

}  // namespace mop::cpu
