// Routed work and exchanges between GPU ranks. Row counts come from the plan on the host (Rank::rounds), so
// that every launch and message has its exact size.
#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "exec/cpu/routing.h"
#include "exec/cuda/operands.h"
#include "exec/cuda/rank.h"
#include "kernels/activation.h"
#include "kernels/check.h"
#include "kernels/column_sum.h"
#include "kernels/elementwise.h"
#include "kernels/to_host.h"
#include "sim/base/error.h"
#include "sim/program/workspace.h"

namespace mop::cuda {

using kernels::check;
using program::Exchange;
using program::OpKind;

namespace {

ncclDataType_t nccl_type(program::Type type) {
  switch (type) {
    case program::Type::bf16:
      return ncclBfloat16;
    case program::Type::f32:
      return ncclFloat32;
    case program::Type::f64:
      return ncclFloat64;
    case program::Type::i32:
      return ncclInt32;
  }
  return ncclInt8;
}

// A block of columns; ld in elements. By a kernel: the copy engines move such at a third of its rate.
void copy_block(program::Type type, std::byte* to, int64_t to_ld, const std::byte* from, int64_t from_ld,
                int64_t cols, int64_t rows, cudaStream_t stream) {
  kernels::copy({{from, type_of(type), rows, cols, from_ld}, {to, type_of(type), rows, cols, to_ld}}, stream);
}

int64_t element(const Operand& o) {
  return program::size_of(o.view.type);
}

kernels::ExpertMatrices matrices(const Operand& own, const Operand& spilled) {
  kernels::ExpertMatrices m;
  if (own) m.own = own.data, m.ld = own.view.ld, m.stride = own.view.stride;
  if (spilled) m.spilled = spilled.data, m.spilled_stride = spilled.view.stride;
  return m;
}

// The operands of grouped_gemm (ops.h): of a product, and of the gradients of its weights.
struct ExpertProduct {
  kernels::Matrix x;
  kernels::ExpertMatrices weights, bias;
  kernels::Matrix y;
};
ExpertProduct product_of(std::span<const Operand> in, std::span<const Operand> out) {
  return {matrix(in[0]), matrices(in[2], in[3]), matrices(in[4], in[5]), matrix(out[0])};
}
struct ExpertGradients {
  kernels::Matrix a, b;
  kernels::ExpertMatrices weights;
  kernels::Type type;
};
ExpertGradients gradients_of(std::span<const Operand> in, std::span<const Operand> out) {
  return {matrix(in[0]), matrix(in[1]), matrices(out[0], out[1]), type_of(out[0].view.type)};
}

// Of an expert's own or borrowed weights, or their gradients.
std::byte* of_expert(const kernels::ExpertGroup& expert, const Operand& own, const Operand& spilled) {
  const Operand& all = expert.own >= 0 ? own : spilled;
  return all.data + (expert.own >= 0 ? expert.own : expert.slot) * all.view.stride * element(all);
}

// A row for each routed copy: a matrix's, or an element of a vector.
int64_t row_bytes(const Operand& o) {
  return (o.view.rows == 1 ? 1 : o.view.cols) * element(o);
}

}  // namespace

Operand Rank::on_host(const Operand& rounds) const {
  Operand there = rounds;
  const auto begin = reinterpret_cast<uintptr_t>(plans_.at(rounds.data).plan.data());
  there.data = reinterpret_cast<std::byte*>((begin + 63) / 64 * 64);
  return there;
}

const plan::RoundPlan& Rank::round_plan(const Operand& rounds) const {
  return cpu::round_plan(on_host(rounds));
}

int64_t Rank::rows_of_round(const Call& call, const Operand& rounds) const {
  const plan::RoundPlan& plan = round_plan(rounds);
  if (call.round >= plan.rounds()) return 0;
  return plan.rows_received(static_cast<int>(call.round), call.index);
}

std::span<const kernels::ExpertGroup> Rank::expert_groups(const Call& call, const Operand& rounds) {
  groups_.clear();
  cpu::for_each_expert(call, on_host(rounds), [&](int64_t first, int64_t last, int own, int slot) {
    groups_.push_back({static_cast<int32_t>(first), static_cast<int32_t>(last), own, slot});
  });
  return groups_;
}

Rank::GradientGroups Rank::gradient_groups(const Call& call, const Operand& rounds) {
  groups_.clear();
  added_groups_.clear();
  cpu::for_each_expert_gradient(
      call, on_host(rounds), [&](int64_t first, int64_t last, int own, int slot, bool adds) {
        (adds ? added_groups_ : groups_)
            .push_back({static_cast<int32_t>(first), static_cast<int32_t>(last), own, slot});
      });
  return {groups_, added_groups_};
}

// Which kernels the products of a step take depends on its rows, and what is run first in a step is loaded in
// it, behind all that its streams have been given: 1.2 s behind states on their way to the host, on 2 H200s.
void Rank::prepare_experts() {
  std::set<std::array<int64_t, 10>> done;
  for (const program::Op& op : program_.ops) {
    if (op.kind != OpKind::grouped_gemm) continue;
    const std::vector<Operand> operands = operands_of(op);
    const std::span in = std::span(operands).first(reads_of(op)),
                    out = std::span(operands).subspan(in.size());
    std::byte* const work = scratch(op.stream);
    cudaStream_t const stream = streams_[static_cast<size_t>(op.stream)];
    const auto is_new = [&](const kernels::Matrix& a, const kernels::Matrix& c, int64_t ld, bool bias,
                            kernels::Type type) {
      return done
          .insert({op.does.transpose_a, op.does.transpose_b, a.rows, a.cols, a.ld, c.cols, c.ld, ld, bias,
                   static_cast<int64_t>(type)})
          .second;
    };
    if (op.does.transpose_a) {
      const ExpertGradients g = gradients_of(in, out);
      if (is_new(g.a, g.b, g.weights.ld, false, g.type))
        grouped_.prepare_weight_gradient(g.a, g.b, g.weights, g.type, work, stream);
    } else {
      const ExpertProduct p = product_of(in, out);
      if (is_new(p.x, p.y, p.weights.ld, static_cast<bool>(p.bias), p.y.type))
        grouped_.prepare_multiply(p.x, p.weights, op.does.transpose_b, p.bias, p.y, work, stream);
    }
  }
}

// Which of the own routed copies, in the order of sort, make the rows that this rank sends in the round.
std::vector<kernels::Flow>& Rank::sent_flows(const Call& call, const Operand& rounds) {
  const plan::RoundPlan& plan = round_plan(rounds);
  const plan::Counts& counts = plan.counts();
  flows_.clear();
  if (call.round >= plan.rounds()) return flows_;
  // First copy of each expert in the order.
  first_of_expert_.resize(static_cast<size_t>(counts.experts()) + 1);
  int64_t copies = 0;
  for (int e = 0; e < counts.experts(); ++e) {
    first_of_expert_[static_cast<size_t>(e)] = copies;
    copies += counts.at(call.index, e);
  }
  int64_t at = 0;
  plan.for_each_sent(static_cast<int>(call.round), call.index, [&](const plan::Flow& flow) {
    flows_.push_back({static_cast<int32_t>(first_of_expert_[static_cast<size_t>(flow.expert)] + flow.first),
                      static_cast<int32_t>(flow.rows()), static_cast<int32_t>(at)});
    at += flow.rows();
  });
  return flows_;
}

void Rank::run_routed(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const program::Op& op = *call.op;
  std::byte* const work = scratch(op.stream);
  const auto sent = [&](const Operand& order, const Operand& rounds) {
    const std::vector<kernels::Flow>& flows = sent_flows(call, rounds);
    return kernels::SentRows{flows.data(), static_cast<int64_t>(flows.size()), pointer<const int32_t>(order),
                             constants_.model.top_k};
  };
  switch (op.kind) {
    case OpKind::plan_routing:
      // The counts go to the host, which plans in rounds().
      return kernels::to_host(in[0].data, plans_.at(out[0].data).counts, bytes_of(in[0]), stream);
    case OpKind::permute:
      return kernels::permute(
          {sent(in[1], in[2]), matrix(in[0]), matrix(in[3]), in[4] ? pointer<const float>(in[4]) : nullptr,
           matrix(out[0]), matrix(out[1]), out[2] ? pointer<float>(out[2]) : nullptr},
          stream);
    case OpKind::unpermute:
      return kernels::unpermute({sent(in[1], in[2]), matrix(in[0]), pointer<const float>(in[3]),
                                 matrix(out[0]), reinterpret_cast<int32_t*>(work)},
                                stream);
    case OpKind::unpermute_bwd:
      return kernels::unpermute_bwd(
          {sent(in[1], in[2]), matrix(in[0]), pointer<const float>(in[3]), matrix(out[0]),
           pointer<float>(out[1]), reinterpret_cast<int32_t*>(work)},
          stream);
    case OpKind::grouped_gemm: {
      if (op.does.transpose_a) return weight_gradients(call, stream);
      const ExpertProduct p = product_of(in, out);
      return grouped_.multiply(expert_groups(call, in[1]), p.x, p.weights, op.does.transpose_b, p.bias, p.y,
                               work, stream);
    }
    case OpKind::expert_bias_bwd:
      return bias_gradients(call, stream);
    case OpKind::swiglu:
    case OpKind::clamped_swiglu: {
      const int64_t rows = in[1] ? rows_of_round(call, in[1]) : in[0].view.rows;
      return kernels::swiglu({rows_of(in[0], rows), rows_of(out[0], rows), activation_of(op)}, stream);
    }
    case OpKind::swiglu_bwd:
    case OpKind::clamped_swiglu_bwd: {
      if (in.size() < 3)
        return kernels::swiglu_bwd({matrix(in[0]), matrix(in[1]), matrix(out[0]), activation_of(op)}, stream);
      const int64_t rows = rows_of_round(call, in[2]);
      expert_rows_.clear();
      biases_.clear();
      if (in[6])
        for (const kernels::ExpertGroup& g : expert_groups(call, in[2])) {
          expert_rows_.push_back({g.first, g.last - g.first});
          biases_.push_back(of_expert(g, in[6], in[7]));
        }
      return kernels::routed_swiglu_bwd(
          {rows_of(in[0], rows), rows_of(in[1], rows), rows_of(in[4], rows), rows_of(in[5], rows),
           pointer<const float>(in[3]), rows_of(out[0], rows), rows_of(out[1], rows), pointer<float>(out[2]),
           activation_of(op), expert_rows_.data(), biases_.data(), static_cast<int>(biases_.size())},
          stream);
    }
    default:
      ensure(false, "every operation of a program that runs has a kernel");
  }
}

void Rank::weight_gradients(const Call& call, cudaStream_t stream) {
  const ExpertGradients g = gradients_of(call.in, call.out);
  const GradientGroups groups = gradient_groups(call, call.in[2]);
  for (const bool accumulate : {false, true})
    grouped_.weight_gradient(accumulate ? groups.added : groups.written, g.a, g.b, g.weights, g.type,
                             accumulate, scratch(call.op->stream), stream);
}

void Rank::bias_gradients(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const GradientGroups groups = gradient_groups(call, in[1]);
  for (const bool accumulate : {false, true}) {
    expert_rows_.clear();
    d_biases_.clear();
    for (const kernels::ExpertGroup& g : accumulate ? groups.added : groups.written) {
      expert_rows_.push_back({g.first, g.last - g.first});
      d_biases_.push_back(of_expert(g, out[0], out[1]));
    }
    kernels::expert_bias_bwd(
        {matrix(in[0]), in[2] ? pointer<const float>(in[2]) : nullptr, expert_rows_.data(), d_biases_.data(),
         static_cast<int>(expert_rows_.size()), type_of(out[0].view.type), accumulate,
         reinterpret_cast<float*>(scratch(call.op->stream))},
        stream);
  }
}

kernels::Activation Rank::activation_of(const program::Op& op) const {
  if (op.kind == OpKind::swiglu || op.kind == OpKind::swiglu_bwd) return {};
  return {true, static_cast<float>(constants_.model.swiglu_limit),
          static_cast<float>(constants_.model.swiglu_alpha)};
}

void Rank::run_exchange(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const program::Op& op = *call.op;
  const auto count = [](const Operand& o) { return static_cast<size_t>(o.view.elements()); };
  if (peers_->takes(program_, op)) return peers_->run(call, program_.groups[op.group].span(), stream);
  switch (op.kind) {
    case OpKind::all_gather:
      return check(ncclAllGather(in[0].data, out[0].data, count(in[0]), nccl_type(in[0].view.type),
                                 communicators_->of(op), stream),
                   "all-gather");
    case OpKind::all_reduce:
      return check(ncclAllReduce(in[0].data, out[0].data, count(in[0]), nccl_type(in[0].view.type), ncclSum,
                                 communicators_->of(op), stream),
                   "all-reduce");
    case OpKind::reduce_scatter: {
      // NCCL keeps the type; what is wider is converted afterwards.
      const bool direct = program::reduction_workspace(program_, op) == 0;
      std::byte* to = direct ? out[0].data : scratch(op.stream);
      check(ncclReduceScatter(in[0].data, to, count(out[0]), nccl_type(in[0].view.type), ncclSum,
                              communicators_->of(op), stream),
            "reduce-scatter");
      if (direct) return;
      kernels::ConstMatrix from{to, type_of(in[0].view.type), out[0].view.rows, out[0].view.cols,
                                out[0].view.cols};
      return kernels::add({from, {}, matrix(out[0]), op.does.accumulate}, stream);
    }
    case OpKind::send_recv: {
      ncclComm_t comm = communicators_->of(op);
      check(ncclGroupStart(), "send and receive");
      check(ncclSend(in[0].data, count(in[0]), nccl_type(in[0].view.type), (call.index + 1) % call.size, comm,
                     stream),
            "send");
      check(ncclRecv(out[0].data, count(out[0]), nccl_type(out[0].view.type),
                     (call.index + call.size - 1) % call.size, comm, stream),
            "receive");
      return check(ncclGroupEnd(), "send and receive");
    }
    default:
      break;
  }
  switch (op.does.exchange) {
    case Exchange::columns_to_rows:
    case Exchange::rows_to_columns:
      return exchange_columns(call, stream);
    case Exchange::dispatch:
    case Exchange::combine:
      return exchange_rows(call, stream);
    default:
      return exchange_spilled(call, stream);
  }
}

void Rank::exchange_columns(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const bool to_rows = call.op->does.exchange == Exchange::columns_to_rows;
  ncclComm_t comm = communicators_->of(*call.op);
  const int64_t size = call.size;
  // In columns: which block a rank has (ops.h), and how wide it is.
  struct Block {
    int64_t first, width;
  };
  const auto block_of = [&](const Operand& wide, const Operand& narrow, int64_t rank) {
    const int64_t width = narrow.view.cols, blocks = (wide.view.cols + width - 1) / width;
    const int64_t index = size % blocks == 0 && wide.view.cols % width == 0 ? rank * blocks / size : rank;
    const int64_t first = std::min(wide.view.cols, index * width);
    return Block{first, std::min(width, wide.view.cols - first)};
  };
  std::byte* free = scratch(call.op->stream);
  struct Part {
    std::byte* packed;
    int64_t bytes;  // of one rank
  };
  std::array<Part, 8> parts{};
  ensure(in.size() <= parts.size(), "a few matrices travel together");
  for (size_t i = 0; i < in.size(); ++i) {
    const Operand &wide = to_rows ? in[i] : out[i], &narrow = to_rows ? out[i] : in[i];
    const int64_t n = wide.view.rows, width = narrow.view.cols, bytes = n * width * element(wide);
    ensure(narrow.view.dense(), "what stays in rows is one piece");
    parts[i] = {free, bytes};
    free += (size * bytes + 255) / 256 * 256;
    if (!to_rows) continue;
    for (int64_t peer = 0; peer < size; ++peer) {
      const Block b = block_of(wide, narrow, peer);
      std::byte* to = parts[i].packed + peer * bytes;
      if (b.width < width) check(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), stream), "padding");
      copy_block(wide.view.type, to, width, wide.data + b.first * element(wide), wide.view.ld, b.width, n,
                 stream);
    }
  }
  check(ncclGroupStart(), "all-to-all");
  for (size_t i = 0; i < in.size(); ++i) {
    const Part& p = parts[i];
    for (int64_t peer = 0; peer < size; ++peer) {
      const std::byte* send = (to_rows ? p.packed : in[i].data) + peer * p.bytes;
      std::byte* receive = (to_rows ? out[i].data : p.packed) + peer * p.bytes;
      check(ncclSend(send, static_cast<size_t>(p.bytes), ncclInt8, static_cast<int>(peer), comm, stream),
            "send");
      check(ncclRecv(receive, static_cast<size_t>(p.bytes), ncclInt8, static_cast<int>(peer), comm, stream),
            "receive");
    }
  }
  check(ncclGroupEnd(), "all-to-all");
  if (to_rows) return;
  for (size_t i = 0; i < in.size(); ++i) {
    const Operand &wide = out[i], &narrow = in[i];
    const int64_t n = wide.view.rows, width = narrow.view.cols;
    for (int64_t peer = 0; peer < size; ++peer) {
      // The way back fills size x width columns, cut where y is narrower.
      const int64_t first = std::min(wide.view.cols, peer * width),
                    w = std::min(width, wide.view.cols - first);
      copy_block(wide.view.type, wide.data + first * element(wide), wide.view.ld,
                 parts[i].packed + peer * parts[i].bytes, width, w, n, stream);
    }
  }
}

