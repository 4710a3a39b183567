#include <cmath>

#include "exec/cpu/operations.h"
#include "exec/cpu/routing.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {
namespace {

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// act = f(gate, up), and its partial derivatives.
struct SwiGlu {
  double value(double gate, double up) const { return gate * sigmoid(gate) * up; }
  void gradients(double gate, double up, double& d_gate, double& d_up) const {
    const double s = sigmoid(gate);
    d_gate = up * s * (1 + gate * (1 - s));
    d_up = gate * s;
  }
};

struct ClampedSwiGlu {
  double limit, alpha;
  double value(double gate, double up) const {
    gate = std::min(gate, limit);
    return (std::clamp(up, -limit, limit) + 1) * gate * sigmoid(alpha * gate);
  }
  void gradients(double gate, double up, double& d_gate, double& d_up) const {
    const double g = std::min(gate, limit), u = std::clamp(up, -limit, limit), s = sigmoid(alpha * g);
    d_gate = gate <= limit ? (u + 1) * s * (1 + alpha * g * (1 - s)) : 0;
    d_up = std::abs(up) <= limit ? g * s : 0;
  }
};

// Calls f with the call's function.
template <typename F>
void with_activation(const Call& call, const Constants& constants, F f) {
  if (call.op->kind == program::OpKind::clamped_swiglu ||
      call.op->kind == program::OpKind::clamped_swiglu_bwd)
    f(ClampedSwiGlu{constants.model.swiglu_limit, constants.model.swiglu_alpha});
  else
    f(SwiGlu{});
}

// Calls f(n, part...) with the same pieces of every run.
template <typename F, typename... R>
void pieces(int64_t width, F f, const R&... runs) {
  for (int64_t at = 0; at < width; at += kPiece) {
    const int64_t n = std::min(kPiece, width - at);
    f(n, runs.part(at, n)...);
  }
}

double dot(const Run& a, const Run& b) {
  double sum = 0;
  Piece x, y;
  pieces(
      a.n,
      [&](int64_t n, const Run& left, const Run& right) {
        load(left, x.data());
        load(right, y.data());
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) sum += static_cast<double>(x[i]) * y[i];
      },
      a, b);
  return sum;
}

void multiply(const Run& run, float factor) {
  Piece x;
  pieces(
      run.n,
      [&](int64_t n, const Run& part) {
        load(part, x.data());
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) x[i] *= factor;
        store(x.data(), part);
      },
      run);
}

// d_gate_up of one row, from weight x d_act.
template <typename Activation>
void row_bwd(const Activation& activation, const Run& gate_up, const Run& d_act, float weight,
             const Run& d_gate_up) {
  const int64_t width = d_act.n;
  Piece gate, up, d;
  pieces(
      width,
      [&](int64_t n, const Run& g, const Run& u, const Run& da, const Run& dg, const Run& du) {
        load(g, gate.data());
        load(u, up.data());
        load(da, d.data());
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
          double by_gate = 0, by_up = 0;
          activation.gradients(gate[i], up[i], by_gate, by_up);
          const double gradient = static_cast<double>(weight) * d[i];
          gate[i] = static_cast<float>(by_gate * gradient);
          up[i] = static_cast<float>(by_up * gradient);
        }
        store(gate.data(), dg);
        store(up.data(), du);
      },
      gate_up.part(0, width), gate_up.part(width, width), d_act, d_gate_up.part(0, width),
      d_gate_up.part(width, width));
}

}  // namespace

void swiglu(const Call& call, const Constants& constants) {
  const Operand &gate_up = required(call.in, 0), &act = required(call.out, 0);
  const Operand rounds = optional(call.in, 1);
  const int64_t width = act.view.cols;
  ensure(gate_up.view.cols == 2 * width && rows(gate_up) == rows(act), "gate and up are as wide as act");
  const int64_t count = rounds ? rows_of_round(call, rounds) : rows(act);
  Piece gate, up;
  with_activation(call, constants, [&](const auto& activation) {
    for (int64_t r = 0; r < count; ++r) {
      const Run from = row(gate_up, r);
      pieces(
          width,
          [&](int64_t n, const Run& g, const Run& u, const Run& to) {
            load(g, gate.data());
            load(u, up.data());
            for (size_t i = 0; i < static_cast<size_t>(n); ++i)
              gate[i] = static_cast<float>(activation.value(gate[i], up[i]));
            store(gate.data(), to);
          },
          from.part(0, width), from.part(width, width), row(act, r));
    }
  });
}

void swiglu_bwd(const Call& call, const Constants& constants) {
  const Operand &gate_up = required(call.in, 0), &d_act = required(call.in, 1);
  const Operand rounds = optional(call.in, 2), weights = optional(call.in, 3), act = optional(call.in, 4),
                dy = optional(call.in, 5), own_bias = optional(call.in, 6),
                spilled_bias = optional(call.in, 7);
  const Operand& d_gate_up = required(call.out, 0);
  const int64_t width = d_act.view.cols;
  ensure(gate_up.view.cols == 2 * width && d_gate_up.view.cols == 2 * width && rows(gate_up) == rows(d_act) &&
             rows(d_gate_up) == rows(d_act),
         "gate and up are as wide as act");
  const int64_t count = rounds ? rows_of_round(call, rounds) : rows(d_act);

  // The gate weight acts on the expert's output, act W_down + bias.
  if (weights) {
    const Operand &weighted = required(call.out, 1), &d_weights = required(call.out, 2);
    const auto finish = [&](int64_t first, int64_t last, const Run* bias) {
      for (int64_t r = first; r < last; ++r) {
        double d_weight = dot(row(act, r), row(d_act, r));
        if (bias != nullptr) d_weight += dot(*bias, row(dy, r));
        const float gradient = static_cast<float>(d_weight);
        store(&gradient, row(d_weights, 0).part(r, 1));
      }
    };
    if (own_bias) {
      for_each_expert(call, rounds, [&](int64_t first, int64_t last, int expert, int slot) {
        const Run bias = expert >= 0 ? row(own_bias, expert) : row(spilled_bias, slot);
        finish(first, last, &bias);
      });
    } else {
      finish(0, count, nullptr);
    }
    for (int64_t r = 0; r < count; ++r) {
      float weight = 0;
      load(row(weights, 0).part(r, 1), &weight);
      convert(row(act, r), row(weighted, r));
      multiply(row(weighted, r), weight);
    }
  }
  with_activation(call, constants, [&](const auto& activation) {
    for (int64_t r = 0; r < count; ++r) {
      float weight = 1;
      if (weights) load(row(weights, 0).part(r, 1), &weight);
      row_bwd(activation, row(gate_up, r), row(d_act, r), weight, row(d_gate_up, r));
    }
  });
}

}  // namespace mop::cpu
