// Gated feed-forwards that every token visits: dense layers and shared experts, tile by tile along the
// sequence.
#include <algorithm>

#include "sim/program/native/lowering.h"

namespace mop::program {

namespace {
constexpr int64_t kTile = 8192;  // tokens
}

void NativeLowering::feed_forward(int layer, Component part, GatedRoles roles, int64_t width, BufferId x,
                                  const Gathered& g, const Operand& out, Checkpoint& saved) {
  const int64_t h = c_.hidden;
  const double es = static_cast<double>(es_);
  for (int64_t done = 0; done < n_; done += kTile) {
    const int64_t t = std::min(kTile, n_ - done);
    const Operand hidden = matrix(transient("gate_up", es_ * t * 2 * width, Holds::other_activations, layer),
                                  ct_, t, 2 * width),
                  act = matrix(transient("swiglu", es_ * t * width, Holds::other_activations, layer), ct_, t,
                               width);
    linear(part, matrix(x, ct_, t, h, done * h), weight(g, roles.gate, 2 * width, h), hidden);
    b_.op(local(OpKind::swiglu, part, traffic(t * width, 2 * es, es)), {hidden, {}}, {act});
    linear(part, act, weight(g, roles.down, h, width), row_range(out, done, t));
    if (keeps(layer) != Keeps::nothing) saved.tiles.push_back({hidden, act});
  }
}

void NativeLowering::feed_forward_backward(int layer, Component part, GatedRoles roles, int64_t width,
                                           BufferId x, const Gathered& g, BufferId d_out, const Operand& d_x,
                                           BufferId dw, const Checkpoint& saved) {
  const int64_t h = c_.hidden;
  const double es = static_cast<double>(es_);
  const Operand up = weight(g, roles.gate, 2 * width, h), down = weight(g, roles.down, h, width),
                d_up = gradient(dw, layer, roles.gate, 2 * width, h),
                d_down = gradient(dw, layer, roles.down, h, width);
  for (int64_t done = 0; done < n_; done += kTile) {
    const int64_t t = std::min(kTile, n_ - done);
    const auto own = [&](const char* label, int64_t cols) {
      return matrix(transient(label, es_ * t * cols, Holds::other_activations, layer), ct_, t, cols);
    };
    const Operand rows = matrix(x, ct_, t, h, done * h), d_rows = matrix(d_out, ct_, t, h, done * h);
    GatedTile tile;
    if (keeps(layer) != Keeps::nothing) tile = saved.tiles[static_cast<size_t>(done / kTile)];
    b_.at(Phase::recompute, layer);
    if (keeps(layer) == Keeps::nothing) {
      tile.hidden = own("gate_up", 2 * width);
      linear(part, rows, up, tile.hidden);
    }
    if (keeps(layer) != Keeps::all) {
      tile.act = own("swiglu", width);
      b_.op(local(OpKind::swiglu, part, traffic(t * width, 2 * es, es)), {tile.hidden, {}}, {tile.act});
    }
    b_.at(Phase::backward, layer);
    const auto& [hidden, act] = tile;
    const Operand d_act = own("swiglu_gradient", width);
    gemm(part, d_rows, false, down, false, d_act);
    gemm(part, d_rows, true, act, false, d_down, again(d_down));
    b_.op(local(OpKind::swiglu_bwd, part, traffic(t * width, 3 * es, 2 * es)), {hidden, d_act}, {hidden});
    gemm(part, hidden, true, rows, false, d_up, again(d_up));
    gemm(part, hidden, false, up, false, row_range(d_x, done, t));
  }
}

}  // namespace mop::program
