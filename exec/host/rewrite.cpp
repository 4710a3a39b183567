#include "exec/host/rewrite.h"

#include <cstring>

namespace mop::host {
namespace {

using Vector [[gnu::vector_size(16)]] = uint64_t;
constexpr int64_t kLine = 64, kStreams = 3;

// The compiler may neither leave the store out nor take another value than memory has.
void rewrite_line(std::byte* line) {
  for (int64_t i = 0; i < kLine; i += static_cast<int64_t>(sizeof(Vector))) {
    Vector value;
    std::memcpy(&value, line + i, sizeof value);
    asm volatile("" : : : "memory");
    std::memcpy(line + i, &value, sizeof value);
  }
}

}  // namespace

void rewrite(std::byte* memory, int64_t bytes, Workers& workers) {
  const int64_t stream = bytes / kStreams / kLine * kLine;
  workers.run([&](int thread) {
    const Range part = part_of(stream, kLine, thread, workers.count());
    for (int64_t at = part.begin; at < part.end; at += kLine)
      for (int64_t s = 0; s < kStreams; ++s) rewrite_line(memory + s * stream + at);
  });
}

}  // namespace mop::host
