// A priority queue of slots by (time, slot) in which a slot's time can be changed. Four children a node: half
// the levels of a binary heap, and the children of a node share a cache line.
#pragma once
#include <cstdint>
#include <vector>

#include "sim/engine/tasks.h"

namespace mop::engine {

class Heap {
 public:
  struct Entry {
    Time time;
    uint32_t slot;
    bool operator<(const Entry& other) const {
      return time < other.time || (time == other.time && slot < other.slot);
    }
  };

  void resize(uint32_t slots) {
    position_.assign(slots, kAbsent);
    entries_.reserve(slots);
  }

  bool empty() const { return entries_.empty(); }
  const Entry& top() const { return entries_.front(); }

  void set(uint32_t slot, Time time) {
    const uint32_t at = position_[slot];
    const Entry entry{time, slot};
    if (at == kAbsent) {
      entries_.push_back(entry);
      rise(static_cast<uint32_t>(entries_.size() - 1), entry);
    } else if (entry < entries_[at]) {
      rise(at, entry);
    } else {
      sink(at, entry);
    }
  }

  void pop() {
    position_[entries_.front().slot] = kAbsent;
    const Entry last = entries_.back();
    entries_.pop_back();
    if (!entries_.empty()) sink(0, last);
  }

 private:
  static constexpr uint32_t kAbsent = 0xffffffff;

  void place(uint32_t at, const Entry& entry) {
    entries_[at] = entry;
    position_[entry.slot] = at;
  }

  void rise(uint32_t at, const Entry& entry) {
    while (at > 0) {
      const uint32_t parent = (at - 1) / 4;
      if (!(entry < entries_[parent])) break;
      place(at, entries_[parent]);
      at = parent;
    }
    place(at, entry);
  }

  void sink(uint32_t at, const Entry& entry) {
    const auto size = static_cast<uint32_t>(entries_.size());
    for (;;) {
      const uint32_t first = 4 * at + 1;
      if (first >= size) break;
      uint32_t least = first;
      const uint32_t end = first + 4 < size ? first + 4 : size;
      for (uint32_t child = first + 1; child < end; ++child) {
        if (entries_[child] < entries_[least]) least = child;
      }
      if (!(entries_[least] < entry)) break;
      place(at, entries_[least]);
      at = least;
    }
    place(at, entry);
  }

  std::vector<Entry> entries_;
  std::vector<uint32_t> position_;  // by slot
};

}  // namespace mop::engine