// dispatch: rows by destination -> by expert in order of work, then by source; combine: the way back.
void Rank::exchange_rows(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const bool forward = call.op->does.exchange == Exchange::dispatch;
  const plan::RoundPlan& plan = round_plan(in[0]);
  if (call.round >= plan.rounds()) return;
  const int round = static_cast<int>(call.round);
  ncclComm_t comm = communicators_->of(*call.op);
  const int64_t computed = plan.rows_received(round, call.index);
  // Rows that this rank computes, by source: in that order they travel.
  flows_.clear();
  computed_before_.assign(static_cast<size_t>(call.size) + 1, 0);
  for (int source = 0; source < call.size; ++source)
    computed_before_[static_cast<size_t>(source) + 1] =
        computed_before_[static_cast<size_t>(source)] + plan.rows_between(round, source, call.index);
  cpu::PerRank scratch_rows;
  int64_t at = 0;
  plan.for_each_computed(
      round, call.index, scratch_rows, [&](size_t, const plan::Flow& flow, int64_t before) {
        const int64_t travelling = computed_before_[static_cast<size_t>(flow.source)] + before;
        flows_.push_back(
            {static_cast<int32_t>(travelling), static_cast<int32_t>(flow.rows()), static_cast<int32_t>(at)});
        at += flow.rows();
      });
  if (!forward) {  // from the order of work to that of travelling
    for (kernels::Flow& flow : flows_) std::swap(flow.first_in_order, flow.at);
    std::ranges::sort(flows_, {}, &kernels::Flow::at);
  }
  const kernels::SentRows order{flows_.data(), static_cast<int64_t>(flows_.size()),
                                reinterpret_cast<const int32_t*>(identity_.get()), 1};
  const auto reorder = [&](const Operand& like, std::byte* from, std::byte* to) {
    const int64_t cols = like.view.rows == 1 ? 1 : like.view.cols;  // a vector has an element a row
    kernels::PermuteArgs args;
    args.sent = order;
    args.x = {from, type_of(like.view.type), computed, cols, cols};
    args.to_x = {to, type_of(like.view.type), computed, cols, cols};
    kernels::permute(args, stream);
  };
  std::byte* free = scratch(call.op->stream);
  std::array<std::byte*, 8> packed{};
  for (size_t i = 0; i < out.size(); ++i) {
    const Operand& here = forward ? out[i] : in[i + 1];  // the side that computes
    packed[i] = free;
    free += (computed * row_bytes(here) + 255) / 256 * 256;
    if (!forward && computed > 0) reorder(here, here.data, packed[i]);
  }
  check(ncclGroupStart(), "routed rows");
  for (size_t i = 0; i < out.size(); ++i) {
    const Operand& source_side = forward ? in[i + 1] : out[i];
    const int64_t bytes = row_bytes(source_side);
    int64_t sent_rows = 0;
    for (int peer = 0; peer < call.size; ++peer) {
      const int64_t to_peer = plan.rows_between(round, call.index, peer),
                    from_peer = plan.rows_between(round, peer, call.index);
      std::byte* mine = source_side.data + sent_rows * bytes;
      std::byte* theirs = packed[i] + computed_before_[static_cast<size_t>(peer)] * bytes;
      sent_rows += to_peer;
      std::byte *send = forward ? mine : theirs, *receive = forward ? theirs : mine;
      const int64_t send_rows = forward ? to_peer : from_peer, receive_rows = forward ? from_peer : to_peer;
      if (send_rows > 0)
        check(ncclSend(send, static_cast<size_t>(send_rows * bytes), ncclInt8, peer, comm, stream), "send");
      if (receive_rows > 0)
        check(ncclRecv(receive, static_cast<size_t>(receive_rows * bytes), ncclInt8, peer, comm, stream),
              "receive");
    }
  }
  check(ncclGroupEnd(), "routed rows");
  if (forward && computed > 0)
    for (size_t i = 0; i < out.size(); ++i) reorder(out[i], packed[i], out[i].data);
}

