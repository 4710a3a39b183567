// Final norm, vocabulary projection over P and loss (mop.md 5), forward and backward in one visit.
#include <algorithm>

#include "sim/base/integer.h"
#include "sim/program/native/lowering.h"

namespace mop::program {

using model::Role;

void NativeLowering::vocabulary(int64_t micro, bool last) {
  const int layer = static_cast<int>(c_.layers);
  const int64_t h = c_.hidden;
  const double es = static_cast<double>(es_);
  const Component part = Component::vocabulary;
  b_.at(Phase::forward, layer);
  // The final norm's weight: in fsdp2's root group; else in the last layer's dense group, whose weights are
  // still gathered and whose gradient is begun here.
  Operand w_norm, dw_norm, w_head, dw_head;
  BufferId gradient_of_head = kNoBuffer;
  if (fsdp_) {
    const FlatGroup root{FlatPart::root, layer};
    root_gradient_ = gradient_target("root_gradient", head_.dense, layer);
    gradient_of_head = root_gradient_;
    w_norm = matrix(root_, ct_, 1, h, params_.offset(root, Role::final_norm));
    dw_norm = matrix(root_gradient_, gt_, 1, h, params_.offset(root, Role::final_norm));
    w_head = matrix(root_, ct_, c_.vocab, h, params_.offset(root, Role::head));
    dw_head = matrix(root_gradient_, gt_, c_.vocab, h, params_.offset(root, Role::head));
  } else {
    const Gathered& g = gathered_.back();
    last_dense_gradient_ = gradient_target("dense_gradient_whole", layers_.back().dense, layer - 1);
    gradient_of_head = gradient_target("head_gradient", head_.dense, layer);
    const int64_t rows = ceil_div(c_.vocab, layout_.vocabulary.size);
    w_norm = weight(g, Role::final_norm, 1, h);
    dw_norm = gradient(last_dense_gradient_, layer - 1, Role::final_norm, 1, h);
    w_head = matrix(head_.dense.weights, ct_, rows, h);
    dw_head = matrix(gradient_of_head, gt_, rows, h);
  }
  const Operand x = matrix(x_, ct_, n_, h);
  const BufferId normed = transient("final_normed", es_ * n_ * h, Holds::vocabulary_activations, layer);
  b_.op(local(OpKind::rms_norm, part, traffic(n_ * h, es, es)), {x, w_norm, {}},
        {matrix(normed, ct_, n_, h), {}});
  const BufferId d_normed =
      transient("final_normed_gradient", kFp32 * n_ * h, Holds::vocabulary_activations, layer);
  if (fsdp_ || plan_.vocabulary_scheme == plan::VocabularyScheme::tokens || vocabulary_ == kNoGroup)
    tokens_move(normed, d_normed, w_head, dw_head, micro);
  else
    weights_move(normed, d_normed, w_head, dw_head, micro);
  b_.at(Phase::backward, layer);
  dx_ = transient("block_output_gradient", es_ * n_ * h, Holds::other_activations, layer);
  Does does;
  does.accumulate = again(dw_norm);
  b_.op(local(OpKind::rms_norm_bwd, part, traffic(n_ * h, kFp32 + es, es), does),
        {matrix(d_normed, Type::f32, n_, h), x, w_norm, {}}, {matrix(dx_, ct_, n_, h), dw_norm});
  if (fsdp_) return;  // the root group waits for the embedding's gradient
  settle(head_.dense, gradient_of_head, last);
  if (last && updates_in_backward()) update(head_);
}

// X-gather: tiles of everyone's tokens visit each rank's columns; forward and backward in one visit.
void NativeLowering::tokens_move(BufferId x, BufferId d_x, const Operand& w, const Operand& dw,
                                 int64_t micro) {
  const Component part = Component::vocabulary;
  const int layer = static_cast<int>(c_.layers);
  const double es = static_cast<double>(es_);
  const int64_t h = c_.hidden, p = fsdp_ ? 1 : layout_.vocabulary.size, width = w.view.rows;
  const int64_t chosen = fsdp_ ? plan_.loss_chunk : plan_.vocabulary_tile;
  const int64_t tile_tokens = chosen == 0 ? n_ : std::min(chosen, n_);
  const Holds holds = Holds::vocabulary_activations;
  // Two of each, in turn: the exchange of a tile waits for the work on the one before the last.
  std::array<BufferId, 2> tiles{}, d_tiles{};
  for (size_t i = 0; i < 2 && vocabulary_ != kNoGroup && static_cast<int64_t>(i) * tile_tokens < n_; ++i) {
    tiles[i] = transient("vocabulary_tile", es_ * p * tile_tokens * h, holds, layer);
    d_tiles[i] = transient("vocabulary_tile_gradient", es_ * p * tile_tokens * h, holds, layer);
  }
  Operand all_targets = targets(micro);
  if (vocabulary_ != kNoGroup) {
    all_targets = matrix(transient("targets_gathered", kIdBytes * p * n_, holds, layer), Type::i32, p, n_);
    b_.op(remote(OpKind::all_gather, Stream::sequence, part, statistics_, kIdBytes * p * n_),
          {targets(micro)}, {all_targets});
  }
  const auto own_rows = [&](BufferId b, Type type, int64_t done, int64_t t) {
    return row_range(matrix(b, type, n_, h), done, t);
  };
  const auto gather_tile = [&](int64_t done) {
    const int64_t t = std::min(tile_tokens, n_ - done);
    if (vocabulary_ == kNoGroup || t <= 0) return own_rows(x, ct_, done, t);
    const Operand tile = matrix(tiles[static_cast<size_t>(done / tile_tokens % 2)], ct_, p * t, h);
    b_.at(Phase::forward, layer);
    b_.op(remote(OpKind::all_gather, Stream::gather, part, vocabulary_, es_ * p * t * h),
          {own_rows(x, ct_, done, t)}, {tile});
    return tile;
  };
  Operand next = gather_tile(0);
  for (int64_t done = 0; done < n_; done += tile_tokens) {
    const int64_t t = std::min(tile_tokens, n_ - done), m = p * t;
    const Operand tile = next, here = columns(all_targets, done, t);
    next = gather_tile(done + tile_tokens);
    b_.at(Phase::forward, layer);
    const Operand logits = matrix(transient("logits", es_ * m * width, holds, layer), ct_, m, width);
    linear(part, tile, w, logits);
    Operand statistics =  // maximum, sum, target
        matrix(transient("loss_statistics", 3 * kFp32 * m, holds, layer), Type::f32, m, 3);
    b_.op(local(OpKind::cross_entropy, part, {{m * width, es_ * m * width, 3 * kFp32 * m}}, {}, vocabulary_),
          {logits, here}, {statistics});
    if (vocabulary_ != kNoGroup) {
      const Operand all = many(
          matrix(transient("loss_statistics_gathered", 3 * kFp32 * m * p, holds, layer), Type::f32, m, 3), p,
          3 * m);
      b_.op(remote(OpKind::all_gather, Stream::sequence, part, statistics_, 3 * kFp32 * m * p), {statistics},
            {all});
      statistics = all;
    }
    b_.at(Phase::backward, layer);
    Does does;
    does.accumulate = true;
    does.b = t;
    does.c = 1;
    b_.op(local(OpKind::cross_entropy_bwd, part, traffic(m * width, es, es), does, vocabulary_),
          {logits, statistics, here, matrix(valid_, Type::f64, 1, 1)}, {logits, sum(1)});
    gemm(part, logits, true, tile, false, dw, again(dw));
    const Operand home = own_rows(d_x, Type::f32, done, t);
    if (vocabulary_ == kNoGroup) {
      gemm(part, logits, false, w, false, home);
      continue;
    }
    const Operand d_tile = matrix(d_tiles[static_cast<size_t>(done / tile_tokens % 2)], ct_, m, h);
    gemm(part, logits, false, w, false, d_tile);
    b_.op(remote(OpKind::reduce_scatter, Stream::gather, part, vocabulary_, es_ * m * h), {d_tile}, {home});
  }
}

// V-ring: blocks of columns visit every rank; first for the statistics, then for the gradients, whose blocks
// ride along.
void NativeLowering::weights_move(BufferId x, BufferId d_x, const Operand& w, const Operand& dw,
                                  int64_t micro) {
  const Component part = Component::vocabulary;
  const int layer = static_cast<int>(c_.layers);
  const double es = static_cast<double>(es_);
  const int64_t h = c_.hidden, p = layout_.vocabulary.size, width = w.view.rows, block = width * h;
  const int64_t tile = std::min(n_, plan_.vocabulary_tile * p);
  const Holds holds = Holds::vocabulary_activations;
  const Operand statistics =
      matrix(transient("loss_statistics", 3 * kFp32 * n_, holds, layer), Type::f32, n_, 3);
  // Two blocks of weights, and two of gradients, in turn.
  std::array<Operand, 2> blocks{}, gradients{};
  for (Operand& slot : blocks)
    slot = matrix(transient("vocabulary_block", es_ * block, holds, layer), ct_, width, h);
  for (Operand& slot : gradients)
    slot = matrix(transient("vocabulary_block_gradient", gs_ * block, holds, layer), gt_, width, h);
  const auto ring = [&](const Operand& from, const Operand& to) {
    const int64_t bytes = block * size_of(from.view.type);
    b_.op(remote(OpKind::send_recv, Stream::gather, part, vocabulary_, bytes, bytes), {from}, {to});
    return to;
  };
  // Calls visit(step, weights, rows, first row) for every block, in the order in which they come by, and
  // tile.
  const auto tiles = [&](int64_t step, const Operand& now, const auto& visit) {
    for (int64_t done = 0; done < n_; done += tile) {
      const int64_t t = std::min(tile, n_ - done);
      const Operand logits = matrix(transient("logits", es_ * t * width, holds, layer), ct_, t, width);
      linear(part, row_range(matrix(x, ct_, n_, h), done, t), now, logits);
      Does does;
      does.a = step;
      visit(logits, columns(targets(micro), done, t), row_range(statistics, done, t), done, t, does);
    }
  };
  Operand weights = w;
  b_.at(Phase::forward, layer);
  for (int64_t step = 0; step < p; ++step) {
    const Operand now = weights;
    if (step + 1 < p) weights = ring(weights, blocks[static_cast<size_t>(step % 2)]);
    tiles(
        step, now,
        [&](const Operand& logits, const Operand& here, const Operand& rows, int64_t, int64_t t, Does does) {
          does.accumulate = step > 0;
          b_.op(local(OpKind::cross_entropy, part, {{t * width, es_ * t * width, 3 * kFp32 * t}}, does,
                      vocabulary_),
                {logits, here}, {rows});
        });
  }
  weights = w;
  b_.at(Phase::backward, layer);
  Operand riding = gradients[1];  // gradient of the block that is here
  for (int64_t step = 0; step < p; ++step) {
    const Operand now = weights;
    if (step + 1 < p) weights = ring(weights, blocks[static_cast<size_t>(step % 2)]);
    tiles(step, now,
          [&](const Operand& logits, const Operand& here, const Operand& rows, int64_t done, int64_t t,
              Does does) {
            Operand loss;
            if (step == 0) {
              loss = sum(1);
              does.accumulate = true;
            }
            b_.op(local(OpKind::cross_entropy_bwd, part, traffic(t * width, es, es), does, vocabulary_),
                  {logits, rows, here, matrix(valid_, Type::f64, 1, 1)}, {logits, loss});
            const Operand own_rows = row_range(matrix(x, ct_, n_, h), done, t);
            gemm(part, logits, true, own_rows, false, riding, step > 0 || done > 0);
            gemm(part, logits, false, now, false, row_range(matrix(d_x, Type::f32, n_, h), done, t),
                 step > 0);
          });
    if (step + 1 < p) riding = ring(riding, gradients[static_cast<size_t>(step % 2)]);
  }
  // One more hop brings every block home.
  if (!again(dw)) {
    ring(riding, dw);
    return;
  }
  const Operand arrived =
      matrix(transient("vocabulary_block_home", gs_ * block, holds, layer), gt_, width, h);
  ring(riding, arrived);
  Does add;
  add.accumulate = true;
  b_.op(local(OpKind::add, part, {{block, 2 * gs_ * block, gs_ * block}}, add), {arrived, {}}, {dw});
}

}  // namespace mop::program
