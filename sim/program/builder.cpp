#include "sim/program/builder.h"

#include <algorithm>

#include "sim/base/error.h"

namespace mop::program {
namespace {

uint64_t hash(const Shape& shape) {
  uint64_t h = 0x9e3779b97f4a7c15ULL;
  for (const int64_t v : shape.v) h = (h ^ static_cast<uint64_t>(v)) * 0xff51afd7ed558ccdULL, h ^= h >> 32;
  return h;
}

}  // namespace

uint16_t Builder::group(Axis axis, int64_t size, int64_t stride) {
  program_.groups.push_back({axis, size, stride});
  return static_cast<uint16_t>(program_.groups.size() - 1);
}

BufferId Builder::buffer(const char* label, int64_t bytes, Holds holds, int layer, Space space) {
  ensure(bytes >= 0, "a buffer has a size");
  program_.buffers.push_back({label, layer, space, holds, false, static_cast<uint8_t>(region_ != 0 ? 2 : 1),
                              region_ != 0 ? 2 * bytes : bytes});
  access_.emplace_back();
  return static_cast<BufferId>(program_.buffers.size() - 1);
}

BufferId Builder::scratch(const char* label, int64_t bytes, Holds holds, int layer) {
  const BufferId id = buffer(label, bytes, holds, layer);
  program_.buffers[id].slots = 1;
  program_.buffers[id].bytes = bytes;
  return id;
}

BufferId Builder::persistent(const char* label, int64_t bytes, Holds holds, int layer, Space space) {
  ensure(region_ == 0, "persistent buffers are made outside of repeat regions");
  const BufferId id = buffer(label, bytes, holds, layer, space);
  program_.buffers[id].persistent = true;
  return id;
}

void Builder::depend(OpId from, OpId to, uint8_t distance) {
  const Op& before = program_.ops[from];
  const Op& after = program_.ops[to];
  if (before.stream == after.stream) return;  // first in, first out
  if (distance == 0) {
    auto& clock = clocks_[to];
    auto& known = clock[static_cast<size_t>(before.stream)];
    if (known > from) return;  // already implied
    const auto& past = clocks_[from];
    for (size_t s = 0; s < kStreams; ++s) clock[s] = std::max(clock[s], past[s]);
    known = std::max(known, from + 1);
  }
  program_.dependencies.push_back({from, to, distance});
}

OpId Builder::op(const OpSpec& spec, std::span<const Operand> reads, std::span<const Operand> writes) {
  const OpId id = static_cast<OpId>(program_.ops.size());
  uint32_t shape = 0;
  auto& same_hash = shape_index_[hash(spec.shape)];
  const auto found = std::find_if(same_hash.begin(), same_hash.end(),
                                  [&](uint32_t i) { return program_.shapes[i] == spec.shape; });
  if (found != same_hash.end()) {
    shape = *found;
  } else {
    shape = static_cast<uint32_t>(program_.shapes.size());
    program_.shapes.push_back(spec.shape);
    same_hash.push_back(shape);
  }
  program_.ops.push_back({spec.kind, spec.stream, phase_, spec.component, layer_, spec.group, spec.kernels,
                          region_, spec.blocking, spec.eager, spec.routed, spec.does, shape,
                          static_cast<uint32_t>(program_.uses.size()),
                          static_cast<uint32_t>(reads.size() + writes.size())});

  auto& clock = clocks_.emplace_back();
  const auto stream = static_cast<size_t>(spec.stream);
  if (const OpId before = last_on_stream_[stream]; before != 0) {
    clock = clocks_[before - 1];
    clock[stream] = before;
  }
  last_on_stream_[stream] = id + 1;

  const auto use = [&](const Operand& operand, bool write) {
    const BufferId b = operand.buffer;
    program_.uses.push_back({b, write, operand.view});
    if (b == kNoBuffer) return;
    Buffer& buffer = program_.buffers[b];
    if (buffer.first == kNoOp) buffer.first = id;
    buffer.last = std::max(buffer.last, id);
    Access& access = access_[b];
    if (access.writer != kNoOp && access.writer != id) depend(access.writer, id, 0);
    if (!write) {
      access.readers.push_back(id);
      return;
    }
    for (const OpId reader : access.readers)
      if (reader != id) depend(reader, id, 0);
    access.readers.clear();
    access.writer = id;
  };
  for (const Operand& operand : reads) use(operand, false);
  for (const Operand& operand : writes) use(operand, true);
  return id;
}

void Builder::touch(BufferId b) {
  ensure(!program_.ops.empty() && region_ == 0, "touch follows an operation, outside of repeat regions");
  program_.buffers[b].last = std::max(program_.buffers[b].last, static_cast<OpId>(program_.ops.size() - 1));
}

void Builder::begin_repeat(int layer, OpId plan) {
  ensure(region_ == 0, "repeat regions do not nest");
  program_.regions.push_back({static_cast<OpId>(program_.ops.size()), 0, static_cast<int16_t>(layer), plan});
  region_ = static_cast<uint32_t>(program_.regions.size() - 1);
}

void Builder::end_repeat() {
  ensure(region_ != 0, "end_repeat closes a repeat region");
  Region& region = program_.regions[region_];
  region.last = static_cast<OpId>(program_.ops.size());
  carry(region.first, region.last);
  // A round's copy is reused by later rounds: the buffers of a body live as long as the whole region.
  for (OpId id = region.first; id < region.last; ++id) {
    const Op& op = program_.ops[id];
    for (const Use& use : program_.uses_of(op)) {
      Buffer& buffer = program_.buffers[use.buffer];
      if (buffer.first > region.first) buffer.first = region.first;
      buffer.last = std::max(buffer.last, region.last - 1);
    }
  }
  region_ = 0;
}

// Hazards between one iteration of operations [first, last) and the next: every buffer's accesses of the next
// iteration, up to its first write, against the state that this iteration leaves behind.
void Builder::carry(OpId first, OpId last) {
  std::vector<bool> overwritten(program_.buffers.size());
  for (OpId id = first; id < last; ++id) {
    const Op& op = program_.ops[id];
    for (const Use& use : program_.uses_of(op)) {
      if (overwritten[use.buffer]) continue;
      const Access& left = access_[use.buffer];
      const uint8_t distance = region_ != 0 ? program_.buffers[use.buffer].slots : uint8_t{1};
      // At the end of the step, a pair of one region is left to the region's own distances.
      const auto carried = [&](OpId from) {
        if (from < first || (region_ == 0 && op.region != 0 && program_.ops[from].region == op.region))
          return;
        depend(from, id, distance);
      };
      if (left.writer != kNoOp) carried(left.writer);
      if (!use.write) continue;
      for (const OpId reader : left.readers) carried(reader);
      overwritten[use.buffer] = true;
    }
  }
}

StepProgram Builder::finish() {
  ensure(region_ == 0, "every repeat region is closed");
  carry(0, static_cast<OpId>(program_.ops.size()));
  return std::move(program_);
}

}  // namespace mop::program
