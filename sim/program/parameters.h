// Flat parameter groups: the vectors that a plan shards. A layer's dense weights are one, its experts
// another; a shard is a range of one. The order inside a group is the plan's (heads in the order of their
// chunks and ranks, the embedding by columns), so that every operation reads one block.
#pragma once
#include <cstdint>
#include <vector>

#include "sim/model/tensors.h"
#include "sim/plan/plan.h"

namespace mop::program {

enum class FlatPart : uint8_t {
  embedding,
  dense,    // a layer's attention, norms, router, shared experts or dense feed-forward
  experts,  // its routed experts, one after the other
  head,
  root,         // fsdp2: embedding, final norm and head
  router_bias,  // a layer's correction bias: on every rank, never updated
};

struct FlatGroup {
  FlatPart part = FlatPart::dense;
  int32_t layer = -1;
  auto operator<=>(const FlatGroup&) const = default;
};

// Rows [row, row + rows) and columns [col, col + cols) of a parameter lie in the group from element `offset`
// on, `ld` elements from row to row.
struct Piece {
  model::ParameterId parameter;
  int64_t row = 0, col = 0, rows = 0, cols = 0;
  int64_t offset = 0, ld = 0;
};

// How Ulysses over `ranks` deals the heads, in chunks that are projected, exchanged and attended to in turn.
struct HeadChunks {
  int64_t chunks = 1;
  int64_t heads = 1;        // query heads of a rank in a chunk
  int64_t kv_chunks = 1;    // 1: the first chunk brings all keys and values
  int64_t kv_heads = 1;     // of a rank in such a chunk
  int64_t kv_replicas = 1;  // ranks that a key head goes to
};
HeadChunks head_chunks(const model::ModelConfig& model, int64_t ranks, int64_t chunks);

class ParameterLayout {
 public:
  ParameterLayout(const model::ModelConfig& model, const plan::Plan& plan, const plan::Layout& layout);

  std::vector<FlatGroup> groups() const;
  // What is where in a group; pieces do not overlap. What no piece covers is padding, zero for ever.
  std::vector<Piece> pieces(FlatGroup group) const;
  int64_t elements(FlatGroup group) const;  // to the end of the last piece

  // First element of a parameter in its group; of expert 0 for an expert's. Keys and values: of chunk 0's
  // keys. Errors: InternalError when the group has none.
  int64_t offset(FlatGroup group, model::Role role) const;
  int64_t expert_elements() const;                        // from one expert to the next
  int64_t embedding_columns() const { return columns_; }  // that a rank's shard holds
  const HeadChunks& chunks() const { return chunks_; }

 private:
  struct Entry {
    model::Role role;
    int64_t offset, rows, cols;
  };
  std::vector<Entry> dense_entries(int layer) const;
  std::vector<Entry> expert_entries() const;

  const model::ModelConfig& model_;
  plan::Family family_;
  int64_t shards_ = 1, columns_ = 0;  // of the embedding
  HeadChunks chunks_;
  std::vector<int64_t> heads_, kv_heads_;  // in their order
  std::vector<std::vector<Entry>> dense_;  // by layer
  std::vector<Entry> experts_;
};

}  // namespace mop::program
