// All-gathers and reduce-scatters by copy engines, within a node: every rank writes its part into the others'
// arenas, or its parts of a gradient into their landing zones, a piece at a time, where each sums what has
// landed.
#pragma once
#include <algorithm>
#include <cstdint>

#include "sim/program/program.h"

namespace mop::program {

// Of a rank. Each piece's sum waits for multiprocessors, behind a product of a millisecond: pieces are few.
inline constexpr int64_t kLandingBytes = int64_t{512} << 20;
inline constexpr int64_t kMostLanding = 8;  // ranks of a group

// How many bytes of a part land at a time, and in how many pieces all of it does.
inline int64_t landing_slot(int64_t ranks) {
  return kLandingBytes / (ranks - 1) / 256 * 256;
}
inline int64_t landing_pieces(int64_t part_bytes, int64_t ranks) {
  return std::max<int64_t>(1, (part_bytes + landing_slot(ranks) - 1) / landing_slot(ranks));
}

// Whether an operation reduces that way where its group is within a node. Those of other streams are small.
inline bool lands(const Op& op, const plan::Span& group) {
  return op.kind == OpKind::reduce_scatter && op.stream == Stream::gather && group.size > 1 &&
         group.size <= kMostLanding;
}

// Whether a collective goes that way where its group is within a node; else it is NCCL's: small ones, on
// other streams, would queue behind large ones in the copy engines.
inline bool by_copy_engines(const Op& op, const plan::Span& group) {
  return op.stream == Stream::gather && (op.kind == OpKind::all_gather || lands(op, group));
}
// The same of a program that runs, which says where the result has to lie.
bool by_copy_engines(const StepProgram& program, const Op& op);

}  // namespace mop::program
