#include "tests/exec/interpreter/random_program.h"

#include <algorithm>
#include <vector>

#include "sim/program/builder.h"

namespace mop::test {

using namespace program;

namespace {

struct Held {
  BufferId id;
  int64_t elements;
};

class Generator {
 public:
  Generator(Random& random, int ranks) : random_(random), ranks_(ranks) {}

  StepProgram run() {
    make_groups();
    std::vector<OpId> plans;
    for (int64_t i = between(random_, 2, 5); i > 0; --i) {
      const int64_t n = size();
      persistent_.push_back({b_.persistent("kept", 4 * n, Holds::weights, -1, space()), n});
      readable_.push_back(persistent_.back());
    }
    b_.at(Phase::optimizer, -1);
    deferred();
    b_.at(Phase::forward, 0);
    const int64_t parts = between(random_, 1, 4);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = between(random_, 1, 8); i > 0; --i) anywhere();
      if (between(random_, 0, 3) > 0) plans.push_back(region(static_cast<int>(part)));
    }
    for (int64_t i = between(random_, 0, 6); i > 0; --i) anywhere();
    StepProgram program = b_.finish();
    for (size_t r = 0; r < plans.size(); ++r) program.regions[r + 1].plan = plans[r];
    program.runnable = true;
    return program;
  }

 private:
  void make_groups() {
    std::vector<int64_t> divisors;
    for (int64_t d = 1; d <= ranks_; ++d)
      if (ranks_ % d == 0) divisors.push_back(d);
    for (int i = 0; i < 3; ++i) {
      const int64_t size = pick(divisors);
      std::vector<int64_t> strides;
      for (const int64_t s : divisors)
        if (ranks_ % (s * size) == 0) strides.push_back(s);
      groups_.push_back(b_.group(Axis::shard, size, pick(strides)));
      sizes_.push_back(size);
    }
  }

  template <typename T>
  const T& pick(const std::vector<T>& from) {
    return from[static_cast<size_t>(between(random_, 0, static_cast<int64_t>(from.size()) - 1))];
  }
  int64_t size() { return between(random_, 8, 40); }
  Space space() { return between(random_, 0, 3) == 0 ? Space::host : Space::hbm; }
  Stream stream() { return static_cast<Stream>(between(random_, 0, kStreams - 1)); }

  View whole(const Held& buffer) const {
    return {0, 0, 1, buffer.elements, buffer.elements, 1, 0, Type::i32};
  }
  // The whole buffer, a range of it, a block of rows, or this rank's part of it.
  View part(const Held& buffer, int64_t group_size) {
    switch (between(random_, 0, 3)) {
      case 0: {
        const int64_t from = between(random_, 0, buffer.elements - 1),
                      n = between(random_, 1, buffer.elements - from);
        return {4 * from, 0, 1, n, n, 1, 0, Type::i32};
      }
      case 1:
        return {4, 0, 2, 2, buffer.elements / 2, 1, 0, Type::i32};
      case 2:
        if (group_size <= buffer.elements)
          return {0,
                  4 * (buffer.elements / group_size),
                  1,
                  buffer.elements / group_size,
                  buffer.elements / group_size,
                  1,
                  0,
                  Type::i32};
        [[fallthrough]];
      default:
        return whole(buffer);
    }
  }

  // One operation: reads some of `from`, writes some of `to` in part, and `fresh` whole.
  void op(OpSpec spec, const std::vector<Held>& from, const std::vector<Held>& to,
          const std::vector<Held>& fresh, bool collectives, size_t only_group = SIZE_MAX) {
    int64_t group_size = 1;
    if (between(random_, 0, 3) == 0) {
      const size_t g =
          only_group != SIZE_MAX
              ? only_group
              : static_cast<size_t>(between(random_, 0, static_cast<int64_t>(groups_.size()) - 1));
      spec.group = groups_[g];
      group_size = sizes_[g];
      if (collectives && between(random_, 0, 1) == 0) spec.kind = OpKind::all_gather;
    }
    spec.does.accumulate = between(random_, 0, 1) == 0;
    std::vector<Operand> reads, writes;
    if (!from.empty())
      for (int64_t i = between(random_, 0, 3); i > 0; --i) {
        const Held& buffer = pick(from);
        reads.push_back({buffer.id, part(buffer, group_size)});
      }
    for (const Held& buffer : fresh) writes.push_back({buffer.id, whole(buffer)});
    if (!to.empty() && (fresh.empty() || between(random_, 0, 2) == 0)) {
      const Held& buffer = pick(to);
      writes.push_back({buffer.id, part(buffer, group_size)});
    }
    // What is new has no content to add to.
    if (!fresh.empty()) spec.does.accumulate = false;
    b_.op(spec, reads, writes);
  }

  void deferred() {
    std::vector<Held> own = persistent_;
    for (int64_t i = between(random_, 0, 3); i > 0; --i) {
      OpSpec spec{OpKind::add, stream()};
      spec.does.deferred = true;
      std::vector<Held> fresh;
      if (between(random_, 0, 1) == 0) {
        const int64_t n = size();
        fresh.push_back({b_.buffer("update", 4 * n, Holds::staging, -1, space()), n});
      }
      op(spec, own, persistent_, fresh, true);
      own.insert(own.end(), fresh.begin(), fresh.end());
    }
  }

  void anywhere() {
    std::vector<Held> fresh;
    if (between(random_, 0, 1) == 0) {
      const int64_t n = size();
      fresh.push_back({b_.buffer("value", 4 * n, Holds::other_activations, -1, space()), n});
    }
    op({OpKind::add, stream()}, readable_, readable_, fresh, true);
    readable_.insert(readable_.end(), fresh.begin(), fresh.end());
  }

  OpId region(int layer) {
    const auto g = static_cast<size_t>(between(random_, 0, static_cast<int64_t>(groups_.size()) - 1));
    const Held rounds{b_.buffer("rounds", 4 * 8, Holds::staging, layer), 8};
    OpSpec plan{OpKind::plan_routing, stream()};
    plan.group = groups_[g];
    const Held& counts = pick(readable_);
    const OpId id = b_.op(plan, {{counts.id, whole(counts)}}, {{rounds.id, whole(rounds)}});
    for (int64_t i = between(random_, 0, 2); i > 0; --i) anywhere();

    b_.begin_repeat(layer);
    std::vector<Held> inside = readable_;
    b_.op({OpKind::add, stream()}, {{rounds.id, whole(rounds)}}, {});  // lives until the host has read it
    inside.push_back(rounds);
    for (int64_t i = between(random_, 2, 8); i > 0; --i) {
      std::vector<Held> fresh;
      for (int64_t j = between(random_, 0, 2); j > 0; --j) {
        const int64_t n = size();
        fresh.push_back({between(random_, 0, 3) == 0
                             ? b_.scratch("scratch", 4 * n, Holds::staging, layer)
                             : b_.buffer("round", 4 * n, Holds::staging, layer, space()),
                         n});
      }
      op({OpKind::add, stream()}, inside, inside, fresh, true, g);
      inside.insert(inside.end(), fresh.begin(), fresh.end());
    }
    b_.end_repeat();
    return id;
  }

  Random& random_;
  int ranks_;
  Builder b_;
  std::vector<uint16_t> groups_;
  std::vector<int64_t> sizes_;
  std::vector<Held> persistent_, readable_;
};

}  // namespace

StepProgram random_program(Random& random, int ranks) {
  return Generator(random, ranks).run();
}

}  // namespace mop::test
