// Input embedding. mop shards the table by columns: every rank of the dense group looks up its columns for
// all of the group's tokens, so that work, memory and traffic do not depend on which tokens there are.
#include "sim/program/native/lowering.h"

namespace mop::program {

void NativeLowering::embed_forward(int64_t micro) {
  b_.at(Phase::forward, -1);
  const int64_t h = c_.hidden;
  const Component part = Component::embedding;
  x_ = block_buffer(0);
  const Operand x = matrix(x_, ct_, n_, h);
  const auto lookup = [&](int64_t tokens, int64_t width) {
    return local(OpKind::embedding, part,
                 traffic(tokens * width, static_cast<double>(es_), static_cast<double>(es_)));
  };
  if (fsdp_) {
    b_.op(lookup(n_, h),
          {ids(micro),
           matrix(root_, ct_, c_.vocab, h, params_.offset({FlatPart::root, -1}, model::Role::embedding))},
          {x});
    return;
  }
  const int64_t width = params_.embedding_columns();
  const Operand table = matrix(embedding_.dense.weights, ct_, c_.vocab, width);
  if (embedding_group_ == kNoGroup) {
    b_.op(lookup(n_, h), {ids(micro), table}, {x});
    return;
  }
  const int64_t tokens = layout_.dense.size * n_;
  all_ids_ = transient("embedding_ids", kIdBytes * tokens, Holds::other_activations, -1);
  const Operand everyone = matrix(all_ids_, Type::i32, 1, tokens),
                found =
                    matrix(transient("embedding_rows", es_ * tokens * width, Holds::other_activations, -1),
                           ct_, tokens, width);
  b_.op(remote(OpKind::all_gather, Stream::sequence, part, embedding_group_, kIdBytes * tokens), {ids(micro)},
        {everyone});
  b_.op(lookup(tokens, width), {everyone, table}, {found});
  b_.op(remote(OpKind::all_to_all, Stream::sequence, part, embedding_group_, es_ * tokens * width,
               es_ * tokens * width, exchanging(Exchange::rows_to_columns)),
        {found}, {x});
}

void NativeLowering::embed_backward(int64_t micro, bool last) {
  b_.at(Phase::backward, -1);
  const int64_t h = c_.hidden;
  const Component part = Component::embedding;
  const Operand dx = matrix(dx_, ct_, n_, h);
  const auto scatter = [&](int64_t tokens, int64_t width, const Operand& from, const Operand& tokens_of,
                           const Operand& table) {
    Does does;
    does.accumulate = again(table);
    b_.op(local(OpKind::embedding_bwd, part,
                {{tokens * width, es_ * tokens * width, gs_ * (c_.vocab * width + tokens * width)}}, does),
          {tokens_of, from}, {table});
  };
  if (fsdp_) {
    scatter(n_, h, dx, ids(micro),
            matrix(root_gradient_, gt_, c_.vocab, h,
                   params_.offset({FlatPart::root, -1}, model::Role::embedding)));
    settle(head_.dense, root_gradient_, last);
    return;
  }
  const int64_t width = params_.embedding_columns();
  const BufferId gradient = gradient_target("embedding_gradient", embedding_.dense, -1);
  const Operand table = matrix(gradient, gt_, c_.vocab, width);
  if (embedding_group_ == kNoGroup) {
    scatter(n_, width, dx, ids(micro), table);
  } else {
    const int64_t tokens = layout_.dense.size * n_;
    const Operand arrived =
        matrix(transient("embedding_row_gradients", es_ * tokens * width, Holds::other_activations, -1), ct_,
               tokens, width);
    b_.op(remote(OpKind::all_to_all, Stream::sequence, part, embedding_group_, es_ * tokens * width,
                 es_ * tokens * width, exchanging(Exchange::columns_to_rows)),
          {dx}, {arrived});
    scatter(tokens, width, arrived, matrix(all_ids_, Type::i32, 1, tokens), table);
  }
  settle(embedding_.dense, gradient, last);
  if (last && updates_in_backward()) update(embedding_);
}

}  // namespace mop::program
