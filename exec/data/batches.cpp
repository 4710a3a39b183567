#include "exec/data/batches.h"

#include <algorithm>

#include "sim/base/error.h"

namespace mop::data {

Batches::Batches(const Sequences& data, const Share& share) : data_(data), share_(share) {
  ensure(share.group >= 0 && (share.group + 1) * share.group_sequences <= share.micro_sequences,
         "a group of the micro-batch");
  ensure(share.rank >= 0 && share.tokens > 0 &&
             (share.rank + 1) * share.tokens <= share.group_sequences * data.context(),
         "a rank's rows are its group's");
}

void Batches::fill(int64_t micro, const interpreter::Batch& batch) {
  const int64_t context = data_.context();
  ensure(micro >= 0 && micro < share_.accumulate, "a micro-batch of the step");
  ensure(static_cast<int64_t>(batch.ids.size()) == share_.tokens &&
             static_cast<int64_t>(batch.starts.size()) == share_.group_sequences * context,
         "a batch of this share");
  const int64_t begin = share_.rank * share_.tokens, end = begin + share_.tokens;  // rows of the group
  for (int64_t s = 0; s < share_.group_sequences; ++s) {
    const int64_t place = micro * share_.micro_sequences + share_.group * share_.group_sequences + s;
    const int64_t sequence = data_.at(data_.advance(first_, place));
    const int64_t row = s * context;

    const auto starts = batch.starts.subspan(static_cast<size_t>(row), static_cast<size_t>(context));
    data_.starts(sequence, starts);
    for (int32_t& start : starts) start += static_cast<int32_t>(row);

    const int64_t first = std::max(begin, row), last = std::min(end, row + context);
    if (first >= last) continue;
    const auto mine = [&](std::span<int32_t> rows) {
      return rows.subspan(static_cast<size_t>(first - begin), static_cast<size_t>(last - first));
    };
    data_.rows(sequence, first - row, mine(batch.ids), mine(batch.targets), mine(batch.positions));
  }
}

}  // namespace mop::data
