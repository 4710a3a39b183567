// Collectives: every rank reads what it needs from its peers' operands.
#include <algorithm>
#include <cstddef>

#include "exec/cpu/routing.h"
#include "sim/base/integer.h"

namespace mop::cpu {
namespace {

using Wide = std::array<double, kPiece>;

Run as_run(Wide& values, int64_t n) {
  return {reinterpret_cast<std::byte*>(values.data()), n, Type::f64};
}

const Operand& input(const Meeting& meeting, int64_t rank, size_t i) {
  return required(meeting.calls()[static_cast<size_t>(rank)]->in, i);
}

// A walk over an operand from its element `first` on.
Runs walk_from(const Operand& operand, int64_t first) {
  ensure(first <= operand.view.elements(), "a collective's operands are as long as the group makes them");
  Runs walk(operand);
  while (first > 0) first -= walk.next(std::min(first, walk.contiguous())).n;
  return walk;
}

// The next n elements of both.
void copy_elements(Runs& from, Runs& to, int64_t n) {
  while (n > 0) {
    const int64_t part = std::min({n, from.contiguous(), to.contiguous()});
    ensure(part > 0, "a collective's operands are as long as the group makes them");
    const Run source = from.next(part), target = to.next(part);
    if (source.data != target.data) convert(source, target);  // a rank's own part may be in place
    n -= part;
  }
}

// to [to_first, + n) = the sum, in order of the ranks, of the elements [first, + n) of everyone's first
// operand; with accumulate, added to it.
void sum_elements(const Meeting& meeting, int64_t first, int64_t n, const Operand& to, int64_t to_first,
                  bool accumulate) {
  Wide sum, next;
  Runs target = walk_from(to, to_first);
  for (int64_t done = 0; done < n;) {
    const int64_t part = std::min({kPiece, n - done, target.contiguous()});
    ensure(part > 0, "a sum has a place");
    for (size_t rank = 0; rank < meeting.calls().size(); ++rank) {
      Runs source = walk_from(input(meeting, static_cast<int64_t>(rank), 0), first + done);
      for (int64_t at = 0; at < part;) {
        const int64_t run = std::min(part - at, source.contiguous());
        ensure(run > 0, "everyone's operand of a sum has one size");
        Run wide = as_run(next, part).part(at, run);
        convert(source.next(run), wide);
        at += run;
      }
      for (size_t i = 0; i < static_cast<size_t>(part); ++i) sum[i] = rank == 0 ? next[i] : sum[i] + next[i];
    }
    const Run out = target.next(part);
    if (accumulate) {
      convert(out, as_run(next, part));
      for (size_t i = 0; i < static_cast<size_t>(part); ++i) sum[i] = next[i] + sum[i];
    }
    convert(as_run(sum, part), out);
    done += part;
  }
}

void all_gather(const Call& call, const Meeting& meeting) {
  const Operand& y = required(call.out, 0);
  const int64_t n = required(call.in, 0).view.elements();
  ensure(y.view.elements() == n * call.size, "an all-gather writes everyone's part");
  Runs to(y);
  for (int rank = 0; rank < call.size; ++rank) {
    Runs from(input(meeting, rank, 0));
    copy_elements(from, to, n);
  }
}

void reduce_scatter(const Call& call, const Meeting& meeting) {
  const Operand& y = required(call.out, 0);
  const int64_t n = y.view.elements();
  ensure(required(call.in, 0).view.elements() == n * call.size, "a reduce-scatter reads a part for everyone");
  sum_elements(meeting, call.index * n, n, y, 0, call.op->does.accumulate);
}

// Each rank sums a part in place, where nobody else reads it any more; then all copy the others' parts.
void all_reduce(const Call& call, Meeting& meeting) {
  const Operand& x = required(call.out, 0);
  ensure(x.data == required(call.in, 0).data, "an all-reduce is in place");
  const int64_t n = x.view.elements();
  const auto part = [&](int rank) { return n * rank / call.size; };
  sum_elements(meeting, part(call.index), part(call.index + 1) - part(call.index), x, part(call.index),
               false);
  meeting.barrier();
  for (int rank = 0; rank < call.size; ++rank) {
    if (rank == call.index) continue;
    Runs from = walk_from(input(meeting, rank, 0), part(rank)), to = walk_from(x, part(rank));
    copy_elements(from, to, part(rank + 1) - part(rank));
  }
}

void send_recv(const Call& call, const Meeting& meeting) {
  const Operand& y = required(call.out, 0);
  Runs from(input(meeting, (call.index + call.size - 1) % call.size, 0)), to(y);
  copy_elements(from, to, y.view.elements());
}

// The column block of a rank: where there are fewer than ranks, each goes to as many of them; blocks that
// padding left without a column follow the others.
int64_t block_of(int64_t rank, int64_t size, int64_t blocks) {
  return size % blocks == 0 ? rank * blocks / size : rank;
}

void columns_to_rows(const Call& call, const Meeting& meeting, size_t i) {
  const Operand& y = required(call.out, i);
  const int64_t c = y.view.cols;
  for (int rank = 0; rank < call.size; ++rank) {
    const Operand& x = input(meeting, rank, i);
    const int64_t n = rows(x), blocks = ceil_div(x.view.cols, c);
    ensure(rows(y) == call.size * n && blocks <= call.size, "everyone's rows and a block of columns fit");
    const int64_t first = block_of(call.index, call.size, blocks) * c;
    const int64_t width = std::clamp<int64_t>(x.view.cols - first, 0, c);
    for (int64_t r = 0; r < n; ++r) {
      const Run to = row(y, rank * n + r);
      if (width > 0) convert(row(x, r).part(first, width), to.part(0, width));
      clear(to.part(width, c - width));
    }
  }
}

void rows_to_columns(const Call& call, const Meeting& meeting, size_t i) {
  const Operand& y = required(call.out, i);
  const int64_t n = rows(y);
  for (int rank = 0; rank < call.size; ++rank) {
    const Operand& x = input(meeting, rank, i);
    const int64_t c = x.view.cols, first = rank * c, width = std::clamp<int64_t>(y.view.cols - first, 0, c);
    ensure(rows(x) == call.size * n && y.view.cols <= call.size * c,
           "everyone's columns cover a rank's rows");
    for (int64_t r = 0; r < n && width > 0; ++r)
      convert(row(x, call.index * n + r).part(0, width), row(y, r).part(first, width));
  }
}

// Rows [first, + n) of every matrix after the rounds of `peer` become rows from `to` on of this rank's.
void copy_routed_rows(const Call& call, const Meeting& meeting, int peer, int64_t first, int64_t to,
                      int64_t n) {
  for (size_t i = 0; i < call.out.size(); ++i) {
    const Operand &x = input(meeting, peer, i + 1), &y = required(call.out, i);
    for (int64_t r = 0; r < n; ++r) convert(routed_row(x, first + r), routed_row(y, to + r));
  }
}

void dispatch(const Call& call, const Meeting& meeting, const plan::RoundPlan& plan) {
  const int round = static_cast<int>(call.round);
  PerRank scratch, before_pair;  // rows that a source sends to lower ranks
  for (int source = 0; source < call.size; ++source) {
    before_pair[source] = 0;
    for (int d = 0; d < call.index; ++d) before_pair[source] += plan.rows_between(round, source, d);
  }
  int64_t to = 0;
  plan.for_each_computed(round, call.index, scratch, [&](size_t, const plan::Flow& flow, int64_t before) {
    copy_routed_rows(call, meeting, flow.source, before_pair[flow.source] + before, to, flow.rows());
    to += flow.rows();
  });
}

void combine(const Call& call, const Meeting& meeting, const plan::RoundPlan& plan) {
  const int round = static_cast<int>(call.round);
  PerRank scratch;
  int64_t before_pair = 0;  // rows that this rank sent to lower ranks
  for (int peer = 0; peer < call.size; ++peer) {
    int64_t first = 0;
    plan.for_each_computed(round, peer, scratch, [&](size_t, const plan::Flow& flow, int64_t before) {
      if (flow.source == call.index)
        copy_routed_rows(call, meeting, peer, first, before_pair + before, flow.rows());
      first += flow.rows();
    });
    before_pair += plan.rows_between(round, call.index, peer);
  }
}

// f(transfer, slot) for each expert that `borrower` holds in the pass.
template <class F>
void for_each_borrowed(const plan::RoundPlan& plan, int pass, int borrower, F&& f) {
  int64_t slot = 0;
  for (const plan::WeightTransfer& t : plan.transfers(pass))
    if (t.to == borrower) f(t, slot++);
}

Operand expert(const Operand& all, int64_t index) {
  ensure(index < all.view.count, "a rank holds its experts, and a pass fits into the slots");
  Operand one = all;
  one.data = matrix(all, index).data;
  one.view.count = 1;
  return one;
}

void spill_weights(const Call& call, const Meeting& meeting, const plan::RoundPlan& plan) {
  const int own = plan.counts().experts() / call.size;
  const Operand& slots = required(call.out, 0);
  const int pass = plan.pass_of(static_cast<int>(call.round));
  for_each_borrowed(plan, pass, call.index, [&](const plan::WeightTransfer& t, int64_t slot) {
    for_each_piece(convert, expert(input(meeting, t.from, 1), t.expert - t.from * own), expert(slots, slot));
  });
}

// Through no staging: the borrowers' slots are at hand.
void spill_gradients(const Call& call, const Meeting& meeting, const plan::RoundPlan& plan) {
  const int own = plan.counts().experts() / call.size;
  const Operand& gradients = required(call.out, 1);
  const int pass = plan.pass_of(static_cast<int>(call.round));
  Piece piece;
  for (int borrower = 0; borrower < call.size; ++borrower) {
    for_each_borrowed(plan, pass, borrower, [&](const plan::WeightTransfer& t, int64_t slot) {
      if (t.from != call.index) return;
      for_each_piece(
          [&](const Run& from, const Run& to) {
            load(from, piece.data());
            add(piece.data(), to);
          },
          expert(input(meeting, borrower, 1), slot), expert(gradients, t.expert - t.from * own));
    });
  }
}

void all_to_all(const Call& call, const Meeting& meeting) {
  using program::Exchange;
  const Exchange exchange = call.op->does.exchange;
  if (exchange == Exchange::columns_to_rows || exchange == Exchange::rows_to_columns) {
    for (size_t i = 0; i < call.out.size(); ++i)
      exchange == Exchange::columns_to_rows ? columns_to_rows(call, meeting, i)
                                            : rows_to_columns(call, meeting, i);
    return;
  }
  const plan::RoundPlan& plan = round_plan(required(call.in, 0));
  ensure(plan.counts().ranks() == call.size, "rounds are the group's");
  if (!acts(call, plan)) return;
  switch (exchange) {
    case Exchange::dispatch:
      return dispatch(call, meeting, plan);
    case Exchange::combine:
      return combine(call, meeting, plan);
    case Exchange::spill_weights:
      return spill_weights(call, meeting, plan);
    case Exchange::spill_gradients:
      return spill_gradients(call, meeting, plan);
    default:
      ensure(false, "an all-to-all says what it exchanges");
  }
}

}  // namespace

void run_collective(const Call& call, Meeting& meeting, Workspace&) {
  using program::OpKind;
  ensure(std::ssize(meeting.calls()) == call.size, "the whole group meets");
  switch (call.op->kind) {
    case OpKind::all_gather:
      all_gather(call, meeting);
      break;
    case OpKind::reduce_scatter:
      reduce_scatter(call, meeting);
      break;
    case OpKind::all_reduce:
      all_reduce(call, meeting);
      break;
    case OpKind::send_recv:
      send_recv(call, meeting);
      break;
    case OpKind::all_to_all:
      all_to_all(call, meeting);
      break;
    default:
      ensure(false, "an operation is one of the collectives");
  }
  meeting.barrier();
}

}  // namespace mop::cpu
