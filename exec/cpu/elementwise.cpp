#include <cstring>
#include <optional>

#include "exec/cpu/operations.h"
#include "exec/cpu/routing.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {
namespace {

// The bytes of several operands, end to end.
class Bytes {
 public:
  explicit Bytes(std::span<const Operand> operands) : operands_(operands) {}

  // Contiguous bytes from here on; empty: at the end.
  std::span<std::byte> contiguous() {
    while (piece_.empty()) {
      if (runs_ && runs_->contiguous() > 0) {
        const Run run = runs_->next(runs_->contiguous());
        piece_ = {run.data, static_cast<size_t>(run.n * program::size_of(run.type))};
      } else if (next_ < operands_.size()) {
        runs_.emplace(required(operands_, next_++));
      } else {
        break;
      }
    }
    return piece_;
  }
  void skip(size_t n) { piece_ = piece_.subspan(n); }

 private:
  std::span<const Operand> operands_;
  size_t next_ = 0;
  std::optional<Runs> runs_;
  std::span<std::byte> piece_;
};

}  // namespace

void add(const Call& call) {
  const Operand &a = required(call.in, 0), &c = required(call.out, 0);
  const Operand b = optional(call.in, 1);
  const bool accumulate = call.op->does.accumulate;
  Piece x, y;
  if (!b) {
    for_each_piece(
        [&](const Run& from, const Run& to) {
          load(from, x.data());
          store(x.data(), to, accumulate);
        },
        a, c);
    return;
  }
  for_each_piece(
      [&](const Run& left, const Run& right, const Run& to) {
        load(left, x.data());
        load(right, y.data());
        for (size_t i = 0; i < static_cast<size_t>(to.n); ++i) x[i] += y[i];
        store(x.data(), to, accumulate);
      },
      a, b, c);
}

void sum_replicas(const Call& call) {
  const Operand &x = required(call.in, 0), &y = required(call.out, 0);
  const int64_t replicas = call.op->does.a, width = call.op->does.b;
  ensure(x.view.cols == y.view.cols * replicas && y.view.cols % width == 0 && rows(x) == rows(y),
         "every head has as many replicas");
  Piece sum, part;
  for (int64_t r = 0; r < rows(y); ++r) {
    const Run from = row(x, r), to = row(y, r);
    for (int64_t head = 0; head < to.n / width; ++head) {
      for (int64_t at = 0; at < width; at += kPiece) {
        const int64_t n = std::min(kPiece, width - at);
        sum.fill(0);
        for (int64_t replica = 0; replica < replicas; ++replica) {
          load(from.part((head * replicas + replica) * width + at, n), part.data());
          for (size_t i = 0; i < static_cast<size_t>(n); ++i) sum[i] += part[i];
        }
        store(sum.data(), to.part(head * width + at, n));
      }
    }
  }
}

void copy(const Call& call) {
  for_each_piece(convert, required(call.in, 0), required(call.out, 0));
}

void clear(const Call& call) {
  for_each_piece([](const Run& run) { clear(run); }, required(call.out, 0));
}

void scale(const Call& call) {
  const float factor = static_cast<float>(scalar(required(call.in, 1)));
  Piece x;
  for_each_piece(
      [&](const Run& from, const Run& to) {
        load(from, x.data());
        for (size_t i = 0; i < static_cast<size_t>(from.n); ++i) x[i] *= factor;
        store(x.data(), to);
      },
      required(call.in, 0), required(call.out, 0));
}

void square_sum(const Call& call) {
  const int64_t replicas = call.op->does.a;
  ensure(replicas >= 1, "somebody holds what is summed");
  double sum = 0;
  Piece x;
  for_each_piece(
      [&](const Run& run) {
        load(run, x.data());
        for (size_t i = 0; i < static_cast<size_t>(run.n); ++i) sum += static_cast<double>(x[i]) * x[i];
      },
      required(call.in, 0));
  set_scalar(required(call.out, 0), sum / static_cast<double>(replicas), call.op->does.accumulate);
}

// Everything read, end to end, is everything written.
void copy_bytes(const Call& call) {
  Bytes from(call.in), to(call.out);
  while (true) {
    const std::span<std::byte> source = from.contiguous(), target = to.contiguous();
    const size_t n = std::min(source.size(), target.size());
    if (n == 0) break;
    std::memcpy(target.data(), source.data(), n);
    from.skip(n);
    to.skip(n);
  }
  ensure(from.contiguous().empty() && to.contiguous().empty(), "as many bytes are written as are read");
}

}  // namespace mop::cpu
