#include "sim/program/arena.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <optional>

#include "sim/base/error.h"
#include "sim/base/quantity.h"

namespace mop::program {
namespace {

using Clock = std::array<OpId, kStreams>;  // by stream: operations known to have completed, as last index + 1

// Happens-before over two consecutive steps: entry op is this step's, entry op + ops the next step's, whose
// clocks count the operations of the first.
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
          } else if (step == 1 && (program.ops[d.from].region == 0 ||
                                   program.ops[d.from].region != program.ops[id].region)) {
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
  const char* label;
  int64_t bytes;
  OpId first, last;      // issue order, as an allocator would see it
  OpId opener;           // operation of the first use: every other use comes after it
  size_t stream;         // of the opener
  Clock users{};         // last user by stream, index + 1
  OpId safe, safe_next;  // complete_below of the opener, in this step and the next
  OpId reach = 0;        // openers from here on never conflict within the step
  OpId until = 0;        // exactly, of the openers of brief lives
  bool brief = false;    // conflicts with no brief life but of neighbours in issue order (Brief)
};

bool completed(const Clock& users, const Clock& known) {
  for (size_t s = 0; s < kStreams; ++s)
    if (users[s] > known[s]) return false;
  return true;
}

// Of each stream the lives that it opens, in that order.
using Openers = std::array<std::vector<const Life*>, kStreams>;
Openers openers_of(const std::vector<Life>& all) {
  Openers openers;
  for (const Life& life : all) openers[life.stream].push_back(&life);
  return openers;
}

std::vector<Life> lives(const StepProgram& program, const Order& order, Space space) {
  std::vector<uint32_t> index(program.buffers.size(), kNoBuffer);
  std::vector<Life> all;
  for (OpId id = 0; id < program.ops.size(); ++id) {
    const Op& op = program.ops[id];
    for (const Use& use : program.uses_of(op)) {
      const BufferId b = use.buffer;
      const Buffer& buffer = program.buffers[b];
      if (buffer.space != space || buffer.persistent || buffer.bytes == 0) continue;
      if (index[b] == kNoBuffer) {
        index[b] = static_cast<uint32_t>(all.size());
        all.push_back({b,
                       buffer.label,
                       (buffer.bytes + kAlignment - 1) / kAlignment * kAlignment,
                       buffer.first,
                       buffer.last,
                       id,
                       static_cast<size_t>(op.stream),
                       {},
                       order.complete_below(id, 0),
                       order.complete_below(id, 1)});
      }
      all[index[b]].users[static_cast<size_t>(op.stream)] = id + 1;
    }
  }
  // Reach: on one stream `safe` never falls, so each stream's openers are searched by halving.
  const Openers openers = openers_of(all);
  for (Life& life : all) {
    life.reach = life.opener + 1;
    for (const auto& stream : openers) {
      const auto found = std::partition_point(stream.begin(), stream.end(),
                                              [&](const Life* other) { return other->safe <= life.last; });
      if (found != stream.begin()) life.reach = std::max(life.reach, (*std::prev(found))->opener + 1);
    }
  }
  return all;
}

// Which lives are brief. Openers of one stream know of more completed operations from one to the next; so for
// every life and stream those are found by halving that may conflict with it. A stream that others seldom
// wait for lags, and what it opens conflicts with nearly all: such streams are left out, and those few lives,
// like the long ones, are looked at by all.
class Brief {
 public:
  Brief(const Order& order, OpId ops, std::vector<Life>& all) : order_(order), ops_(ops), all_(all) {}

  void mark() {
    const Openers openers = openers_of(all_);
    ahead_.resize(all_.size());
    std::array<size_t, kStreams> streams;
    std::iota(streams.begin(), streams.end(), 0);
    std::ranges::stable_sort(streams, std::greater(), [&](size_t s) { return openers[s].size(); });
    Choice best;
    for (const size_t s : streams) {
      if (openers[s].empty()) break;
      look_ahead(s, openers[s]);
      std::array<bool, kStreams> with = best.streams;
      with[s] = true;
      if (const Choice choice = weighed(with); choice.looks < best.looks) best = choice;
    }
    for (size_t i = 0; i < all_.size(); ++i)
      if (const std::optional<OpId> span = span_of(i, best.streams); span && *span <= best.span) {
        all_[i].brief = true;
        all_[i].until = all_[i].opener + std::max<OpId>(1, *span);
      }
  }

