// Training data as sequences of `context` tokens. The documents stand one after another (each followed by the
// end-of-document token, where one is asked for) in one stream; sequence i is its tokens [i x context,
// (i + 1) x context), and the token after that only as a target. A token's target is the next one of its
// document; a document's last token has none. Attention and positions do not cross documents or sequences.
//
// The order of an epoch is a permutation of the sequences by the seed and the epoch, computed on the fly:
// memory does not grow with the data, which stays on disk (mapped).
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "exec/data/sequences.h"
#include "exec/data/tokens.h"

namespace mop::data {

inline constexpr int32_t kNoTarget = -100;

struct DatasetOptions {
  int64_t context = 0;  // tokens of a sequence
  int64_t vocab = 0;    // of the model
  uint64_t seed = 0;
  bool shuffle = true;  // false: sequences in the order of the data, every epoch
  std::optional<int32_t> end_of_document = {};
  // An indexed dataset with a 0 or 1 for each token of the data, in documents of the same lengths: tokens
  // with 0 are no targets. The end-of-document token goes with the token before it. Empty: all are targets.
  std::string loss_mask = {};
};

// Reading is safe from several threads at once.
class Dataset final : public Sequences {
 public:
  // Opens the text (a file, or a folder of files) or the indexed dataset at `path` (tokens.h). Errors: those
  // of opening; UserError for less than one sequence, an end-of-document token beyond the vocabulary, a loss
  // mask that does not match the data.
  Dataset(const std::string& path, const DatasetOptions& options);

  int64_t context() const override { return options_.context; }
  int64_t tokens() const { return begin(tokens_->documents()); }
  int64_t sequences() const { return (tokens() - 1) / context(); }

  int64_t at(Position position) const override;
  Position advance(Position position, int64_t sequences) const override;

  // Errors: UserError for a token beyond the vocabulary (says where), a mask that is neither 0 nor 1.
  void rows(int64_t sequence, int64_t first, std::span<int32_t> ids, std::span<int32_t> targets,
            std::span<int32_t> positions) const override;
  void starts(int64_t sequence, std::span<int32_t> starts) const override;

  // A whole sequence, (context) each.
  void sequence(int64_t index, std::span<int32_t> ids, std::span<int32_t> targets,
                std::span<int32_t> positions, std::span<int32_t> starts) const;

 private:
  int64_t begin(int64_t document) const;  // in the stream
  int64_t document_at(int64_t token) const;
  template <typename Visit>
  void for_documents(int64_t first, int64_t count, Visit visit) const;
  void read_ids(int64_t document, int64_t first, std::span<int32_t> out) const;
  void read_mask(int64_t document, int64_t first, std::span<int32_t> out) const;
  size_t read(const Tokens& from, int64_t document, int64_t first, std::span<int32_t> out) const;
  void check_mask() const;

  DatasetOptions options_;
  std::unique_ptr<Tokens> tokens_, mask_;
};

}  // namespace mop::data
