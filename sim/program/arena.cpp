#include "sim/program/arena.h"

#include <algorithm>
#include <numeric>

#include "sim/base/error.h"

namespace mop::program {
namespace {

using Clock = std::array<OpId, kStreams>;  // by stream: operations known to have completed, as last index + 1

// Happens-before over two consecutive steps: entry op is this step's, entry op + ops the next step's, whose clocks count
// the operations of the first.
class Order {
 public:
  explicit Order(const StepProgram& program) : ops_(static_cast<OpId>(program.ops.size())) {
    std::vector<uint32_t> start(ops_ + 1, 0);
    for (const Dependency& d : program.dependencies) ++start[d.to + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<const Dependency*> incoming(program.dependencies.size());
    std::vector<uint32_t> at(start.begin(), start.end() - 1);
    for (const Dependency& d : program.dependencies) incoming[at[d.to]++] = &d;

    clocks_.resize(2 * static_cast<size_t>(ops_));
    std::array<OpId, kStreams> last{};  // entry + 1
    for (int step = 0; step < 2; ++step) {
      for (OpId id = 0; id < ops_; ++id) {
        const OpId entry = id + static_cast<OpId>(step) * ops_;
        Clock& clock = clocks_[entry];
        const auto after = [&](OpId before) {
          const Clock& past = clocks_[before];
          for (size_t s = 0; s < kStreams; ++s) clock[s] = std::max(clock[s], past[s]);
          const OpId op = before % ops_;
          auto& known = clock[static_cast<size_t>(program.ops[op].stream)];
          known = std::max(known, before + 1);
        };
        const auto stream = static_cast<size_t>(program.ops[id].stream);
        if (last[stream] != 0) after(last[stream] - 1);
        last[stream] = entry + 1;
        for (uint32_t i = start[id]; i < start[id + 1]; ++i) {
          const Dependency& d = *incoming[i];
          if (d.distance == 0) {
            after(d.from + static_cast<OpId>(step) * ops_);
          } else if (step == 1 && (program.ops[d.from].region == 0 || program.ops[d.from].region != program.ops[id].region)) {
            after(d.from);
          }
        }
      }
    }
    // For every stream, the next operation at or after an index: what is not yet known to be complete.
    for (size_t s = 0; s < kStreams; ++s) next_[s].assign(ops_ + 1, ops_);
    for (OpId id = ops_; id-- > 0;)
      for (size_t s = 0; s < kStreams; ++s)
        next_[s][id] = static_cast<size_t>(program.ops[id].stream) == s ? id : next_[s][id + 1];
  }

  const Clock& clock(OpId op, int step) const { return clocks_[op + static_cast<OpId>(step) * ops_]; }

  // Every operation of the first step with a lower index has completed when `op` of step `step` starts.
  OpId complete_below(OpId op, int step) const {
    OpId below = ops_;
    const Clock& c = clock(op, step);
    for (size_t s = 0; s < kStreams; ++s) below = std::min(below, next_[s][std::min(c[s], ops_)]);
    return below;
  }

 private:
  OpId ops_;
  std::vector<Clock> clocks_;
  std::array<std::vector<OpId>, kStreams> next_;
};

struct Life {
  BufferId buffer;
  int64_t bytes;
  OpId first, last;    // issue order, as an allocator would see it
  OpId opener;         // operation of the first use: every other use comes after it
  Clock users{};       // last user by stream, index + 1
  OpId safe, safe_next;  // complete_below of the opener, in this step and the next
};

bool completed(const Clock& users, const Clock& known) {
  for (size_t s = 0; s < kStreams; ++s)
    if (users[s] > known[s]) return false;
  return true;
}

std::vector<Life> lives(const StepProgram& program, const Order& order, Space space) {
  std::vector<uint32_t> index(program.buffers.size(), kNoBuffer);
  std::vector<Life> all;
  for (OpId id = 0; id < program.ops.size(); ++id) {
    const Op& op = program.ops[id];
    for (uint32_t u = op.uses; u < op.uses + op.use_count; ++u) {
      const BufferId b = program.uses[u].buffer;
      const Buffer& buffer = program.buffers[b];
      if (buffer.space != space || buffer.persistent || buffer.bytes == 0) continue;
      if (index[b] == kNoBuffer) {
        index[b] = static_cast<uint32_t>(all.size());
        all.push_back({b, (buffer.bytes + kAlignment - 1) / kAlignment * kAlignment, buffer.first, buffer.last, id, {},
                       order.complete_below(id, 0), order.complete_below(id, 1)});
      }
      all[index[b]].users[static_cast<size_t>(op.stream)] = id + 1;
    }
  }
  return all;
}

// May the two share bytes? `a` is opened first.
bool disjoint(const Order& order, const Life& a, const Life& b) {
  if (a.last >= b.first) return false;
  const bool this_step = a.last < b.safe || completed(a.users, order.clock(b.opener, 0));
  return this_step && (b.last < a.safe_next || completed(b.users, order.clock(a.opener, 1)));
}

}  // namespace

Arena plan_arena(const StepProgram& program, Space space) {
  Arena arena;
  arena.offset.assign(program.buffers.size(), kNotHere);
  const Order order(program);
  std::vector<Life> all = lives(program, order, space);

  // Live bytes in issue order.
  std::vector<int64_t> change(program.ops.size() + 1, 0);
  int64_t persistent = 0;
  for (BufferId b = 0; b < program.buffers.size(); ++b) {
    const Buffer& buffer = program.buffers[b];
    if (buffer.space != space || !buffer.persistent) continue;
    arena.offset[b] = persistent;
    persistent += (buffer.bytes + kAlignment - 1) / kAlignment * kAlignment;
    arena.live_by_holds[static_cast<size_t>(buffer.holds)] += buffer.bytes;
  }
  for (const Life& life : all) change[life.first] += life.bytes, change[life.last + 1] -= life.bytes;
  int64_t live = persistent;
  arena.live_bytes = persistent;
  for (OpId id = 0; id < program.ops.size(); ++id) {
    live += change[id];
    if (live > arena.live_bytes) arena.live_bytes = live, arena.live_peak = id;
  }
  for (const Life& life : all)
    if (life.first <= arena.live_peak && arena.live_peak <= life.last)
      arena.live_by_holds[static_cast<size_t>(program.buffers[life.buffer].holds)] += life.bytes;

  // Largest first, each at the lowest offset that no conflicting buffer covers.
  std::vector<uint32_t> by_size(all.size());
  std::iota(by_size.begin(), by_size.end(), 0U);
  std::sort(by_size.begin(), by_size.end(), [&](uint32_t x, uint32_t y) {
    return all[x].bytes != all[y].bytes ? all[x].bytes > all[y].bytes : x < y;
  });
  std::vector<std::pair<int64_t, int64_t>> taken;  // offset, end
  std::vector<uint32_t> placed;
  arena.bytes = persistent;
  for (const uint32_t i : by_size) {
    const Life& life = all[i];
    taken.clear();
    for (const uint32_t j : placed) {
      const Life& other = all[j];
      const bool apart = other.opener <= life.opener ? disjoint(order, other, life) : disjoint(order, life, other);
      if (apart) continue;
      const int64_t at = arena.offset[other.buffer];
      taken.emplace_back(at, at + other.bytes);
    }
    std::sort(taken.begin(), taken.end());
    int64_t at = persistent;
    for (const auto& [begin, end] : taken) {
      if (at + life.bytes <= begin) break;
      at = std::max(at, end);
    }
    arena.offset[life.buffer] = at;
    arena.bytes = std::max(arena.bytes, at + life.bytes);
    placed.push_back(i);
  }
  return arena;
}

bool ordered(const StepProgram& program, BufferId before, BufferId after, int steps_later) {
  const Order order(program);
  const Space space = program.buffers[before].space;
  const Life *a = nullptr, *b = nullptr;
  const std::vector<Life> all = lives(program, order, space);
  for (const Life& life : all) {
    if (life.buffer == before) a = &life;
    if (life.buffer == after) b = &life;
  }
  ensure(a != nullptr && b != nullptr, "both buffers are used and in one space");
  return completed(a->users, order.clock(b->opener, steps_later));
}

}  // namespace mop::program
