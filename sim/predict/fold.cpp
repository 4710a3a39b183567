#include "sim/predict/fold.h"

#include <algorithm>
#include <map>
#include <unordered_map>

#include "sim/base/error.h"

namespace mop::predict {
namespace {

uint64_t mix(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdULL, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

// By rank: a hash of how often each color occurs in its group.
void group_colors(const std::vector<uint64_t>& color, const program::Group& g, std::vector<uint64_t>& out) {
  const auto ranks = static_cast<int64_t>(color.size());
  out.assign(color.size(), 0);
  for (int64_t r = 0; r < ranks; ++r)
    out[static_cast<size_t>(g.span().base(r))] += mix(color[static_cast<size_t>(r)] + 1);
  for (int64_t r = 0; r < ranks; ++r) {
    const int64_t base = g.span().base(r);
    if (base != r) out[static_cast<size_t>(r)] = out[static_cast<size_t>(base)];
  }
}

// Renumbers equal values in order of first appearance; returns how many there are.
size_t renumber(std::vector<uint64_t>& values) {
  std::unordered_map<uint64_t, uint64_t> number;
  for (uint64_t& v : values) v = number.try_emplace(v, number.size()).first->second;
  return number.size();
}

}  // namespace

Fold fold(const std::vector<uint32_t>& kinds, const std::vector<program::Group>& groups,
          int64_t gpus_per_node, bool unfold) {
  const size_t ranks = kinds.size();
  std::vector<uint64_t> color(kinds.begin(), kinds.end());
  if (unfold)
    for (size_t r = 0; r < ranks; ++r) color[r] = r;
  size_t colors = renumber(color);
  const program::Group node{program::Axis::world, gpus_per_node, 1};
  std::vector<uint64_t> seen;
  // A single color is equitable as it is: groups of one communicator are all of one size.
  while (colors > 1 && colors < ranks) {
    std::vector<uint64_t> refined = color;
    for (const program::Group& g : groups) {
      group_colors(color, g, seen);
      for (size_t r = 0; r < ranks; ++r) refined[r] = mix(refined[r]) + seen[r];
    }
    group_colors(color, node, seen);
    for (size_t r = 0; r < ranks; ++r) refined[r] = mix(refined[r]) + seen[r];
    const size_t now = renumber(refined);
    color = refined;
    if (now == colors) break;
    colors = now;
  }

  Fold result;
  std::vector<int64_t> class_of_color(colors, -1);
  for (size_t r = 0; r < ranks; ++r) {
    int64_t& c = class_of_color[color[r]];
    if (c < 0) {
      c = static_cast<int64_t>(result.classes.size());
      result.classes.push_back({static_cast<int64_t>(r), kinds[r], 0, 0, 0, {}});
    }
    ++result.classes[static_cast<size_t>(c)].members;
  }
  // Kinds of node and of group: by the classes in them.
  const auto number_groups = [&](const program::Group& g, const auto& assign) {
    std::map<std::vector<int64_t>, uint32_t> kind_of;
    for (RankClass& c : result.classes) {
      std::vector<int64_t> members;
      const int64_t base = g.span().base(c.rank);
      for (int64_t i = 0; i < g.size; ++i)
        members.push_back(class_of_color[color[static_cast<size_t>(base + i * g.stride)]]);
      std::sort(members.begin(), members.end());
      assign(c, members, kind_of);
    }
  };
  number_groups(node, [&](RankClass& c, const std::vector<int64_t>& members, auto& kind_of) {
    c.node = kind_of.try_emplace(members, static_cast<uint32_t>(kind_of.size())).first->second;
    c.per_node =
        static_cast<uint32_t>(std::count(members.begin(), members.end(), &c - result.classes.data()));
    result.nodes = static_cast<uint32_t>(kind_of.size());
  });
  for (const program::Group& g : groups) {
    number_groups(g, [&](RankClass& c, std::vector<int64_t> members, auto& kind_of) {
      members.erase(std::unique(members.begin(), members.end()), members.end());
      const auto next = static_cast<uint32_t>(result.meeting_size.size());
      const auto [found, fresh] = kind_of.try_emplace(members, next);
      if (fresh) result.meeting_size.push_back(static_cast<uint32_t>(members.size()));
      c.meeting.push_back(found->second);
    });
  }
  return result;
}

}  // namespace mop::predict