 private:
  struct Ahead {                         // by stream
    std::array<OpId, kStreams> until{};  // openers from here on never conflict within the step
    std::array<bool, kStreams> early{};  // and none in the next one
  };
  struct Choice {
    std::array<bool, kStreams> streams{};
    OpId span = 0;
    double looks = 3;  // share of all lives that one looks at: more than that of any choice
  };

  void look_ahead(size_t s, const std::vector<const Life*>& openers) {
    // In the order of issue a buffer may begin before its opener.
    std::vector<std::pair<OpId, OpId>> begins;  // first, and the last opener of those that begin no later
    for (const Life* life : openers) begins.emplace_back(life->first, life->opener);
    std::ranges::sort(begins);
    for (size_t i = 1; i < begins.size(); ++i)
      begins[i].second = std::max(begins[i].second, begins[i - 1].second);
    for (size_t i = 0; i < all_.size(); ++i) {
      const Life& life = all_[i];
      const auto knows = std::ranges::partition_point(
          openers, [&](const Life* other) { return !completed(life.users, order_.clock(other->opener, 0)); });
      const auto behind = std::ranges::upper_bound(begins, std::pair(life.last, kNoOp));
      if (knows != openers.begin()) ahead_[i].until[s] = (*std::prev(knows))->opener + 1;
      if (behind != begins.begin())
        ahead_[i].until[s] = std::max(ahead_[i].until[s], std::prev(behind)->second + 1);
      ahead_[i].early[s] = completed(life.users, order_.clock(openers.front()->opener, 1));
    }
  }

  // How long a life may conflict with those that the streams open; nothing for one that they do not open or
  // that may in the next step.
  std::optional<OpId> span_of(size_t i, const std::array<bool, kStreams>& streams) const {
    if (!streams[all_[i].stream]) return std::nullopt;
    OpId until = all_[i].opener;
    for (size_t s = 0; s < kStreams; ++s) {
      if (!streams[s]) continue;
      if (!ahead_[i].early[s]) return std::nullopt;
      until = std::max(until, ahead_[i].until[s]);
    }
    return until - all_[i].opener;
  }

  // The span that leaves the least to look at. With a shorter one more lives last, and all look at those and
  // they at all; with a longer one brief ones have more neighbours.
  Choice weighed(const std::array<bool, kStreams>& streams) const {
    std::vector<OpId> spans;
    for (size_t i = 0; i < all_.size(); ++i)
      if (const std::optional<OpId> span = span_of(i, streams)) spans.push_back(*span);
    std::ranges::sort(spans);
    Choice best{streams};
    for (size_t lasting = spans.size(); lasting > 0;) {
      lasting /= 2;
      const size_t brief = spans.size() - lasting;
      const double looks = 2 * (1 - static_cast<double>(brief) / static_cast<double>(all_.size())) +
                           static_cast<double>(spans[brief - 1]) / static_cast<double>(ops_);
      if (looks < best.looks) best.looks = looks, best.span = spans[brief - 1];
    }
    return best;
  }

