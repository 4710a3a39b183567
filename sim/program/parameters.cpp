#include "sim/program/parameters.h"

#include <algorithm>

#include "sim/base/error.h"
#include "sim/base/integer.h"

namespace mop::program {

using model::Role;

namespace {

// Heads in the order of chunks and, in a chunk, of ranks: rank r owns heads [r x heads / ranks, ...), and
// works on its c-th part of them in chunk c.
std::vector<int64_t> chunked_order(int64_t heads, int64_t ranks, int64_t chunks) {
  const int64_t own = heads / ranks, part = own / chunks;
  std::vector<int64_t> order;
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t r = 0; r < ranks; ++r)
      for (int64_t i = 0; i < part; ++i) order.push_back(r * own + c * part + i);
  return order;
}

}  // namespace

HeadChunks head_chunks(const model::ModelConfig& model, int64_t ranks, int64_t chunks) {
  HeadChunks h;
  h.chunks = chunks;
  h.heads = model.heads / ranks / chunks;
  const bool mla = model.attention == model::Attention::mla;
  const int64_t kv_heads = mla ? model.heads : model.kv_heads;
  const int64_t own =
      std::max<int64_t>(1, kv_heads / ranks);  // each goes to several ranks when there are few
  h.kv_chunks = own % chunks == 0 ? chunks : 1;
  h.kv_heads = own / h.kv_chunks;
  h.kv_replicas = std::max<int64_t>(1, ranks / kv_heads);
  return h;
}

ParameterLayout::ParameterLayout(const model::ModelConfig& model, const plan::Plan& plan,
                                 const plan::Layout& layout)
    : model_(model), family_(plan.family) {
  const bool mop = family_ == plan::Family::mop;
  shards_ = mop ? layout.dense.size : 1;
  columns_ = ceil_div(model.hidden, shards_);
  const int64_t ranks = layout.sequence.size;
  chunks_ = head_chunks(model, ranks, mop ? plan.head_chunks : 1);
  heads_ = chunked_order(model.heads, ranks, chunks_.chunks);
  const int64_t kv_heads = model.attention == model::Attention::mla ? model.heads : model.kv_heads;
  kv_heads_ = chunks_.kv_chunks == 1 ? chunked_order(kv_heads, 1, 1)
                                     : chunked_order(kv_heads, ranks, chunks_.kv_chunks);
  for (int l = 0; l < model.layers; ++l) dense_.push_back(dense_entries(l));
  experts_ = expert_entries();
}

std::vector<FlatGroup> ParameterLayout::groups() const {
  std::vector<FlatGroup> all;
  const bool mop = family_ == plan::Family::mop;
  if (mop) all.push_back({FlatPart::embedding, -1});
  for (int l = 0; l < model_.layers; ++l) {
    all.push_back({FlatPart::dense, l});
    if (!model_.moe[static_cast<size_t>(l)]) continue;
    all.push_back({FlatPart::experts, l});
    if (model_.correction_bias) all.push_back({FlatPart::router_bias, l});
  }
  all.push_back(mop ? FlatGroup{FlatPart::head, static_cast<int32_t>(model_.layers)}
                    : FlatGroup{FlatPart::root, static_cast<int32_t>(model_.layers)});
  return all;
}

