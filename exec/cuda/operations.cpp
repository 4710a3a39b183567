// Local operations of a GPU rank, kind by kind (sim/program/ops.h).
#include <algorithm>
#include <bit>
#include <cstring>

#include "exec/cuda/adam_job.h"
#include "exec/cuda/operands.h"
#include "kernels/activation.h"
#include "kernels/adam.h"
#include "kernels/check.h"
#include "kernels/column_sum.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/router.h"
#include "kernels/to_host.h"
#include "sim/base/error.h"
#include "sim/program/alone.h"
#include "sim/program/workspace.h"

namespace mop::cuda {

using kernels::check;
using program::OpKind;

namespace {

// What predictions know of the kernels.
static_assert(program::kProductWorkspace == kernels::Matmul::kWorkspaceBytes);
static_assert(program::kLongGradient == kernels::GroupedMatmul::kLongGradient);
static_assert(program::kTileRows == kernels::GroupedMatmul::kTileRows);
static_assert(program::kTileColumns == kernels::GroupedMatmul::kTileColumns);
static_assert(program::kFull == kernels::GroupedMatmul::kFull);

kernels::Router router_of(const model::ModelConfig& c) {
  kernels::Router r;
  r.experts = static_cast<int>(c.experts);
  r.choices = static_cast<int>(c.top_k);
  r.sigmoid = c.scoring == model::Scoring::sigmoid;
  r.softmax_after = c.softmax_after_topk;
  r.normalise = c.normalise_topk;
  r.scale = static_cast<float>(c.routed_scale);
  r.groups = static_cast<int>(c.router_groups);
  r.top_groups = static_cast<int>(c.router_top_groups);
  return r;
}

// Coefficient of the balance loss for one product of a copy count and a probability.
double balance_of(const model::ModelConfig& c, const program::Does& does) {
  const double rows = static_cast<double>(does.a) * static_cast<double>(does.b);
  return c.aux_loss_coefficient * static_cast<double>(c.experts) / (rows * rows) /
         static_cast<double>(does.c);
}

kernels::MatmulShape shape_of(const program::Does& does, std::span<const Operand> in, const Operand& out) {
  const program::View &a = in[0].view, &b = in[1].view, &c = out.view;
  kernels::MatmulShape s;
  s.transpose_a = does.transpose_a;
  s.transpose_b = does.transpose_b;
  s.m = c.rows;
  s.n = c.cols;
  s.k = does.transpose_a ? a.rows : a.cols;
  s.lda = a.ld;
  s.ldb = b.ld;
  s.ldc = c.ld;
  s.accumulate = does.accumulate;
  s.bias = in.size() > 2 && in[2];
  s.in = type_of(a.type);
  s.out = type_of(c.type);
  if (s.bias) s.bias_type = type_of(in[2].view.type);
  return s;
}

kernels::AttentionShape attention_shape(const cpu::Constants& constants, const program::Op& op,
                                        const program::Shape& shape, std::span<const Operand> in,
                                        const Operand& o, int64_t documents) {
  const auto a = program::AttentionShape::of(shape);
  kernels::AttentionShape s;
  s.batch = a.batch;
  s.context = a.q_len;
  s.heads = a.heads;
  s.kv_heads = a.kv_heads;
  s.qk_dim = a.qk_dim;
  s.v_dim = a.v_dim;
  s.window = op.does.b;
  s.scale = constants.rope.attention_scale;
  s.sinks = static_cast<bool>(in.back());
  s.documents = documents;
  s.q_ld = in[0].view.ld;
  s.k_ld = in[1].view.ld;
  s.v_ld = in[2].view.ld;
  s.o_ld = o.view.ld;
  return s;
}

kernels::AttentionGradientShape gradient_shape(const kernels::AttentionShape& forward, const program::Op& op,
                                               std::span<const Operand> in, std::span<const Operand> out) {
  kernels::AttentionGradientShape g;
  g.forward = forward;
  g.do_ld = in[4].view.ld;
  g.dq_ld = out[0].view.ld;
  g.dk_ld = out[1].view.ld;
  g.dv_ld = out[2].view.ld;
  g.accumulate = op.does.accumulate;
  return g;
}

}  // namespace

// documents: of the batch that attention works on; 0: one a sequence.
int64_t Rank::scratch_of(const program::Op& op, std::span<const Operand> in, std::span<const Operand> out,
                         int64_t documents) {
  switch (op.kind) {
    case OpKind::gemm:
      matmul_.prepare(shape_of(op.does, in, out[0]));
      return static_cast<int64_t>(kernels::Matmul::kWorkspaceBytes);
    case OpKind::grouped_gemm:
      return static_cast<int64_t>(grouped_.workspace_bytes());
    case OpKind::attention_fwd:
      return static_cast<int64_t>(attention_.workspace_bytes(
          attention_shape(constants_, op, program_.shape(op), in, out[0], documents)));
    case OpKind::attention_bwd: {
      std::vector<Operand> like_forward{in[0], in[1], in[2], in[6], in[7]};
      return static_cast<int64_t>(attention_.workspace_bytes(gradient_shape(
          attention_shape(constants_, op, program_.shape(op), like_forward, in[3], documents), op, in, out)));
    }
    case OpKind::rms_norm_bwd:
      return kernels::rms_norm_bwd_scratch(in[1].view.rows, in[1].view.cols, in[2].view.cols);
    case OpKind::rope_bwd:
      return in[3] ? kernels::rms_norm_bwd_scratch(in[0].view.rows, in[0].view.cols, in[3].view.cols) : 0;
    case OpKind::column_sum:
      return kernels::column_sum_scratch(in[0].view.rows, in[0].view.cols, 1);
    case OpKind::expert_bias_bwd:
      return kernels::column_sum_scratch(in[0].view.rows, in[0].view.cols, kernels::kMostExperts);
    case OpKind::topk:
      return kernels::topk_scratch(in[0].view.rows, static_cast<int>(in[0].view.cols));
    case OpKind::sort:
      return kernels::sort_scratch(in[0].view.elements(), static_cast<int>(constants_.model.experts));
    case OpKind::unpermute:
      return kernels::unpermute_scratch(out[0].view.rows, constants_.model.top_k);
    case OpKind::unpermute_bwd:
      return kernels::unpermute_scratch(out[0].view.rows, constants_.model.top_k);
    case OpKind::embedding_bwd:
      return kernels::embedding_bwd_scratch(in[0].view.elements(), out[0].view.cols);
    case OpKind::square_sum:
      return kernels::kSquareSumScratch;
    case OpKind::all_to_all:
      return program::exchange_workspace(program_, op);
    case OpKind::reduce_scatter:
      return peers_->takes(program_, op) ? 0 : program::reduction_workspace(program_, op);
    default:
      return 0;
  }
}

void Rank::run_local(const Launch& launch, cudaStream_t stream) {
  const Call& call = launch.call;
  const program::Op& op = *call.op;
  const program::Does& does = op.does;
  const auto &in = call.in, &out = call.out;
  const model::ModelConfig& model = constants_.model;
  std::byte* const work = scratch(op.stream);
  const float eps = static_cast<float>(model.norm_eps);
  const auto rotation = [&] {
    return kernels::Rotation{does.a, does.b, does.c, constants_.rope.interleaved, cos_, sin_};
  };
  switch (op.kind) {
    case OpKind::gemm:
      return gemm(call, stream);
    case OpKind::attention_fwd:
    case OpKind::attention_bwd:
      return attention(call, stream);
    case OpKind::rms_norm:
      return kernels::rms_norm({matrix(in[0]), matrix(in[1]), matrix(in[2]), matrix(out[0]),
                                out.size() > 1 ? matrix(out[1]) : kernels::Matrix{}, eps},
                               stream);
    case OpKind::rms_norm_bwd:
      return kernels::rms_norm_bwd(
          {matrix(in[0]), matrix(in[1]), matrix(in[2]), matrix(in[3]), matrix(out[0]), matrix(out[1]), eps,
           does.accumulate, reinterpret_cast<float*>(work)},
          stream);
    case OpKind::rope:
      return kernels::rope({matrix(in[0]), matrix(in[2]), matrix(out[0]), pointer<const int32_t>(in[1]),
                            in[1].view.elements(), rotation(), eps},
                           stream);
    case OpKind::rope_bwd:
      return kernels::rope_bwd({matrix(in[0]), matrix(in[2]), matrix(in[3]), matrix(out[0]), matrix(out[1]),
                                pointer<const int32_t>(in[1]), in[1].view.elements(), rotation(), eps,
                                does.accumulate, reinterpret_cast<float*>(work)},
                               stream);
    case OpKind::mla_keys:
      return kernels::mla_keys(
          {matrix(in[0]), matrix(in[1]), matrix(out[0]), matrix(out[1]), does.a, does.b, does.c}, stream);
    case OpKind::mla_keys_bwd:
      return kernels::mla_keys_bwd({matrix(in[0]), matrix(in[1]), matrix(out[0]), matrix(out[1]), does.a,
                                    does.b, does.c, does.accumulate},
                                   stream);
    case OpKind::column_sum:
      return kernels::column_sum(
          {matrix(in[0]), matrix(out[0]), does.accumulate, reinterpret_cast<float*>(work)}, stream);
    case OpKind::add:
      return kernels::add(
          {matrix(in[0]), in.size() > 1 ? matrix(in[1]) : kernels::Matrix{}, matrix(out[0]), does.accumulate},
          stream);
    case OpKind::sum_replicas:
      return kernels::sum_replicas({matrix(in[0]), matrix(out[0]), does.a, does.b}, stream);
    case OpKind::cast:
    case OpKind::copy:
      return kernels::copy({matrix(in[0]), matrix(out[0])}, stream);
    case OpKind::clear:
      return kernels::clear({matrix(out[0])}, stream);
    case OpKind::embedding:
      return kernels::embedding({pointer<const int32_t>(in[0]), model.vocab, matrix(in[1]), matrix(out[0]),
                                 reinterpret_cast<int32_t*>(flags_.get())},
                                stream);
    case OpKind::embedding_bwd:
      return kernels::embedding_bwd(
          {pointer<const int32_t>(in[0]), matrix(in[1]), matrix(out[0]), does.accumulate, work}, stream);
    case OpKind::cross_entropy:
    case OpKind::cross_entropy_bwd:
      return cross_entropy(call, stream);
    case OpKind::square_sum:
      return kernels::square_sum({matrix(in[0]), static_cast<double>(does.a), pointer<double>(out[0]),
                                  does.accumulate, reinterpret_cast<double*>(work)},
                                 stream);
    case OpKind::clip_factor:
      return kernels::clip_factor({pointer<const double>(in[0]), launch.step.max_norm, pointer<float>(out[0]),
                                   reinterpret_cast<int32_t*>(flags_.get()) + 2},
                                  stream);
    case OpKind::adam:
      return adam(launch, stream);
    case OpKind::adam_host:
      return adam_host(launch, stream);
    case OpKind::copy_h2d:
    case OpKind::copy_d2h:
      return copy_bytes(call, stream);
    case OpKind::next_batch:
      return next_batch(launch, stream);
    case OpKind::topk:
      return kernels::topk(
          {router_of(model), pointer<const float>(in[0]), in[0].view.rows, in[0].view.ld,
           in[1] ? pointer<const float>(in[1]) : nullptr, pointer<int32_t>(out[0]), pointer<float>(out[1]),
           out[2] ? pointer<float>(out[2]) : nullptr, does.accumulate, reinterpret_cast<float*>(work)},
          stream);
    case OpKind::topk_bwd:
      return kernels::topk_bwd({router_of(model), pointer<const float>(in[3]), in[3].view.rows, in[3].view.ld,
                                pointer<const int32_t>(in[1]), pointer<const float>(in[0]),
                                in[4] ? pointer<const float>(in[4]) : nullptr,
                                in[4] ? static_cast<float>(balance_of(model, does)) : 0.0F, matrix(out[0])},
                               stream);
    case OpKind::balance_loss:
      return kernels::balance_loss(
          {pointer<const float>(in[0]), static_cast<int>(model.experts),
           call.index == 0 ? balance_of(model, does) : 0.0, pointer<double>(out[0]), does.accumulate},
          stream);
    case OpKind::sort:
      return kernels::sort(
          {pointer<const int32_t>(in[0]), in[0].view.elements(), static_cast<int>(model.experts),
           pointer<int32_t>(out[0]), pointer<int32_t>(out[1]), reinterpret_cast<int32_t*>(work)},
          stream);
    default:
      return run_routed(call, stream);
  }
}

void Rank::gemm(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  matmul_.run(shape_of(call.op->does, in, out[0]), in[0].data, in[1].data,
              in.size() > 2 && in[2] ? in[2].data : nullptr, out[0].data, scratch(call.op->stream), stream);
}

void Rank::attention(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const program::Op& op = *call.op;
  const bool forward = op.kind == OpKind::attention_fwd;
  const Operand &starts = forward ? in[3] : in[6], &sinks = forward ? in[4] : in[7],
                &o = forward ? out[0] : in[3];
  const std::array like_forward{in[0], in[1], in[2], starts, sinks};
  const auto batch = documents_.find(starts.data);
  const kernels::AttentionShape shape = attention_shape(constants_, op, program_.shape(op), like_forward, o,
                                                        batch == documents_.end() ? 0 : batch->second);
  kernels::AttentionInputs inputs{in[0].data, in[1].data, in[2].data, pointer<const int32_t>(starts), {}};
  if (sinks) inputs.sinks = {matrix(sinks), call.index * shape.heads};
  if (forward) {
    attention_.forward(shape, inputs, out[0].data, pointer<float>(out[1]), scratch(op.stream), stream);
    return;
  }
  kernels::Attention::Gradients gradients{out[0].data, out[1].data, out[2].data, {}, op.does.a == 1};
  if (sinks) gradients.d_sinks = matrix(out[3]);
  attention_.backward(gradient_shape(shape, op, in, out), inputs, in[3].data, in[4].data,
                      pointer<const float>(in[5]), gradients, scratch(op.stream), stream);
}

void Rank::cross_entropy(const Call& call, cudaStream_t stream) {
  const auto &in = call.in, &out = call.out;
  const program::Does& does = call.op->does;
  const bool forward = call.op->kind == OpKind::cross_entropy;
  const Operand& targets = forward ? in[1] : in[2];
  const int64_t block = ((call.index - does.a) % call.size + call.size) % call.size;
  const kernels::VocabularyBlock columns{block * in[0].view.cols, constants_.model.vocab};
  const kernels::Targets where{pointer<const int32_t>(targets), targets.view.cols, targets.view.ld};
  if (forward)
    return kernels::cross_entropy({matrix(in[0]), columns, where, pointer<float>(out[0]), does.accumulate,
                                   reinterpret_cast<int32_t*>(flags_.get()) + 1},
                                  stream);
  const int64_t rows = in[0].view.rows, own = targets.view.cols;
  const bool counts = out.size() > 1 && out[1];
  kernels::cross_entropy_bwd(
      {matrix(out[0]), columns, where, pointer<const float>(in[1]), in[1].view.count,
       pointer<const double>(in[3]), counts ? pointer<double>(out[1]) : nullptr,
       does.c != 0 ? call.index * own : 0, does.c != 0 ? (call.index + 1) * own : rows, does.accumulate},
      stream);
}

void Rank::adam(const Launch& launch, cudaStream_t stream) {
  const Call& call = launch.call;
  const program::Does& does = call.op->does;
  const interpreter::AdamW& a = does.deferred ? launch.step.deferred : launch.step.adam;
  int64_t first = 0;
  for (size_t pair = 0; pair + 1 < call.out.size(); ++pair) {
    const Operand &gradient = call.in[2 + pair], &weights = call.out[1 + pair];
    kernels::adam(
        {pointer<float>(call.in[1]), does.a, first, weights.view.elements(),
         static_cast<kernels::Master>(does.b), gradient.data, weights.data, type_of(gradient.view.type),
         type_of(weights.view.type), call.in[0] ? pointer<const float>(call.in[0]) : nullptr, a.step,
         a.learning_rate, a.beta1, a.beta2, a.eps, a.weight_decay},
        stream);
    first += weights.view.elements();
  }
}

// What is read, end to end, is what is written.
void Rank::copy_bytes(const Call& call, cudaStream_t stream) {
  size_t from = 0, to = 0;
  int64_t read = 0, written = 0;
  const auto kind = call.op->kind == OpKind::copy_h2d ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
  while (from < call.in.size() && to < call.out.size()) {
    ensure(call.in[from].view.dense() && call.out[to].view.dense(),
           "copies between the host and the GPU are of whole pieces");
    const int64_t bytes = std::min(bytes_of(call.in[from]) - read, bytes_of(call.out[to]) - written);
    check(cudaMemcpyAsync(call.out[to].data + written, call.in[from].data + read, static_cast<size_t>(bytes),
                          kind, stream),
          "a copy");
    read += bytes;
    written += bytes;
    if (read == bytes_of(call.in[from])) ++from, read = 0;
    if (written == bytes_of(call.out[to])) ++to, written = 0;
  }
}

void Rank::next_batch(const Launch& launch, cudaStream_t stream) {
  const Call& call = launch.call;
  const int64_t micro = call.op->does.a;
  auto& [pinned, copied] = batches_.at(micro);
  check(cudaEventSynchronize(copied), "the batch before");  // its copy reads the same memory
  std::array<std::span<int32_t>, 4> parts;
  std::byte* at = pinned + 8;
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i] = {reinterpret_cast<int32_t*>(at), static_cast<size_t>(call.out[i].view.elements())};
    at += bytes_of(call.out[i]);
  }
  launch.step.data->fill(micro, {parts[0], parts[1], parts[2], parts[3]});
  double valid = static_cast<double>(std::ranges::count_if(parts[1], [](int32_t t) { return t != -100; }));
  const int64_t sequences =
      static_cast<int64_t>(parts[3].size()) / static_cast<int64_t>(constants_.rope.positions);
  int64_t documents = 0;
  for (size_t i = 0; i < parts[3].size(); ++i) documents += parts[3][i] == static_cast<int32_t>(i) ? 1 : 0;
  documents =
      documents > sequences ? static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(documents))) : 0;
  documents_.at(call.out[3].data) = documents;
  if (documents > most_documents_) make_room_for(documents);
  if (micro > 0) {
    double before = 0;
    std::memcpy(&before, batches_.at(micro - 1).first, sizeof before);
    valid += before;
  }
  std::memcpy(pinned, &valid, sizeof valid);
  for (size_t i = 0; i < parts.size(); ++i)
    check(cudaMemcpyAsync(call.out[i].data, parts[i].data(), parts[i].size_bytes(), cudaMemcpyHostToDevice,
                          stream),
          "a batch");
  check(cudaMemcpyAsync(call.out[4].data, pinned, sizeof valid, cudaMemcpyHostToDevice, stream), "a batch");
  check(cudaEventRecord(copied, stream), "recording an event");
}