  const Order& order_;
  OpId ops_;
  std::vector<Life>& all_;
  std::vector<Ahead> ahead_;  // by life
};

// May `a`, opened first, and `b` share bytes? The scalars decide nearly always; the clocks are exact.
bool disjoint(const Order& order, const Life& a, const Life& b) {
  if (a.last >= b.first) return false;
  if (a.last < b.safe && b.last < a.safe_next) return true;
  return (a.last < b.safe || completed(a.users, order.clock(b.opener, 0))) &&
         (b.last < a.safe_next || completed(b.users, order.clock(a.opener, 1)));
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
  std::fill(change.begin(), change.end(), 0);
  int64_t held = arena.bytes;
  for (const Life& life : all) {
    change[life.first] += life.bytes;
    change[std::min<size_t>(std::max(life.reach, life.last + 1), program.ops.size())] -= life.bytes;
  }
  for (OpId id = 0; id < program.ops.size(); ++id) {
    held += change[id];
    arena.held_bytes = std::max(arena.held_bytes, held);
  }
  for (const Life& life : all)
    if (life.first <= arena.live_peak && arena.live_peak <= life.last)
      arena.live_by_holds[static_cast<size_t>(program.buffers[life.buffer].holds)] += life.bytes;
}

enum class First { largest, longest };

// Places every buffer at the lowest offset from `base` on that no conflicting buffer covers; returns the
// arena's end and the offsets by life. Brief lives are looked at by their neighbours alone, which keeps the
// cost near linear.
int64_t place(const Order& order, const std::vector<Life>& all, int64_t base, First first,
              std::vector<int64_t>& offsets) {
  OpId longest = 0;  // that a brief life may conflict for
  for (const Life& life : all)
    if (life.brief) longest = std::max(longest, life.until - life.opener);
  struct Placed {  // what the search reads, close together
    OpId opener, last, safe, safe_next;
    uint32_t index;
    int64_t offset, bytes;
    OpId span() const { return last - opener; }
  };
  std::vector<Placed> brief, lasting;  // in order of their openers
  for (uint32_t i = 0; i < all.size(); ++i) {
    const Life& l = all[i];
    (l.brief ? brief : lasting).push_back({l.opener, l.last, l.safe, l.safe_next, i, kNotHere, l.bytes});
  }
  std::vector<Placed*> turn;
  for (Placed& p : brief) turn.push_back(&p);
  for (Placed& p : lasting) turn.push_back(&p);
  std::sort(turn.begin(), turn.end(), [&](const Placed* x, const Placed* y) {
    if (first == First::longest && x->span() != y->span()) return x->span() > y->span();
    return x->bytes != y->bytes ? x->bytes > y->bytes : x->index < y->index;
  });
  int64_t arena = base;
  std::vector<std::pair<int64_t, int64_t>> taken;  // offset, end
  using Twins = std::array<int64_t, 2>;
  std::map<std::pair<const char*, int64_t>, Twins> twins_of;
  for (Placed* const p : turn) {
    const Life& life = all[p->index];
    int64_t floor = base;  // everything from base to here is taken
    const auto look_at = [&](const Placed& other) {
      const int64_t end = other.offset + other.bytes;
      if (other.offset == kNotHere || end <= floor) return;
      const bool other_first = other.opener <= p->opener;
      if (other_first ? other.last < p->safe && p->last < other.safe_next && other.last < life.first
                      : p->last < other.safe && other.last < p->safe_next && p->last < all[other.index].first)
        return;
      const Life& its = all[other.index];
      if (other_first ? disjoint(order, its, life) : disjoint(order, life, its)) return;
      if (other.offset <= floor)
        floor = end;
      else
        taken.emplace_back(other.offset, end);
    };
    const auto neighbours = [&](const auto& visit) {  // until one is enough
      for (const Placed& other : lasting)
        if (visit(other)) return;
      auto near = brief.begin();
      if (life.brief)
        near = std::partition_point(brief.begin(), brief.end(), [&](const Placed& other) {
          return other.opener + longest < life.opener;
        });
      for (; near != brief.end() && (!life.brief || near->opener < life.until); ++near)
        if (visit(*near)) return;
    };
    // Layers repeat: one of the two places that the last buffers of this name and size took usually suits
    // this one too.
    Twins& twins = twins_of.try_emplace({life.label, life.bytes}, Twins{kNotHere, kNotHere}).first->second;
    int64_t at = kNotHere;
    for (const int64_t tried : twins) {
      if (tried == kNotHere || at != kNotHere) continue;
      bool free = true;
      neighbours([&](const Placed& other) {
        if (other.offset >= tried + p->bytes || tried >= other.offset + other.bytes) return false;
        floor = base;
        taken.clear();
        look_at(other);
        free = floor == base && taken.empty();
        return !free;
      });
      if (free) at = tried;
    }
    if (at == kNotHere) {
      floor = base;
      taken.clear();
      neighbours([&](const Placed& other) {
        look_at(other);
        return false;
      });
      std::sort(taken.begin(), taken.end());
      at = floor;
      for (const auto& [begin, end] : taken) {
        if (at + life.bytes <= begin) break;
        at = std::max(at, end);
      }
      twins = {at, twins[0]};
    }
    p->offset = offsets[p->index] = at;
    arena = std::max(arena, at + life.bytes);
  }
  return arena;
}

// The arena of one space: measured, and then packed or not.
class Planned {
 public:
  Planned(const StepProgram& program, const Order& order, Space space)
      : order_(order), ops_(static_cast<OpId>(program.ops.size())), lives_(lives(program, order, space)) {
    arena_.offset.assign(program.buffers.size(), kNotHere);
    measure_live_bytes(program, lives_, space, arena_);
  }

