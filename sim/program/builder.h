// Builds a StepProgram. Operations are issued in order; dependencies follow from the buffers that they read
// and write (read after write, write after read, write after write), across streams, across the rounds of a
// repeat region and across steps. A lowering never writes an edge by hand.
#pragma once
#include <initializer_list>
#include <span>
#include <unordered_map>
#include <vector>

#include "sim/program/program.h"

namespace mop::program {

// An operand of a new operation: a buffer, and what part of it (ops.h).
struct Operand {
  BufferId buffer = kNoBuffer;
  View view{};
  Operand() = default;
  Operand(BufferId whole) : buffer(whole) {}  // NOLINT: a program without views names buffers
  Operand(BufferId in, View part) : buffer(in), view(part) {}
};

struct OpSpec {
  OpKind kind;
  Stream stream = Stream::compute;
  Component component = Component::other;
  Shape shape{};
  uint16_t group = kNoGroup;
  uint16_t kernels = 1;
  bool blocking = false;
  bool eager = false;
  Routed routed = Routed::no;
  Does does{};
};

class Builder {
 public:
  uint16_t group(Axis axis, int64_t size, int64_t stride);
  BufferId buffer(const char* label, int64_t bytes, Holds holds, int layer = -1, Space space = Space::hbm);
  BufferId persistent(const char* label, int64_t bytes, Holds holds, int layer = -1,
                      Space space = Space::hbm);

  const Buffer& at(BufferId id) const { return program_.buffers[id]; }

  // The phase and layer of the operations that follow.
  void at(Phase phase, int layer) { phase_ = phase, layer_ = static_cast<int16_t>(layer); }

  Phase phase() const { return phase_; }

  OpId op(const OpSpec& spec, std::span<const Operand> reads, std::span<const Operand> writes);
  OpId op(const OpSpec& spec, std::initializer_list<Operand> reads, std::initializer_list<Operand> writes) {
    return op(spec, std::span(reads.begin(), reads.size()), std::span(writes.begin(), writes.size()));
  }

  // In a repeat region: scratch that only one stream uses, so that all rounds may share it.
  BufferId scratch(const char* label, int64_t bytes, Holds holds, int layer = -1);

  // Between begin and end: the body of a repeat region. Buffers created inside have two slots, one a round in
  // turn, so that a round may start while the one before it is still being computed.
  // `plan`: the plan_routing whose rounds are repeated.
  void begin_repeat(int layer, OpId plan = kNoOp);
  void end_repeat();

  // Keeps a buffer alive until this point (an allocator that frees later than the last use).
  void touch(BufferId buffer);

  StepProgram finish();

 private:
  struct Access {  // state of one buffer's hazards
    OpId writer = kNoOp;
    std::vector<OpId> readers;
  };
  void depend(OpId from, OpId to, uint8_t distance);
  void carry(OpId first, OpId last);

  StepProgram program_;
  std::vector<Access> access_;
  std::vector<std::array<OpId, kStreams>>
      clocks_;  // per op: latest op of each stream known to have completed, +1
  std::array<OpId, kStreams> last_on_stream_{};
  std::unordered_map<uint64_t, std::vector<uint32_t>> shape_index_;
  Phase phase_ = Phase::forward;
  int16_t layer_ = -1;
  uint32_t region_ = 0;
};

}  // namespace mop::program