// Matrices first: their sizes are multiples of the hidden width, so all of them are aligned. What one product
// reads stands together: keys and values of a chunk, gate and up.
std::vector<ParameterLayout::Entry> ParameterLayout::dense_entries(int layer) const {
  const model::ModelConfig& c = model_;
  const bool mla = c.attention == model::Attention::mla;
  std::vector<Entry> all;
  int64_t at = 0;
  const auto add = [&](Role role, int64_t rows, int64_t cols) {
    all.push_back({role, at, rows, cols});
    at += rows * cols;
  };
  const int64_t h = c.hidden, q = c.heads * c.qk_dim(), k = c.kv_heads * c.qk_dim(),
                v = c.kv_heads * c.v_dim();
  if (mla) {
    if (c.q_lora_rank > 0) add(Role::q_a, c.q_lora_rank, h);
    add(Role::kv_a, c.kv_lora_rank + c.qk_rope_dim, h);
    if (c.q_lora_rank > 0)
      add(Role::q_b, q, c.q_lora_rank);
    else
      add(Role::q, q, h);
    add(Role::kv_b, c.heads * (c.qk_nope_dim + c.v_head_dim), c.kv_lora_rank);
  } else {
    add(Role::q, q, h);
    add(Role::k, k + v, h);  // and v, chunk by chunk
  }
  add(Role::o, h, c.heads * c.v_dim());
  const bool moe = c.moe[static_cast<size_t>(layer)];
  if (moe) {
    add(Role::router, c.experts, h);
    if (c.shared_intermediate > 0) {
      add(Role::shared_gate, c.shared_intermediate, h);
      add(Role::shared_up, c.shared_intermediate, h);
      add(Role::shared_down, h, c.shared_intermediate);
    }
  } else {
    add(Role::dense_gate, c.dense_intermediate, h);
    add(Role::dense_up, c.dense_intermediate, h);
    add(Role::dense_down, h, c.dense_intermediate);
  }
  if (c.qkv_bias && mla) {
    if (c.q_lora_rank > 0) add(Role::q_a_bias, 1, c.q_lora_rank);
    add(Role::kv_a_bias, 1, c.kv_lora_rank + c.qk_rope_dim);
  } else if (c.qkv_bias) {
    add(Role::q_bias, 1, q);
    add(Role::k_bias, 1, k + v);  // and v, likewise
  }
  if (c.out_bias) add(Role::o_bias, 1, h);
  add(Role::attention_norm, 1, h);
  add(Role::feed_forward_norm, 1, h);
  if (layer + 1 == c.layers && family_ == plan::Family::mop) add(Role::final_norm, 1, h);
  if (mla) {
    if (c.q_lora_rank > 0) add(Role::q_a_norm, 1, c.q_lora_rank);
    add(Role::kv_a_norm, 1, c.kv_lora_rank);
  } else if (c.qk_norm == model::QkNorm::per_head) {
    add(Role::q_norm, 1, c.head_dim);
    add(Role::k_norm, 1, c.head_dim);
  } else if (c.qk_norm == model::QkNorm::full) {
    add(Role::q_norm, 1, q);
    add(Role::k_norm, 1, k);
  }
  if (moe && c.router_bias) add(Role::router_bias, 1, c.experts);
  if (c.sinks) add(Role::sinks, 1, c.heads);
  return all;
}

std::vector<ParameterLayout::Entry> ParameterLayout::expert_entries() const {
  const model::ModelConfig& c = model_;
  const int64_t h = c.hidden, i = c.expert_intermediate;
  std::vector<Entry> all{
      {Role::expert_gate, 0, i, h}, {Role::expert_up, i * h, i, h}, {Role::expert_down, 2 * i * h, h, i}};
  if (c.expert_bias) {
    all.push_back({Role::expert_gate_bias, 3 * i * h, 1, i});
    all.push_back({Role::expert_up_bias, 3 * i * h + i, 1, i});
    all.push_back({Role::expert_down_bias, 3 * i * h + 2 * i, 1, h});
  }
  return all;
}

int64_t ParameterLayout::expert_elements() const {
  return experts_.back().offset + experts_.back().rows * experts_.back().cols;
}

int64_t ParameterLayout::elements(FlatGroup group) const {
  const int64_t table = model_.vocab * model_.hidden;
  switch (group.part) {
    case FlatPart::embedding:
      return shards_ * model_.vocab * columns_;
    case FlatPart::dense: {
      const Entry& last = dense_[static_cast<size_t>(group.layer)].back();
      return last.offset + last.rows * last.cols;
    }
    case FlatPart::experts:
      return model_.experts * expert_elements();
    case FlatPart::head:
      return table;
    case FlatPart::root:
      return (model_.tied_head ? 1 : 2) * table + model_.hidden;
    case FlatPart::router_bias:
      return model_.experts;
  }
  return 0;
}

int64_t ParameterLayout::offset(FlatGroup group, Role role) const {
  const int64_t table = model_.vocab * model_.hidden;
  switch (group.part) {
    case FlatPart::root:
      if (role == Role::head) return model_.tied_head ? 0 : table;
      return role == Role::embedding ? 0 : elements(group) - model_.hidden;
    case FlatPart::dense:
      for (const Entry& e : dense_[static_cast<size_t>(group.layer)])
        if (e.role == role) return e.offset;
      break;
    case FlatPart::experts:
      for (const Entry& e : experts_)
        if (e.role == role) return e.offset;
      break;
    default:
      return 0;
  }
  ensure(false, "the group has a parameter of this role");
  return 0;
}