  int64_t live_bytes() const { return arena_.live_bytes; }

  Arena unpacked(int64_t Arena::*bytes) && {
    arena_.bytes = arena_.*bytes;
    return std::move(arena_);
  }

  Arena packed() && {
    const int64_t base = arena_.bytes;
    Brief(order_, ops_, lives_).mark();
    std::vector<int64_t> offsets(lives_.size());
    arena_.bytes = place(order_, lives_, base, First::largest, offsets);
    if (arena_.bytes > arena_.held_bytes + arena_.held_bytes / 50) {  // loosely packed: try the other order
      std::vector<int64_t> other(lives_.size());
      const int64_t bytes = place(order_, lives_, base, First::longest, other);
      if (bytes < arena_.bytes) arena_.bytes = bytes, offsets = std::move(other);
    }
    for (size_t i = 0; i < lives_.size(); ++i) arena_.offset[lives_[i].buffer] = offsets[i];
    return std::move(arena_);
  }

 private:
  const Order& order_;
  OpId ops_;
  std::vector<Life> lives_;
  Arena arena_;  // bytes: of what lives across steps, until it is planned
};

std::vector<std::pair<int64_t, std::string>> largest_buffers(const StepProgram& program, const Arena& arena,
                                                             Space space) {
  std::map<std::string, int64_t> by_label;
  for (BufferId b = 0; b < program.buffers.size(); ++b) {
    const Buffer& buffer = program.buffers[b];
    const bool live = buffer.persistent || (buffer.first <= arena.live_peak &&
                                            arena.live_peak <= buffer.last && buffer.first != kNoOp);
    if (buffer.space == space && live) by_label[buffer.label] += buffer.bytes;
  }
  std::vector<std::pair<int64_t, std::string>> sorted;
  for (const auto& [label, bytes] : by_label) sorted.emplace_back(bytes, label);
  std::sort(sorted.rbegin(), sorted.rend());
  return sorted;
}

}  // namespace

Arenas plan_arenas(const StepProgram& program, bool pack) {
  const Order order(program);
  const auto planned = [&](Space space) {
    Planned arena(program, order, space);
    return pack ? std::move(arena).packed() : std::move(arena).unpacked(&Arena::held_bytes);
  };
  return {planned(Space::hbm), planned(Space::host)};
}

Arenas plan_arenas(const StepProgram& program, const Capacities& most) {
  const Order order(program);
  const auto planned = [&](Space space, int64_t bytes) {
    Planned arena(program, order, space);
    return arena.live_bytes() > bytes ? std::move(arena).unpacked(&Arena::live_bytes)
                                      : std::move(arena).packed();
  };
  return {planned(Space::hbm, most.hbm), planned(Space::host, most.host)};
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

std::string shortfall(const std::string& what, int64_t need, int64_t have, const StepProgram& program,
                      const Arena& arena, Space space) {
  std::vector<std::string> names;
  for (const auto& [bytes, label] : largest_buffers(program, arena, space)) {
    if (names.size() == 4) break;
    names.push_back(fmt::format("{} {}", label, format_bytes(static_cast<double>(bytes))));
  }
  return fmt::format("{} needs {}, has {}: {} too much (largest buffers: {})", what,
                     format_bytes(static_cast<double>(need)), format_bytes(static_cast<double>(have)),
                     format_bytes(static_cast<double>(need - have)), fmt::join(names, ", "));
}

}  // namespace mop::program
