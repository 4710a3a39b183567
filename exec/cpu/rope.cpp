#include "sim/model/rope.h"

#include <algorithm>

#include "exec/cpu/operations.h"
#include "exec/cpu/rms.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {
namespace {

struct Heads {
  int64_t width, first, rotated;  // elements of a head; those rotated
  explicit Heads(const program::Does& does) : width(does.a), first(does.b), rotated(does.c) {}
};

void check(const Heads& heads, const Operand& x, const model::Rope& rope) {
  ensure(heads.rotated == rope.width && heads.first + heads.rotated <= heads.width &&
             x.view.cols % heads.width == 0,
         "rotated elements lie inside a head and are as many as the model rotates");
}

// Rotates all heads of a token; direction -1: the transposed rotation.
void rotate(float* x, int64_t cols, const Heads& heads, const model::Rope& rope, int64_t position,
            float direction) {
  ensure(position >= 0 && position < rope.positions, "positions lie inside the context");
  const int64_t pairs = rope.width / 2;
  const float* const cos = rope.cos.data() + position * pairs;
  const float* const sin = rope.sin.data() + position * pairs;
  const int64_t step = rope.interleaved ? 2 : 1, partner = rope.interleaved ? 1 : pairs;
  for (float* head = x + heads.first; head < x + cols; head += heads.width) {
    for (int64_t i = 0; i < pairs; ++i) {
      float &first = head[i * step], &second = head[i * step + partner];
      const float s = direction * sin[i], was = first;
      first = was * cos[i] - second * s;
      second = second * cos[i] + was * s;
    }
  }
}

}  // namespace

void rope(const Call& call, const Constants& constants, Workspace& workspace) {
  const Operand &x = required(call.in, 0), &y = required(call.out, 0);
  const std::span<const int32_t> positions = integers(required(call.in, 1));
  const Operand weight = optional(call.in, 2);
  const Heads heads(call.op->does);
  const int64_t cols = x.view.cols, d = weight ? weight.view.cols : 0, tokens = std::ssize(positions);
  check(heads, x, constants.rope);
  ensure((!weight || cols % d == 0) && rows(x) % tokens == 0 && rows(y) == rows(x) && y.view.cols == cols,
         "a rotation keeps the shape");
  float* const w = workspace.take<float>(d).data();
  float* const values = workspace.take<float>(cols).data();
  if (weight) load(row(weight, 0), w);
  for (int64_t r = 0; r < rows(x); ++r) {
    load(row(x, r), values);
    for (int64_t i = 0; weight && i < cols; i += d)
      rms_normalise(values + i, w, d, constants.model.norm_eps, values + i);
    rotate(values, cols, heads, constants.rope, positions[static_cast<size_t>(r % tokens)], 1);
    store(values, row(y, r));
  }
}

void rope_bwd(const Call& call, const Constants& constants, Workspace& workspace) {
  const Operand &dy = required(call.in, 0), &dx = required(call.out, 0);
  const std::span<const int32_t> positions = integers(required(call.in, 1));
  const Operand weight = optional(call.in, 3);
  const Heads heads(call.op->does);
  const int64_t cols = dy.view.cols, d = weight ? weight.view.cols : 0, tokens = std::ssize(positions);
  check(heads, dy, constants.rope);
  ensure((!weight || cols % d == 0) && rows(dy) % tokens == 0 && rows(dx) == rows(dy) && dx.view.cols == cols,
         "a rotation keeps the shape");
  float* const w = workspace.take<float>(d).data();
  float* const values = workspace.take<float>(cols).data();
  float* const gradient = workspace.take<float>(cols).data();
  double* const dw = workspace.take<double>(d).data();
  if (weight) load(row(weight, 0), w);
  std::fill(dw, dw + d, 0.0);
  for (int64_t r = 0; r < rows(dy); ++r) {
    load(row(dy, r), gradient);
    rotate(gradient, cols, heads, constants.rope, positions[static_cast<size_t>(r % tokens)], -1);
    if (weight) {
      load(row(required(call.in, 2), r), values);
      for (int64_t i = 0; i < cols; i += d)
        rms_normalise_bwd(gradient + i, values + i, w, d, constants.model.norm_eps, gradient + i, dw);
    }
    store(gradient, row(dx, r));
  }
  if (!weight) return;
  for (int64_t i = 0; i < d; ++i) w[i] = static_cast<float>(dw[i]);
  store(w, row(required(call.out, 1), 0), call.op->does.accumulate);
}

void mla_keys(const Call& call) {
  const Operand &kv = required(call.in, 0), &k_rope = required(call.in, 1);
  const Operand &k = required(call.out, 0), &v = required(call.out, 1);
  const int64_t nope = call.op->does.a, value = call.op->does.b, rotary = call.op->does.c;
  const int64_t heads = kv.view.cols / (nope + value);
  ensure(kv.view.cols == heads * (nope + value) && k.view.cols == heads * (nope + rotary) &&
             v.view.cols == heads * value && k_rope.view.cols == rotary,
         "keys and values have the widths of ops.h");
  for (int64_t r = 0; r < rows(kv); ++r) {
    const Run from = row(kv, r), key = row(k, r), values = row(v, r);
    for (int64_t h = 0; h < heads; ++h) {
      convert(from.part(h * (nope + value), nope), key.part(h * (nope + rotary), nope));
      convert(row(k_rope, r), key.part(h * (nope + rotary) + nope, rotary));
      convert(from.part(h * (nope + value) + nope, value), values.part(h * value, value));
    }
  }
}

void mla_keys_bwd(const Call& call, Workspace& workspace) {
  const Operand &dk = required(call.in, 0), &dv = required(call.in, 1);
  const Operand &dkv = required(call.out, 0), &dk_rope = required(call.out, 1);
  const int64_t nope = call.op->does.a, value = call.op->does.b, rotary = call.op->does.c;
  const int64_t heads = dkv.view.cols / (nope + value);
  ensure(dkv.view.cols == heads * (nope + value) && dk.view.cols == heads * (nope + rotary) &&
             dv.view.cols == heads * value && dk_rope.view.cols == rotary,
         "keys and values have the widths of ops.h");
  float* const sum = workspace.take<float>(rotary).data();
  float* const part = workspace.take<float>(rotary).data();
  for (int64_t r = 0; r < rows(dkv); ++r) {
    const Run key = row(dk, r), values = row(dv, r), to = row(dkv, r);
    std::fill(sum, sum + rotary, 0.0F);
    for (int64_t h = 0; h < heads; ++h) {
      convert(key.part(h * (nope + rotary), nope), to.part(h * (nope + value), nope));
      convert(values.part(h * value, value), to.part(h * (nope + value) + nope, value));
      load(key.part(h * (nope + rotary) + nope, rotary), part);
      for (int64_t i = 0; i < rotary; ++i) sum[i] += part[i];
    }
    store(sum, row(dk_rope, r), call.op->does.accumulate);
  }
}

}  // namespace mop::cpu