std::vector<Piece> ParameterLayout::pieces(FlatGroup group) const {
  const model::ModelConfig& c = model_;
  const int64_t h = c.hidden;
  std::vector<Piece> all;
  // Row blocks, or column blocks, of one parameter in a given order.
  const auto by_rows = [&](Role role, const std::vector<int64_t>& order, int64_t width, int64_t cols,
                           int64_t at) {
    for (size_t i = 0; i < order.size(); ++i)
      all.push_back({{role, group.layer},
                     order[i] * width,
                     0,
                     width,
                     cols,
                     at + static_cast<int64_t>(i) * width * cols,
                     cols});
  };
  const auto by_columns = [&](Role role, const std::vector<int64_t>& order, int64_t width, int64_t rows,
                              int64_t at) {
    const int64_t ld = static_cast<int64_t>(order.size()) * width;
    for (size_t i = 0; i < order.size(); ++i)
      all.push_back(
          {{role, group.layer}, 0, order[i] * width, rows, width, at + static_cast<int64_t>(i) * width, ld});
  };
  switch (group.part) {
    case FlatPart::embedding:
      for (int64_t j = 0; j * columns_ < h; ++j)
        all.push_back({{Role::embedding},
                       0,
                       j * columns_,
                       c.vocab,
                       std::min(columns_, h - j * columns_),
                       j * c.vocab * columns_,
                       columns_});
      return all;
    case FlatPart::head:
      return {{{Role::head}, 0, 0, c.vocab, h, 0, h}};
    case FlatPart::root:
      all.push_back({{Role::embedding}, 0, 0, c.vocab, h, 0, h});
      if (!c.tied_head) all.push_back({{Role::head}, 0, 0, c.vocab, h, offset(group, Role::head), h});
      all.push_back({{Role::final_norm}, 0, 0, 1, h, offset(group, Role::final_norm), h});
      return all;
    case FlatPart::router_bias:
      return {{{Role::correction_bias, group.layer}, 0, 0, 1, c.experts, 0, c.experts}};
    case FlatPart::experts:
      for (int32_t e = 0; e < c.experts; ++e)
        for (const Entry& entry : experts_)
          all.push_back({{entry.role, group.layer, e},
                         0,
                         0,
                         entry.rows,
                         entry.cols,
                         e * expert_elements() + entry.offset,
                         entry.cols});
      return all;
    case FlatPart::dense:
      break;
  }
  // Keys and values of a chunk follow one another; `width` columns each (1: biases, as columns).
  const auto keys_values = [&](Role k, Role v, int64_t at, bool bias) {
    const auto per_chunk = static_cast<int64_t>(kv_heads_.size()) / chunks_.kv_chunks;
    for (int64_t chunk = 0; chunk < chunks_.kv_chunks; ++chunk)
      for (const Role role : {k, v}) {
        const int64_t width = role == k ? c.qk_dim() : c.v_dim();
        for (int64_t i = 0; i < per_chunk; ++i) {
          const int64_t first = kv_heads_[static_cast<size_t>(chunk * per_chunk + i)] * width;
          if (bias)
            all.push_back({{role, group.layer}, 0, first, 1, width, at, width});
          else
            all.push_back({{role, group.layer}, first, 0, width, h, at, h});
          at += width * (bias ? 1 : h);
        }
      }
  };
  for (const Entry& e : dense_[static_cast<size_t>(group.layer)]) switch (e.role) {
      case Role::q:
      case Role::q_b:
        by_rows(e.role, heads_, c.qk_dim(), e.cols, e.offset);
        break;
      case Role::kv_b:
        by_rows(e.role, heads_, c.qk_nope_dim + c.v_head_dim, e.cols, e.offset);
        break;
      case Role::k:
        keys_values(Role::k, Role::v, e.offset, false);
        break;
      case Role::k_bias:
        keys_values(Role::k_bias, Role::v_bias, e.offset, true);
        break;
      case Role::o:
        by_columns(e.role, heads_, c.v_dim(), e.rows, e.offset);
        break;
      case Role::q_bias:
        by_columns(e.role, heads_, c.qk_dim(), 1, e.offset);
        break;
      case Role::sinks:
        by_columns(e.role, heads_, 1, 1, e.offset);
        break;
      case Role::final_norm:
        all.push_back({{e.role}, 0, 0, 1, h, e.offset, h});
        break;
      default:
        all.push_back({{e.role, group.layer}, 0, 0, e.rows, e.cols, e.offset, e.cols});
    }
  return all;
}

}  // namespace mop::program
