// Which experts the tokens of a rank go to, as a workload states it before any router has run. Every plan
// that is compared gets the same draw: it depends on routing, shape and layer, never on placement.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mop::plan {

struct Routing {
  enum class Kind : uint8_t { balanced, zipf, hot, histogram };

  Kind kind = Kind::balanced;
  double exponent = 0;      // zipf: the i-th most popular expert (from 1) has weight i^-exponent
  double hot_fraction = 0;  // hot: this part of the token copies, 0 to 1 ...
  int hot_experts = 0;      // ... goes evenly to this many experts, the rest evenly to the others
  std::string file;         // histogram: as given; its content is in `counts`
  std::vector<std::vector<int64_t>> counts;  // histogram: recorded copies an expert; one row, or one a layer
  uint64_t seed = 0;                         // zipf and hot: which experts are popular on which layer
  bool independent_groups = false;           // false: every expert-parallel group gets the same draw

  bool operator==(const Routing&) const = default;
};

// "balanced", "zipf:1.2", "hot:0.3@4" (30 % of the token copies on 4 experts) or "histogram:FILE"; then, if
// wanted, ",seed=7" and ",independent". FILE is read here: JSON (an array of counts, or an array of such
// arrays) or CSV (a row a line; blank lines and lines that start with '#' are skipped).
// Errors: UserError that says what is wrong and how to write it: an unknown kind (with the nearest one), a
// number out of range, a file that cannot be read, is not of this form, is ragged, has a negative count or a
// row of zeros.
Routing parse_routing(std::string_view text);

// The text that parse_routing reads back to the same value. (Not for a file whose name ends like an option.)
std::string describe(const Routing& routing);

// Copies an expert (experts) that ONE source rank sends when it holds `tokens` tokens and each goes to
// `top_k` distinct experts. The sum is tokens * top_k and no expert gets more than `tokens`: what a popular
// expert cannot take goes to the others in proportion to their weights. Rounded by largest remainder.
//  - balanced: counts differ by at most one; the larger ones are spaced evenly, and move by one a layer;
//  - zipf, hot: a seeded permutation a layer says which experts are popular;
//  - histogram: every expert stays where it was recorded, without a permutation, the same in every group.
// `layer` counts routed layers from 0; `group` is the expert-parallel group, used only with
// independent_groups. The same on every machine: integers throughout (zipf weights are rounded to 2^-32).
// Errors: UserError when the routing does not fit the model: as many hot experts as there are experts, or a
// histogram with another number of experts or with fewer rows than layers. InternalError unless
// 1 <= top_k <= experts < 2^20 and 0 <= tokens < 2^40.
std::vector<int64_t> draw(const Routing& routing, int64_t tokens, int top_k, int experts, int layer,
                          int group);

// Largest load over mean load, at least 1; 1 when there is no load at all.
double imbalance(std::span<const int64_t> loads);

// How many equally loaded experts have as many rows each as the expert of the mean row has: what products of
// uneven experts cost like. At least 1.
int64_t effective_experts(std::span<const int64_t> loads);

}  // namespace mop::plan
