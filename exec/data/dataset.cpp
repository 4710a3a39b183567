#include "exec/data/dataset.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "exec/data/permutation.h"
#include "sim/base/error.h"

namespace mop::data {

Dataset::Dataset(const std::string& path, const DatasetOptions& options)
    : options_(options), tokens_(open_tokens(path)) {
  ensure(options.context > 0 && options.context <= std::numeric_limits<int32_t>::max(),
         "a context of tokens");
  if (options.end_of_document && (*options.end_of_document < 0 || *options.end_of_document >= options.vocab))
    throw UserError(
        fmt::format("the end-of-document token {} is beyond the model's vocabulary of {}; choose one "
                    "below that",
                    *options.end_of_document, options.vocab));
  if (tokens() <= context())
    throw UserError(fmt::format(
        "{} has {} token{}, but one sequence needs {} (the context of {} and the last target): give "
        "more data or a shorter context",
        tokens_->name(), tokens(), tokens() == 1 ? "" : "s", context() + 1, context()));
  if (!options.loss_mask.empty()) {
    mask_ = open_tokens(options.loss_mask);
    check_mask();
  }
}

void Dataset::check_mask() const {
  if (mask_->documents() != tokens_->documents())
    throw UserError(fmt::format("{} has {} documents, but {} has {}: the loss mask must be of this data",
                                mask_->name(), mask_->documents(), tokens_->name(), tokens_->documents()));
  for (int64_t document = 1; document <= tokens_->documents(); ++document)
    if (mask_->begin(document) != tokens_->begin(document))
      throw UserError(
          fmt::format("document {} has {} tokens in {}, but {} in {}: the loss mask must be of this data",
                      document - 1, mask_->begin(document) - mask_->begin(document - 1), mask_->name(),
                      tokens_->begin(document) - tokens_->begin(document - 1), tokens_->name()));
}

int64_t Dataset::at(Position position) const {
  if (!options_.shuffle) return position.sequence;
  // An odd factor far from small seeds: neighbouring seeds share no epoch's order.
  const uint64_t seed = options_.seed * 0xd1342543de82ef95 + static_cast<uint64_t>(position.epoch);
  return Permutation(sequences(), seed)(position.sequence);
}

Position Dataset::advance(Position position, int64_t sequences) const {
  const int64_t next = position.sequence + sequences;
  return {position.epoch + next / this->sequences(), next % this->sequences()};
}

int64_t Dataset::begin(int64_t document) const {
  return tokens_->begin(document) + (options_.end_of_document ? document : 0);
}

int64_t Dataset::document_at(int64_t token) const {
  int64_t low = 0, high = tokens_->documents();
  while (high - low > 1) {
    const int64_t middle = std::midpoint(low, high);
    (begin(middle) <= token ? low : high) = middle;
  }
  return low;
}

// Calls visit(document, its first token, its last + 1, first row, rows) for what tokens [first, first +
// count) have of each document; rows count from `first`.
template <typename Visit>
void Dataset::for_documents(int64_t first, int64_t count, Visit visit) const {
  int64_t document = document_at(first);
  for (int64_t row = 0; row < count; ++document) {
    const int64_t end = begin(document + 1);
    const int64_t rows = std::min(count - row, end - (first + row));
    if (rows > 0) visit(document, begin(document), end, static_cast<size_t>(row), static_cast<size_t>(rows));
    row += rows;
  }
}

void Dataset::rows(int64_t sequence, int64_t first, std::span<int32_t> ids, std::span<int32_t> targets,
                   std::span<int32_t> positions) const {
  const auto count = static_cast<int64_t>(ids.size());
  ensure(sequence >= 0 && sequence < sequences() && first >= 0 && first + count <= context(),
         "rows of a sequence");
  ensure(targets.size() == ids.size() && positions.size() == ids.size(), "rows of equal counts");
  const int64_t sequence_begin = sequence * context(), from = sequence_begin + first;
  for_documents(from, count, [&](int64_t document, int64_t begin, int64_t end, size_t row, size_t rows) {
    const int64_t token = from + static_cast<int64_t>(row);
    read_ids(document, token, ids.subspan(row, rows));

    const bool ends = token + static_cast<int64_t>(rows) == end;
    const size_t with_target = ends ? rows - 1 : rows;
    read_ids(document, token + 1, targets.subspan(row, with_target));
    if (ends) targets[row + rows - 1] = kNoTarget;
    if (mask_) {
      const auto mask = positions.subspan(row, with_target);  // free until it is filled below
      read_mask(document, token + 1, mask);
      for (size_t i = 0; i < with_target; ++i)
        if (mask[i] == 0) targets[row + i] = kNoTarget;
    }

    const auto place = positions.subspan(row, rows);
    std::iota(place.begin(), place.end(), static_cast<int32_t>(token - std::max(begin, sequence_begin)));
  });
}

void Dataset::starts(int64_t sequence, std::span<int32_t> starts) const {
  ensure(sequence >= 0 && sequence < sequences() && static_cast<int64_t>(starts.size()) == context(),
         "starts of a sequence");
  for_documents(sequence * context(), context(), [&](int64_t, int64_t, int64_t, size_t row, size_t rows) {
    std::ranges::fill(starts.subspan(row, rows), static_cast<int32_t>(row));
  });
}

void Dataset::sequence(int64_t index, std::span<int32_t> ids, std::span<int32_t> targets,
                       std::span<int32_t> positions, std::span<int32_t> starts) const {
  ensure(static_cast<int64_t>(ids.size()) == context(), "a whole sequence");
  rows(index, 0, ids, targets, positions);
  this->starts(index, starts);
}

// What `from` has of the document's tokens from `first` of the stream on; returns how many. The rest of
// `out`, at most one, is the end-of-document token.
size_t Dataset::read(const Tokens& from, int64_t document, int64_t first, std::span<int32_t> out) const {
  const int64_t token = first - (begin(document) - tokens_->begin(document));
  const auto left = static_cast<size_t>(tokens_->begin(document + 1) - token);
  const size_t count = std::min(out.size(), left);
  from.read(token, out.first(count));
  return count;
}

void Dataset::read_ids(int64_t document, int64_t first, std::span<int32_t> out) const {
  const size_t count = read(*tokens_, document, first, out);
  for (size_t i = 0; i < count; ++i)
    if (out[i] < 0 || out[i] >= options_.vocab)
      throw UserError(
          fmt::format("{}: token {} of document {} (both from 0) is {}, beyond the model's vocabulary "
                      "of {}; tokenize the data for this model",
                      tokens_->name(), first - begin(document) + static_cast<int64_t>(i), document, out[i],
                      options_.vocab));
  if (count < out.size()) out[count] = *options_.end_of_document;
}

void Dataset::read_mask(int64_t document, int64_t first, std::span<int32_t> out) const {
  size_t count = read(*mask_, document, first, out);
  if (count < out.size()) mask_->read(mask_->begin(document + 1) - 1, out.subspan(count++, 1));
  for (size_t i = 0; i < count; ++i)
    if (out[i] != 0 && out[i] != 1)
      throw UserError(
          fmt::format("{}: the loss mask of token {} of document {} (both from 0) is {}; it must be 0 "
                      "or 1",
                      mask_->name(), first - begin(document) + static_cast<int64_t>(i), document, out[i]));
}

}  // namespace mop::data
