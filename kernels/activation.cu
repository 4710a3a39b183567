#include <type_traits>

#include "kernels/activation.h"
#include "kernels/map.cuh"

namespace mop::kernels {
namespace {

__device__ inline float sigmoid(float x) {
  return 1 / (1 + __expf(-x));
}

struct SwiGlu {
  __device__ float value(float gate, float up) const { return gate * sigmoid(gate) * up; }
  __device__ void gradients(float gate, float up, float& d_gate, float& d_up) const {
    const float s = sigmoid(gate);
    d_gate = up * s * (1 + gate * (1 - s));
    d_up = gate * s;
  }
};

struct ClampedSwiGlu {
  float limit, alpha;
  __device__ float value(float gate, float up) const {
    const float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit);
    return (u + 1) * g * sigmoid(alpha * g);
  }
  __device__ void gradients(float gate, float up, float& d_gate, float& d_up) const {
    const float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit), s = sigmoid(alpha * g);
    d_gate = gate <= limit ? (u + 1) * s * (1 + alpha * g * (1 - s)) : 0;
    d_up = fabsf(up) <= limit ? g * s : 0;
  }
};

template <class F>
void with_activation(const Activation& activation, F&& f) {
  activation.clamped ? f(ClampedSwiGlu{activation.limit, activation.alpha}) : f(SwiGlu{});
}

template <int V>
struct GateUp {
  Pack<V> gate, up;
};

template <class T, int V, class A>
struct Forward {
  A activation;
  Rows<const T> gate_up;
  Rows<T> act;
  int64_t width;

  __device__ GateUp<V> load(int64_t row, int64_t col) const {
    const T* const from = gate_up.at(row, col);
    return {kernels::load<V>(from), kernels::load<V>(from + width)};
  }
  __device__ void store(int64_t row, int64_t col, const GateUp<V>& in) const {
    Pack<V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = activation.value(in.gate[i], in.up[i]);
    kernels::store<V>(act.at(row, col), out);
  }
};

// d_gate_up of a pack from weight x d_act
template <int V, class T, class A>
__device__ void store_gradients(const A& activation, const GateUp<V>& in, const Pack<V>& d_act, float weight,
                                T* d_gate, T* d_up) {
  GateUp<V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float by_gate, by_up;
    activation.gradients(in.gate[i], in.up[i], by_gate, by_up);
    out.gate[i] = by_gate * (weight * d_act[i]);
    out.up[i] = by_up * (weight * d_act[i]);
  }
  store<V>(d_gate, out.gate);
  store<V>(d_up, out.up);
}

template <int V>
struct GateUpGradient {
  GateUp<V> in;
  Pack<V> d_act;
};

template <class T, int V, class A>
struct Backward {
  A activation;
  Rows<const T> gate_up, d_act;
  Rows<T> d_gate_up;
  int64_t width;

  __device__ GateUpGradient<V> load(int64_t row, int64_t col) const {
    const T* const from = gate_up.at(row, col);
    return {{kernels::load<V>(from), kernels::load<V>(from + width)}, kernels::load<V>(d_act.at(row, col))};
  }
  __device__ void store(int64_t row, int64_t col, const GateUpGradient<V>& in) const {
    T* const to = d_gate_up.at(row, col);
    store_gradients<V>(activation, in.in, in.d_act, 1, to, to + width);
  }
};

struct NoBiases {};
struct Biases {  // 16 KiB of parameters
  const void* bias[kMostExperts];
  ExpertRows rows[kMostExperts];
  int count = 0;
};

template <class T>
struct Routed {
  Rows<const T> gate_up, d_act, act, dy;
  Rows<T> d_gate_up, weighted;
  const float* weights;
  float* d_weights;
  int64_t rows, width, dy_width;
};

// The bias of a row's expert.
__device__ inline const void* bias_of(const Biases& biases, int64_t row) {
  int low = 0, high = biases.count - 1;  // the last expert that starts at or before the row
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (biases.rows[middle].first <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return biases.bias[low];
}

// A warp a row.
template <class T, int V, class A, class B>
__global__ void __launch_bounds__(kThreads)
    routed_backward(const A activation, const Routed<T> a, const __grid_constant__ B biases) {
  const int lane = threadIdx.x % 32;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (row >= a.rows) return;
  const float weight = a.weights[row];
  float dot = 0;
#pragma unroll 2
  for (int64_t col = lane * V; col < a.width; col += 32 * V) {
    const T* const from = a.gate_up.at(row, col);
    const GateUp<V> in{load<V>(from), load<V>(from + a.width)};
    const Pack<V> d_act = load<V>(a.d_act.at(row, col));
    Pack<V> act = load<V>(a.act.at(row, col));
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dot += act[i] * d_act[i];
      act[i] *= weight;
    }
    store<V>(a.weighted.at(row, col), act);
    T* const to = a.d_gate_up.at(row, col);
    store_gradients<V>(activation, in, d_act, weight, to, to + a.width);
  }
  if constexpr (std::is_same_v<B, Biases>) {
    const T* const bias = static_cast<const T*>(bias_of(biases, row));
    for (int64_t col = lane * V; col < a.dy_width; col += 32 * V) {
      const Pack<V> b = load<V>(bias + col), dy = load<V>(a.dy.at(row, col));
#pragma unroll
      for (int i = 0; i < V; ++i) dot += b[i] * dy[i];
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAllLanes, dot, offset);
  if (lane == 0) a.d_weights[row] = dot;
}

void check_shapes(const ConstMatrix& gate_up, const ConstMatrix& act) {
  require(gate_up.cols == 2 * act.cols && gate_up.rows == act.rows && gate_up.type == act.type,
          "gate and up are each as wide as act");
}

// Halves of gate_up also start at packs.
bool packed_halves(const ConstMatrix& gate_up) {
  return packed(gate_up) && gate_up.cols % (2 * kPack) == 0;
}

}  // namespace

