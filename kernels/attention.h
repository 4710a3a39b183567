// Causal attention by cuDNN: bf16, grouped queries, sliding windows, sinks, several documents a sequence.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "kernels/matrix.h"

namespace mop::kernels {

// t = batch x context rows, a token each: q(t, heads x qk), k(t, kv_heads x qk), v(t, kv_heads x v), o(t,
// heads x v), lds in elements, multiples of 8. Query i sees the keys from the beginning of its document to i,
// of these the last `window` (0: all). Widths of heads are multiples of 8.
struct AttentionShape {
  int64_t batch = 1, context = 0;
  int64_t heads = 0, kv_heads = 0, qk_dim = 0, v_dim = 0;
  int64_t window = 0;
  double scale = 1;    // of the logits
  bool sinks = false;  // a logit a head that takes part in the softmax only
  // 0: every sequence is one document. Else all t rows are at most this many documents, which begin where
  // `starts` says. Time and memory grow slowly with it: round it up, so that few shapes exist.
  int64_t documents = 0;
  int64_t q_ld = 0, k_ld = 0, v_ld = 0, o_ld = 0;

  int64_t rows() const { return batch * context; }
  auto operator<=>(const AttentionShape&) const = default;
};
struct AttentionGradientShape {
  AttentionShape forward;                              // o_ld: of the output as backward gets it
  int64_t do_ld = 0, dq_ld = 0, dk_ld = 0, dv_ld = 0;  // with documents, dq_ld = q_ld
  bool accumulate = false;                             // dk and dv are added to

  auto operator<=>(const AttentionGradientShape&) const = default;
};

// This rank's heads among the model's: `values` (1, n) bf16 or fp32, of which [first, first + heads) are its
// own.
struct Sinks {
  ConstMatrix values;
  int64_t first = 0;
};

struct AttentionInputs {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const int32_t* starts =
      nullptr;  // (1, t): the first row that each row sees; only read if there are documents
  Sinks sinks;
};

// One object a device and host thread: it owns the library's handle and a plan for each shape that it has
// seen. Plans take up to hundreds of milliseconds: prepare() makes them before the first step. Operands lie
// on 16-byte boundaries. Workspaces lie on 256-byte boundaries and are not shared with work on other streams.
class Attention {
 public:
  // Throws if the cuDNN that is loaded is older than the one this was built against.
  Attention();
  ~Attention();
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  // Throws if the library does not support the shape.
  void prepare(const AttentionShape& shape);
  void prepare(const AttentionGradientShape& shape);
  size_t workspace_bytes(const AttentionShape& shape);  // prepares it
  size_t workspace_bytes(const AttentionGradientShape& shape);

  // o and lse: natural logarithms of the softmaxes' denominators, sinks included, t x heads fp32. Their order
  // is (batch, heads, context), with documents (t, heads).
  void forward(const AttentionShape& shape, const AttentionInputs& in, void* o, float* lse, void* workspace,
               cudaStream_t stream);

  // d_sinks: as sinks.values; zero for the other ranks' heads, or added to. The sums' order is not fixed, but
  // for d_sinks.
  struct Gradients {
    void *dq = nullptr, *dk = nullptr, *dv = nullptr;
    Matrix d_sinks;
    bool add_sinks = false;
  };
  void backward(const AttentionGradientShape& shape, const AttentionInputs& in, const void* o,
                const void* d_o, const float* lse, const Gradients& out, void* workspace,
                cudaStream_t stream);

 private:
  struct Plan;
  const Plan& plan(const AttentionShape& shape);
  const Plan& plan(const AttentionGradientShape& shape);

  void* handle_ = nullptr;
  std::map<AttentionShape, std::unique_ptr<Plan>> forward_;
  std::map<AttentionGradientShape, std::unique_ptr<Plan>> backward_;
};

}  // namespace mop::kernels
