#include "kernels/attention.h"

#define CUDNN_FRONTEND_SKIP_JSON_LIB  // graphs are not written to files
#include <cudnn_frontend.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/attention_parts.h"
#include "kernels/check.h"
#include "kernels/elementwise.h"

namespace mop::kernels {
namespace {

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

// Names of the graphs' tensors. Their ragged offsets follow from kOffsets on.
enum Name : int64_t { kQ = 1, kK, kV, kO, kLse, kSinks, kLengths, kDo, kDq, kDk, kDv, kOffsets };

void check_dnn(cudnnStatus_t status, const char* what) {
  if (status != CUDNN_STATUS_SUCCESS)
    throw CudaError(std::string("cuDNN: ") + what + ": " + cudnnGetErrorString(status));
}

std::string text(const AttentionShape& s) {
  return std::to_string(s.batch) + " x " + std::to_string(s.context) + " tokens, " + std::to_string(s.heads) +
         " / " + std::to_string(s.kv_heads) + " heads of " + std::to_string(s.qk_dim) + " / " +
         std::to_string(s.v_dim) + (s.window > 0 ? ", window " + std::to_string(s.window) : "") +
         (s.sinks ? ", sinks" : "") +
         (s.documents > 0 ? ", up to " + std::to_string(s.documents) + " documents" : "");
}

void check_frontend(const fe::error_t& error, const AttentionShape& shape) {
  if (error.is_bad()) throw CudaError("cuDNN: attention of " + text(shape) + ": " + error.err_msg);
}

// Takes pieces of a workspace, or counts what they come to.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<std::byte*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(n) * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  size_t bytes_ = 0;
};

}  // namespace

// A graph of the library's, and what of the workspace is whose.
struct Attention::Plan {
  using Pack = std::unordered_map<int64_t, void*>;

  struct Parts {
    std::byte* library = nullptr;
    float *sinks = nullptr, *partials = nullptr;
    DocumentTable table;
    std::byte *dk = nullptr, *dv = nullptr;  // to be added to the outputs
    size_t bytes = 0;
  };

  AttentionShape shape;
  fe::graph::Graph graph;
  RowStrides strides{};  // of the operands that have ragged offsets
  std::vector<Tensor> offsets;
  int64_t library_bytes = 0;
  bool backward = false, accumulate = false;

  explicit Plan(const AttentionShape& s) : shape(s) {
    graph.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
  }

  bool ragged() const { return shape.documents > 0; }
  int64_t sequences() const { return ragged() ? shape.documents : shape.batch; }

  // The offsets of an operand with this many elements a row; operands with as many share them.
  Tensor offset(int64_t ld) {
    for (int i = 0; i < strides.count; ++i)
      if (strides.ld[i] == ld) return offsets[static_cast<size_t>(i)];
    strides.ld[strides.count++] = ld;
    offsets.push_back(graph.tensor(fe::graph::Tensor_attributes()
                                       .set_uid(kOffsets + strides.count - 1)
                                       .set_data_type(fe::DataType_t::INT64)
                                       .set_dim({sequences() + 1, 1, 1, 1})
                                       .set_stride({1, 1, 1, 1})));
    return offsets.back();
  }

  void place(fe::graph::Tensor_attributes& tensor, Name name, int64_t heads, int64_t width, int64_t ld) {
    tensor.set_uid(name)
        .set_dim({sequences(), heads, shape.context, width})
        .set_stride({shape.context * ld, width, ld, 1});
    if (ragged()) tensor.set_ragged_offset(offset(ld));
  }
  Tensor input(Name name, int64_t heads, int64_t width, int64_t ld) {
    fe::graph::Tensor_attributes tensor;
    place(tensor, name, heads, width, ld);
    return graph.tensor(tensor);
  }
  void output(const Tensor& tensor, Name name, int64_t heads, int64_t width, int64_t ld) {
    tensor->set_output(true);
    place(*tensor, name, heads, width, ld);
  }
  void place_lse(fe::graph::Tensor_attributes& tensor) {
    const int64_t h = shape.heads, c = shape.context;
    tensor.set_uid(kLse).set_data_type(fe::DataType_t::FLOAT).set_dim({sequences(), h, c, 1});
    if (ragged()) {
      tensor.set_stride({c * h, 1, h, 1}).set_ragged_offset(offset(h));
    } else {
      tensor.set_stride({c * h, c, 1, 1});
    }
  }

