// Reduce-scatters of gradients by copy engines, within a node: every rank writes its parts into the landing zones of the
// others, a piece at a time, and each sums what has landed.
#pragma once
#include <cstdint>

#include "sim/program/program.h"

namespace mop::program {

// Of a rank. Each piece's sum waits for multiprocessors, behind a product of a millisecond: pieces are few.
inline constexpr int64_t kLandingBytes = int64_t{512} << 20;
inline constexpr int64_t kMostLanding = 8;                    // ranks of a group

// Whether an operation reduces that way where its group is within a node. Those of other streams are small.
inline bool lands(const Op& op, const plan::Span& group) {
  return op.kind == OpKind::reduce_scatter && op.stream == Stream::gather && group.size > 1 && group.size <= kMostLanding;
}

}  // namespace mop::program