// Attention over many documents needs a larger workspace than over whole sequences, by an amount that only
// the data tells: it grows when a batch has twice as many as any before.
void Rank::make_room_for(int64_t documents) {
  most_documents_ = documents;
  for (program::OpId id = 0; id < program_.ops.size(); ++id) {
    const program::Op& op = program_.ops[id];
    if (op.kind != OpKind::attention_fwd && op.kind != OpKind::attention_bwd) continue;
    const std::vector<Operand> operands = operands_of(op);
    const std::span all(operands);
    const size_t reads = reads_of(op);
    need_scratch(op.stream, scratch_of(op, all.first(reads), all.subspan(reads), documents));
  }
}

void Rank::adam_host(const Launch& launch, cudaStream_t stream) {
  const Call& call = launch.call;
  const program::Does& does = call.op->does;
  AdamJob& job = *adam_jobs_[call.id];
  job.states = pointer<float>(call.in[1]);
  job.bucket = does.a;
  job.master = static_cast<program::Master>(does.b) == program::Master::states;
  job.adam = does.deferred ? launch.step.deferred : launch.step.adam;
  job.pairs.clear();
  int64_t first = 0;
  for (size_t pair = 0; pair + 1 < call.out.size(); ++pair) {
    const Operand &gradient = call.in[2 + pair], &weights = call.out[1 + pair];
    job.pairs.push_back(
        {gradient.data, gradient.view.type, weights.data, weights.view.type, first, weights.view.elements()});
    first += weights.view.elements();
  }
  job.clipped = static_cast<bool>(call.in[0]);
  if (job.clipped) kernels::to_host(call.in[0].data, job.factor.get(), sizeof(float), stream);
  check(cudaLaunchHostFunc(
            stream, [](void* data) { static_cast<AdamJob*>(data)->run(); }, &job),
        "a CPU update");
}

}  // namespace mop::cuda