  // What forward and backward have in common.
  template <class Attributes>
  void mask(Attributes& attributes) {
    attributes.set_attn_scale(static_cast<float>(shape.scale))
        .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
    // A window as wide as the context is none.
    if (shape.window > 0 && shape.window < shape.context)
      attributes.set_diagonal_band_left_bound(static_cast<int>(shape.window));
    if (!ragged()) return;
    const Tensor lengths = graph.tensor(fe::graph::Tensor_attributes()
                                            .set_uid(kLengths)
                                            .set_data_type(fe::DataType_t::INT32)
                                            .set_dim({sequences(), 1, 1, 1})
                                            .set_stride({1, 1, 1, 1}));
    attributes.set_padding_mask(true).set_seq_len_q(lengths).set_seq_len_kv(lengths);
  }

  void build(cudnnHandle_t handle) {
    check_frontend(graph.build(handle, {fe::HeurMode_t::A}), shape);
    check_frontend(graph.get_workspace_size(library_bytes), shape);
  }

  Parts parts(void* workspace) const {
    Pieces pieces(workspace);
    Parts parts;
    parts.library = pieces.take<std::byte>(library_bytes);
    if (shape.sinks) {
      parts.sinks = pieces.take<float>(shape.heads);
      if (backward) parts.partials = pieces.take<float>(sink_partials(shape.rows(), shape.heads));
    }
    if (ragged()) {
      const int64_t n = shape.documents;
      parts.table = {n, pieces.take<int32_t>(n), pieces.take<int32_t>(n + 1),
                     pieces.take<int64_t>((n + 1) * strides.count)};
    }
    if (accumulate) {
      parts.dk = pieces.take<std::byte>(2 * shape.rows() * shape.kv_heads * shape.qk_dim);
      parts.dv = pieces.take<std::byte>(2 * shape.rows() * shape.kv_heads * shape.v_dim);
    }
    parts.bytes = pieces.bytes();
    return parts;
  }

  // Puts what both passes need in front of the library's work, and into its pack.
  void begin(const Parts& parts, const AttentionInputs& in, Pack& pack, cudaStream_t stream) const {
    pack[kQ] = const_cast<void*>(in.q);
    pack[kK] = const_cast<void*>(in.k);
    pack[kV] = const_cast<void*>(in.v);
    if (shape.sinks) take_sinks(in.sinks.values, in.sinks.first, shape.heads, parts.sinks, stream);
    if (!ragged()) return;
    find_documents(in.starts, shape.rows(), parts.table, strides, stream);
    pack[kLengths] = parts.table.lengths;
    for (int i = 0; i < strides.count; ++i)
      pack[kOffsets + i] = parts.table.offsets + i * (shape.documents + 1);
  }

  void run(cudnnHandle_t handle, Pack& pack, const Parts& parts, cudaStream_t stream) const {
    check_dnn(cudnnSetStream(handle, stream), "stream");
    check_frontend(graph.execute(handle, pack, parts.library), shape);
  }
};

Attention::Attention() {
  const size_t loaded = cudnnGetVersion();
  if (loaded < CUDNN_VERSION)
    throw CudaError("cuDNN " + std::to_string(loaded) + " is loaded, but this was built against " +
                    std::to_string(CUDNN_VERSION) + "; put the newer one first in LD_LIBRARY_PATH");
  cudnnHandle_t handle = nullptr;
  check_dnn(cudnnCreate(&handle), "handle");
  handle_ = handle;
}

Attention::~Attention() {
  forward_.clear();
  backward_.clear();
  cudnnDestroy(static_cast<cudnnHandle_t>(handle_));
}

const Attention::Plan& Attention::plan(const AttentionShape& shape) {
  const auto found = forward_.find(shape);
  if (found != forward_.end()) return *found->second;
  auto made = std::make_unique<Plan>(shape);
  Plan& p = *made;
  fe::graph::SDPA_attributes attributes;
  attributes.set_generate_stats(true);
  p.mask(attributes);
  if (shape.sinks)
    attributes.set_sink_token(p.graph.tensor(fe::graph::Tensor_attributes()
                                                 .set_uid(kSinks)
                                                 .set_data_type(fe::DataType_t::FLOAT)
                                                 .set_dim({1, shape.heads, 1, 1})
                                                 .set_stride({shape.heads, 1, 1, 1})));
  const auto [o, lse] = p.graph.sdpa(p.input(kQ, shape.heads, shape.qk_dim, shape.q_ld),
                                     p.input(kK, shape.kv_heads, shape.qk_dim, shape.k_ld),
                                     p.input(kV, shape.kv_heads, shape.v_dim, shape.v_ld), attributes);
  p.output(o, kO, shape.heads, shape.v_dim, shape.o_ld);
  lse->set_output(true);
  p.place_lse(*lse);
  p.build(static_cast<cudnnHandle_t>(handle_));
  return *forward_.emplace(shape, std::move(made)).first->second;
}