void Rank::exchange_spilled(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const plan::RoundPlan& plan = round_plan(in[0]);
  if (call.round >= plan.rounds() || !cpu::acts(call, plan)) return;
  const bool weights = call.op->does.exchange == Exchange::spill_weights;
  const auto transfers = plan.transfers(plan.pass_of(static_cast<int>(call.round)));
  const int64_t own = plan.counts().experts() / call.size;
  ncclComm_t comm = communicators_->of(*call.op);
  const auto one = [](const Operand& all, int64_t i) {
    return all.data + i * all.view.stride * element(all);
  };
  const auto bytes = [](const Operand& all) {
    return static_cast<size_t>(all.view.rows * all.view.cols * element(all));
  };
  if (weights) {
    int64_t slot = 0;
    check(ncclGroupStart(), "spilled weights");
    for (const plan::WeightTransfer& t : transfers) {
      if (t.from == call.index)
        check(ncclSend(one(in[1], t.expert - t.from * own), bytes(in[1]), ncclInt8, t.to, comm, stream),
              "send");
      if (t.to == call.index)
        check(ncclRecv(one(out[0], slot++), bytes(out[0]), ncclInt8, t.from, comm, stream), "receive");
    }
    return check(ncclGroupEnd(), "spilled weights");
  }
  // Gradients come home through the staging slots, a few at a time; a borrower sends in the order of its
  // slots, and the owner adds by the borrowers' index: everyone walks the transfers in that order.
  spilled_.assign(transfers.begin(), transfers.end());
  std::ranges::stable_sort(spilled_, {}, &plan::WeightTransfer::to);
  const int64_t staging = out[0].view.count;
  for (size_t first = 0; first < spilled_.size(); first += static_cast<size_t>(staging)) {
    const size_t last = std::min(spilled_.size(), first + static_cast<size_t>(staging));
    check(ncclGroupStart(), "spilled gradients");
    for (size_t i = first; i < last; ++i) {
      const plan::WeightTransfer& t = spilled_[i];
      if (t.to == call.index) {
        int64_t slot = 0;  // the transfer's place among the borrower's
        for (const plan::WeightTransfer& other : transfers) {
          if (&other - transfers.data() >= 0 && other == t) break;
          slot += other.to == t.to ? 1 : 0;
        }
        check(ncclSend(one(in[1], slot), bytes(in[1]), ncclInt8, t.from, comm, stream), "send");
      }
      if (t.from == call.index)
        check(ncclRecv(one(out[0], static_cast<int64_t>(i - first)), bytes(out[0]), ncclInt8, t.to, comm,
                       stream),
              "receive");
    }
    check(ncclGroupEnd(), "spilled gradients");
    for (size_t i = first; i < last; ++i) {
      const plan::WeightTransfer& t = spilled_[i];
      if (t.from != call.index) continue;
      const auto piece = [&](const Operand& all, int64_t index) {
        return kernels::Matrix{one(all, index), type_of(all.view.type), all.view.rows, all.view.cols,
                               all.view.ld};
      };
      kernels::add(
          {piece(out[0], static_cast<int64_t>(i - first)), {}, piece(out[1], t.expert - t.from * own), true},
          stream);
    }
  }
}

}  // namespace mop::cuda