void swiglu(const SwigluArgs& a, cudaStream_t stream) {
  check_shapes(a.gate_up, a.act);
  with_activation(a.activation, [&](const auto& activation) {
    with_type(a.act.type, [&](auto type) {
      using T = typename decltype(type)::type;
      with_pack(packed_halves(a.gate_up) && packed(a.act), [&](auto v) {
        constexpr int V = v();
        const Forward<T, V, std::decay_t<decltype(activation)>> operation{
            activation, Rows<const T>(a.gate_up), Rows<T>(a.act), a.act.cols};
        map<V, 1>(operation, a.act.rows, a.act.cols, stream);
      });
    });
  });
}

void swiglu_bwd(const SwigluBwdArgs& a, cudaStream_t stream) {
  check_shapes(a.gate_up, a.d_act);
  check_shapes(a.d_gate_up, a.d_act);
  with_activation(a.activation, [&](const auto& activation) {
    with_type(a.d_act.type, [&](auto type) {
      using T = typename decltype(type)::type;
      with_pack(packed_halves(a.gate_up) && packed_halves(a.d_gate_up) && packed(a.d_act), [&](auto v) {
        constexpr int V = v();
        const Backward<T, V, std::decay_t<decltype(activation)>> operation{
            activation, Rows<const T>(a.gate_up), Rows<const T>(a.d_act), Rows<T>(a.d_gate_up), a.d_act.cols};
        map<V, 1>(operation, a.d_act.rows, a.d_act.cols, stream);
      });
    });
  });
}

void routed_swiglu_bwd(const RoutedSwigluBwdArgs& a, cudaStream_t stream) {
  check_shapes(a.gate_up, a.d_act);
  check_shapes(a.d_gate_up, a.d_act);
  check_shapes(a.gate_up, a.act);
  check_shapes(a.gate_up, a.weighted);
  require(a.bias_count <= kMostExperts, "a launch takes the biases of at most 1024 experts");
  if (a.act.rows <= 0) return;
  const bool with_bias = a.bias_count > 0;
  bool wide = packed_halves(a.gate_up) && packed_halves(a.d_gate_up) && packed({a.d_act, a.act, a.weighted});
  Biases biases;
  if (with_bias) {
    require(a.dy.rows == a.act.rows && a.dy.type == a.act.type, "every row has its gradient");
    wide &= packed(a.dy);
    int64_t covered = 0;
    for (int e = 0; e < a.bias_count; ++e) {
      if (a.experts[e].rows == 0) continue;
      biases.bias[biases.count] = a.biases[e];
      biases.rows[biases.count++] = a.experts[e];
      wide &= aligned(a.biases[e]);
      covered += a.experts[e].rows;
    }
    require(covered == a.act.rows, "every row has an expert");
  }
  with_activation(a.activation, [&](const auto& activation) {
    with_type(a.act.type, [&](auto type) {
      using T = typename decltype(type)::type;
      with_pack(wide, [&](auto v) {
        constexpr int V = v();
        using A = std::decay_t<decltype(activation)>;
        const Routed<T> kernel{Rows<const T>(a.gate_up),
                               Rows<const T>(a.d_act),
                               Rows<const T>(a.act),
                               Rows<const T>(a.dy),
                               Rows<T>(a.d_gate_up),
                               Rows<T>(a.weighted),
                               a.weights,
                               a.d_weights,
                               a.act.rows,
                               a.act.cols,
                               with_bias ? a.dy.cols : 0};
        const auto blocks = static_cast<unsigned>(ceil_div(a.act.rows, kThreads / 32));
        if (with_bias)
          routed_backward<T, V, A, Biases><<<blocks, kThreads, 0, stream>>>(activation, kernel, biases);
        else
          routed_backward<T, V, A, NoBiases><<<blocks, kThreads, 0, stream>>>(activation, kernel, {});
      });
    });
  });
  check_launch("routed_swiglu_bwd");
}

}  // namespace mop::kernels
