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
    for (OpId id = 0; id < ops_; ++id)
      by_stream_[static_cast<size_t>(program.ops[id].stream)].emplace_back(id, complete_below(id, 0));
  }

  const Clock& clock(OpId op, int step) const { return clocks_[op + static_cast<OpId>(step) * ops_]; }

  // Every operation of the first step with a lower index has completed when `op` of step `step` starts.
  OpId complete_below(OpId op, int step) const {
    OpId below = ops_;
    const Clock& c = clock(op, step);
    for (size_t s = 0; s < kStreams; ++s) below = std::min(below, next_[s][std::min(c[s], ops_)]);
    return below;
  }

  // No operation at or after the result starts before everything up to `op` has completed. On one stream complete_below
  // never falls, so each stream is searched by halving.
  OpId all_wait_from(OpId op) const {
    OpId from = 0;
    for (const auto& stream : by_stream_) {
      const auto found = std::partition_point(stream.begin(), stream.end(), [&](const auto& entry) { return entry.second <= op; });
      if (found != stream.begin()) from = std::max(from, std::prev(found)->first + 1);
    }
    return from;
  }

 private:
  OpId ops_;
  std::vector<Clock> clocks_;
  std::array<std::vector<OpId>, kStreams> next_;
  std::array<std::vector<std::pair<OpId, OpId>>, kStreams> by_stream_;  // operation, complete_below
};

struct Life {
  BufferId buffer;
  int64_t bytes;
  OpId first, last;    // issue order, as an allocator would see it
  OpId opener;         // operation of the first use: every other use comes after it
  Clock users{};       // last user by stream, index + 1
  OpId safe, safe_next;  // complete_below of the opener, in this step and the next
  OpId reach = 0;        // openers from here on never conflict within the step
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
  for (Life& life : all) life.reach = std::max(life.opener + 1, order.all_wait_from(life.last));
  return all;
}

// May the two share bytes? `a` is opened first.
bool disjoint(const Order& order, const Life& a, const Life& b) {
  if (a.last >= b.first) return false;
  const bool this_step = a.last < b.safe || completed(a.users, order.clock(b.opener, 0));
  return this_step && (b.last < a.safe_next || completed(b.users, order.clock(a.opener, 1)));
}

bool apart(const Order& order, const Life& a, const Life& b) {
  return a.opener <= b.opener ? disjoint(order, a, b) : disjoint(order, b, a);
}

void measure_live_bytes(const StepProgram& program, const std::vector<Life>& all, Space space, Arena& arena) {
  std::vector<int64_t> change(program.ops.size() + 1, 0);
  int64_t live = 0;
  for (BufferId b = 0; b < program.buffers.size(); ++b) {
    const Buffer& buffer = program.buffers[b];
    if (buffer.space != space || !buffer.persistent) continue;
    arena.offset[b] = live;
    live += (buffer.bytes + kAlignment - 1) / kAlignment * kAlignment;
    arena.live_by_holds[static_cast<size_t>(buffer.holds)] += buffer.bytes;
  }
  arena.bytes = arena.live_bytes = live;
  for (const Life& life : all) change[life.first] += life.bytes, change[life.last + 1] -= life.bytes;
  for (OpId id = 0; id < program.ops.size(); ++id) {
    live += change[id];
    if (live > arena.live_bytes) arena.live_bytes = live, arena.live_peak = id;
  }
  for (const Life& life : all)
    if (life.first <= arena.live_peak && arena.live_peak <= life.last)
      arena.live_by_holds[static_cast<size_t>(program.buffers[life.buffer].holds)] += life.bytes;
}

Arena plan(const StepProgram& program, const Order& order, Space space) {
  Arena arena;
  arena.offset.assign(program.buffers.size(), kNotHere);
  const std::vector<Life> all = lives(program, order, space);
  measure_live_bytes(program, all, space, arena);
  const int64_t base = arena.bytes;

  // Largest first, each at the lowest offset that no conflicting buffer covers. Buffers that live briefly can conflict only
  // with neighbours in issue order, which keeps the cost near linear; the few that live long are looked at by all.
  const auto ops = static_cast<OpId>(program.ops.size());
  const OpId window = std::max<OpId>(64, ops / 64);
  std::vector<uint32_t> brief, lasting;  // brief: in order of their openers
  for (uint32_t i = 0; i < all.size(); ++i) {
    const bool is_brief = all[i].reach - all[i].opener <= window && all[i].safe_next == ops;
    (is_brief ? brief : lasting).push_back(i);
  }
  std::vector<uint32_t> by_size(all.size());
  std::iota(by_size.begin(), by_size.end(), 0U);
  std::sort(by_size.begin(), by_size.end(), [&](uint32_t x, uint32_t y) {
    return all[x].bytes != all[y].bytes ? all[x].bytes > all[y].bytes : x < y;
  });
  std::vector<int64_t> offset(all.size(), kNotHere);
  std::vector<std::pair<int64_t, int64_t>> taken;  // offset, end
  for (const uint32_t i : by_size) {
    const Life& life = all[i];
    taken.clear();
    const auto look_at = [&](uint32_t j) {
      if (offset[j] != kNotHere && !apart(order, life, all[j])) taken.emplace_back(offset[j], offset[j] + all[j].bytes);
    };
    if (life.reach - life.opener <= window && life.safe_next == ops) {
      const OpId earliest = life.opener > window ? life.opener - window : 0;
      auto near = std::lower_bound(brief.begin(), brief.end(), earliest, [&](uint32_t j, OpId id) { return all[j].opener < id; });
      for (; near != brief.end() && all[*near].opener < life.reach; ++near) look_at(*near);
      for (const uint32_t j : lasting) look_at(j);
    } else {
      for (uint32_t j = 0; j < all.size(); ++j) look_at(j);
    }
    std::sort(taken.begin(), taken.end());
    int64_t at = base;
    for (const auto& [begin, end] : taken) {
      if (at + life.bytes <= begin) break;
      at = std::max(at, end);
    }
    offset[i] = arena.offset[life.buffer] = at;
    arena.bytes = std::max(arena.bytes, at + life.bytes);
  }
  return arena;
}

}  // namespace

Arenas plan_arenas(const StepProgram& program) {
  const Order order(program);
  return {plan(program, order, Space::hbm), plan(program, order, Space::host)};
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