// Sinks do not appear: they are part of lse and o, from which the library takes the probabilities and the
// sums that their gradients have in common.
const Attention::Plan& Attention::plan(const AttentionGradientShape& shape) {
  const auto found = backward_.find(shape);
  if (found != backward_.end()) return *found->second;
  const AttentionShape& s = shape.forward;
  // With ragged offsets the library's kernels take those of q for dq.
  if (s.documents > 0 && shape.dq_ld != s.q_ld)
    throw CudaError("attention of several documents: queries and their gradient must have rows of one ld");
  auto made = std::make_unique<Plan>(s);
  Plan& p = *made;
  p.backward = true;
  p.accumulate = shape.accumulate;
  fe::graph::SDPA_backward_attributes attributes;
  p.mask(attributes);
  if (p.ragged()) attributes.set_max_total_seq_len_q(s.rows()).set_max_total_seq_len_kv(s.rows());
  fe::graph::Tensor_attributes lse;
  p.place_lse(lse);
  const auto [dq, dk, dv] =
      p.graph.sdpa_backward(p.input(kQ, s.heads, s.qk_dim, s.q_ld), p.input(kK, s.kv_heads, s.qk_dim, s.k_ld),
                            p.input(kV, s.kv_heads, s.v_dim, s.v_ld), p.input(kO, s.heads, s.v_dim, s.o_ld),
                            p.input(kDo, s.heads, s.v_dim, shape.do_ld), p.graph.tensor(lse), attributes);
  p.output(dq, kDq, s.heads, s.qk_dim, shape.dq_ld);
  p.output(dk, kDk, s.kv_heads, s.qk_dim, shape.accumulate ? s.kv_heads * s.qk_dim : shape.dk_ld);
  p.output(dv, kDv, s.kv_heads, s.v_dim, shape.accumulate ? s.kv_heads * s.v_dim : shape.dv_ld);
  p.build(static_cast<cudnnHandle_t>(handle_));
  return *backward_.emplace(shape, std::move(made)).first->second;
}

void Attention::prepare(const AttentionShape& shape) {
  plan(shape);
}
void Attention::prepare(const AttentionGradientShape& shape) {
  plan(shape);
}
size_t Attention::workspace_bytes(const AttentionShape& shape) {
  return plan(shape).parts(nullptr).bytes;
}
size_t Attention::workspace_bytes(const AttentionGradientShape& shape) {
  return plan(shape).parts(nullptr).bytes;
}

void Attention::forward(const AttentionShape& shape, const AttentionInputs& in, void* o, float* lse,
                        void* workspace, cudaStream_t stream) {
  const Plan& p = plan(shape);
  const Plan::Parts parts = p.parts(workspace);
  Plan::Pack pack;
  p.begin(parts, in, pack, stream);
  pack[kO] = o;
  pack[kLse] = lse;
  if (shape.sinks) pack[kSinks] = parts.sinks;
  p.run(static_cast<cudnnHandle_t>(handle_), pack, parts, stream);
}

void Attention::backward(const AttentionGradientShape& shape, const AttentionInputs& in, const void* o,
                         const void* d_o, const float* lse, const Gradients& out, void* workspace,
                         cudaStream_t stream) {
  const Plan& p = plan(shape);
  const AttentionShape& s = shape.forward;
  const Plan::Parts parts = p.parts(workspace);
  Plan::Pack pack;
  p.begin(parts, in, pack, stream);
  pack[kO] = const_cast<void*>(o);
  pack[kDo] = const_cast<void*>(d_o);
  pack[kLse] = const_cast<float*>(lse);
  pack[kDq] = out.dq;
  pack[kDk] = shape.accumulate ? parts.dk : out.dk;
  pack[kDv] = shape.accumulate ? parts.dv : out.dv;
  p.run(static_cast<cudnnHandle_t>(handle_), pack, parts, stream);
  if (shape.accumulate) {
    const int64_t k_width = s.kv_heads * s.qk_dim, v_width = s.kv_heads * s.v_dim;
    const Type type = Type::bf16;
    add({{parts.dk, type, s.rows(), k_width, k_width},
         {},
         {out.dk, type, s.rows(), k_width, shape.dk_ld},
         true},
        stream);
    add({{parts.dv, type, s.rows(), v_width, v_width},
         {},
         {out.dv, type, s.rows(), v_width, shape.dv_ld},
         true},
        stream);
  }
  if (s.sinks) {
    const int64_t h = s.heads, c = s.context;
    sink_gradient(
        {o, d_o, s.o_ld, shape.do_ld, lse, parts.sinks, s.rows(), h, s.v_dim, c, c * h, p.ragged() ? h : 1,
         p.ragged() ? 1 : c, out.d_sinks, in.sinks.first, out.add_sinks, parts.partials},
        stream);
  }
}

}  // namespace mop::kernels
