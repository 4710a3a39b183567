#include "sim/search/planner.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <span>

#include "sim/base/error.h"
#include "sim/predict/micro_batches.h"
#include "sim/program/master.h"

namespace mop::search {
namespace {

using plan::Family;
using plan::Plan;
using predict::Scenario;

std::vector<int64_t> divisors(int64_t number) {
  std::vector<int64_t> all;
  for (int64_t d = 1; d <= number; ++d)
    if (number % d == 0) all.push_back(d);
  return all;
}

bool valid(const Scenario& s, const Plan& p) {
  try {
    plan::validate(p, s.model, s.gpus(), s.workload.context);
    return true;
  } catch (const UserError&) {
    return false;
  }
}

// One open setting and the values that it may take.
struct Choice {
  const char* knob;
  std::vector<std::string> values;
};

std::vector<std::string> texts(const std::vector<int64_t>& numbers) {
  std::vector<std::string> all;
  for (const int64_t n : numbers) all.push_back(std::to_string(n));
  return all;
}

// Settings that closed forms decide: equal-bytes points of mop.md, sections 2 and 5.
void settle_schemes(const Scenario& s, Plan& p) {
  if (p.family != Family::mop) return;
  if (p.vocabulary_scheme == plan::VocabularyScheme::automatic) {
    const int64_t tokens = s.workload.sequences * s.workload.context / std::max<int64_t>(1, p.sequence);
    p.vocabulary_scheme = tokens * p.vocabulary < 2 * s.model.vocab ? plan::VocabularyScheme::tokens
                                                                    : plan::VocabularyScheme::weights;
  }
  if (p.mla_exchange == plan::MlaExchange::automatic && s.model.attention == model::Attention::gqa) {
    p.mla_exchange = plan::MlaExchange::expanded;  // there is no latent
  } else if (p.mla_exchange == plan::MlaExchange::automatic) {
    const double expanded =
        static_cast<double>(s.model.heads) * static_cast<double>(s.model.qk_dim() + s.model.v_dim());
    const double latent =
        static_cast<double>(p.sequence) * 2 * static_cast<double>(s.model.kv_lora_rank + s.model.qk_rope_dim);
    p.mla_exchange = latent < expanded ? plan::MlaExchange::latent : plan::MlaExchange::expanded;
  }
}

// In the order in which they are improved.
std::vector<Choice> open_choices(const Scenario& s, const Plan& p) {
  const int64_t gpus = s.gpus(), node = std::min(s.used_per_node(), gpus);
  std::vector<Choice> open;
  const auto add = [&](const char* knob, bool is_open, std::vector<std::string> values) {
    if (!is_open) return;
    // What does not divide even alone is left out here; what clashes with others is skipped as it comes up.
    std::erase_if(values, [&](const std::string& value) {
      Plan tried = p;
      plan::set_knob(tried, knob, value);
      return !valid(s, tried);
    });
    if (values.empty())
      throw UserError(
          fmt::format("no value of plan setting {} suits {} on {} GPUs with the other settings; set it by "
                      "hand to see why",
                      knob, s.model.name, gpus));
    open.push_back({knob, std::move(values)});
  };
  const std::vector<std::string> degrees = texts(divisors(gpus));
  if (p.family == Family::fsdp2) {
    add("cp", p.context == 0, degrees);
    add("ep", p.expert == 0, degrees);
    add("tp", p.tensor == 0, texts(divisors(node)));
    add("replicate", p.replicate == 0, texts(divisors(gpus / node)));
    add("offload", p.offload == plan::Switch::automatic, {"off", "on"});
    // Behind offload, which frees more: what offload pays for, this would take first.
    add("recompute", p.recompute == plan::Recompute::automatic, {"none", "full"});
    return open;
  }
  std::set<int64_t> expert_groups;  // the node, the cluster, and the divisors nearest to their geometric mean
  for (const int64_t d : divisors(std::gcd(gpus, s.model.experts)))
    if (d <= node || d == std::gcd(gpus, s.model.experts) || d * d <= 4 * node * gpus)
      expert_groups.insert(d);
  add("ulysses", p.sequence == 0, degrees);
  add("ep", p.expert == 0, texts({expert_groups.begin(), expert_groups.end()}));
  add("dense-shard", p.dense_shard == 0, texts(node == gpus ? std::vector{gpus} : std::vector{gpus, node}));
  std::vector<int64_t> columns;
  for (const int64_t d : divisors(gpus))
    if (d <= std::max<int64_t>(16, node)) columns.push_back(d);
  std::reverse(columns.begin(), columns.end());
  columns.resize(std::min<size_t>(columns.size(), 3));
  add("vp", p.vocabulary == 0, texts(columns));
  add("checkpoints", p.checkpoints == plan::Place::automatic, {"hbm", "host"});
  add("optimizer", p.optimizer == plan::Optimizer::automatic, {"hbm", "host", "stream", "split"});
  // Few large rounds let the products run at their best; many small ones hide the exchanges and take less
  // memory.
  std::vector<int64_t> rounds{32768};
  const int64_t rows = s.workload.sequences * s.workload.context * s.model.top_k;
  while (rounds.back() < rows && rounds.size() < 5) rounds.push_back(2 * rounds.back());
  add("round-rows", p.round_rows == 0, texts(rounds));
  return open;
}

struct Score {
  bool fits = false;
  double time_per_token = std::numeric_limits<double>::infinity();
  int64_t host = 0;  // bytes, of a plan that fits
  double missing = std::numeric_limits<double>::infinity();
};

class Planner {
 public:
  Planner(const Scenario& s, const std::function<void(size_t, size_t)>& progress)
      : s_(s), progress_(progress) {}

  Plan choose() {
    Plan best = s_.plan;
    const std::vector<Choice> open = open_choices(s_, best);
    for (const Choice& choice : open) plan::set_knob(best, choice.knob, start_value(choice));
    if (!valid(s_, best)) best = any_valid(best, open);
    const Tried* found = &climb(best, open);
    if (may_keep()) {
      keeping_ = true;
      known_.clear();
      found = &climb(best, open);
    }
    return off_the_host(*found);
  }

 private:
  // settled: what the planner settles of the plan, too, kept layers included.
  struct Tried {
    Plan settled;
    Score score;
  };

  // One setting at a time, until a round changes nothing. Pairs that only help together are tried from both
  // ends.
  const Tried& climb(Plan& best, const std::vector<Choice>& open) {
    const Tried* found = &try_out(best);
    size_t total = 0;
    for (const Choice& choice : open) total += choice.values.size();
    for (int round = 0; round < 3; ++round) {
      bool changed = false;
      size_t done = 0;
      for (const Choice& choice : open) {
        for (const std::string& value : choice.values) {
          Plan tried = best;
          plan::set_knob(tried, choice.knob, value);
          if (progress_) progress_(++done, total);
          if (!valid(s_, tried)) continue;
          const Tried& other = try_out(tried);
          if (better(other.score, found->score)) best = tried, found = &other, changed = true;
        }
      }
      if (!changed) break;
    }
    return *found;
  }

  // A parameter, in HBM.
  static constexpr auto kStates = static_cast<double>(program::state_bytes(program::Master::low));

  // Fits before not, then less time a token, then less memory missing; of plans that are as good as the
  // fastest so far, the one with less on the host.
  bool better(const Score& a, const Score& b) const {
    constexpr double kSame = 1.005;
    if (a.fits != b.fits) return a.fits;
    if (!a.fits) return a.missing < b.missing;
    const bool good = std::max(a.time_per_token, b.time_per_token) <= kSame * fastest_;
    return good && a.host != b.host ? a.host < b.host : a.time_per_token < b.time_per_token;
  }

  // Where the best takes memory of the host, which others use, too: the fastest plan that takes none, if it
  // is as good.
  Plan off_the_host(const Tried& best) const {
    constexpr double kSame = 1.02;  // steps are predicted so well on average (reports/validation-h200x4.md)
    if (best.score.host == 0) return best.settled;
    const Tried* chosen = nullptr;
    for (const auto& [text, tried] : known_) {
      const Score& score = tried.score;
      if (!score.fits || score.host > 0 || score.time_per_token > kSame * best.score.time_per_token) continue;
      if (chosen == nullptr || score.time_per_token < chosen->score.time_per_token) chosen = &tried;
    }
    return chosen == nullptr ? best.settled : chosen->settled;
  }

  // Most frugal of memory, so that the search starts from something that fits.
  std::string start_value(const Choice& choice) const {
    const std::string knob = choice.knob;
    if (knob == "ep") {
      const int64_t node = std::min(s_.used_per_node(), s_.gpus());
      const std::string* best = &choice.values.front();
      for (const std::string& value : choice.values)
        if (std::stoll(value) <= node) best = &value;
      return *best;
    }
    if (knob == "tp" || knob == "replicate" || knob == "dense-shard" || knob == "vp" || knob == "optimizer" ||
        knob == "round-rows")
      return choice.values.front();
    return choice.values.back();
  }

  Plan any_valid(Plan p, const std::vector<Choice>& open) const {
    for (const Choice& choice : open)
      for (const std::string& value : choice.values) {
        plan::set_knob(p, choice.knob, value);
        if (valid(s_, p)) return p;
      }
    throw UserError(fmt::format(
        "no combination of the open plan settings suits {} on {} GPUs; set some by hand to see why",
        s_.model.name, s_.gpus()));
  }

  void settle(Plan& p) const {
    settle_schemes(s_, p);
    settle_split(p);
    settle_resident(p);
    settle_staged(p);
  }

  // Nothing for a plan that cannot be: whose rounds are too many. Where no other is left its prediction says
  // so.
  static std::optional<predict::Outline> outlined(const Scenario& s, bool only_memory = false) {
    try {
      return predict::outline(s, only_memory);
    } catch (const UserError&) {
      return std::nullopt;
    }
  }

  // HBM that a plan leaves free, less a margin: what our executor takes is predicted within 0.4 %, and within
  // 0.1 % where it nearly fills a GPU (reports/validation-h200x4.md, executor-h200x4.md).
  double room(const Plan& p) const {
    Scenario there = s_;
    there.plan = p;
    const std::optional<predict::Outline> memory = outlined(there, true);
    return memory ? room_of(*memory) : -std::numeric_limits<double>::infinity();
  }
  static double room_of(const predict::Outline& memory) {
    return 0.995 * static_cast<double>(memory.hbm_capacity) - static_cast<double>(memory.hbm_peak);
  }

  // As many layers, from number `first` on, as `bytes` a parameter of theirs have room for.
  int64_t layers_in(double room, double bytes, const Plan& p, int64_t first = 0) const {
    int64_t count = 0;
    const auto parameters = model::count_parameters(s_.model);
    for (const auto& layer : std::span(parameters.layers).subspan(static_cast<size_t>(first))) {
      room -= bytes * (static_cast<double>(layer.dense()) / static_cast<double>(p.dense_shard) +
                       static_cast<double>(layer.experts) / static_cast<double>(s_.gpus()));
      if (room < 0) break;
      ++count;
    }
    return count;
  }

  // Stream, where it is the planner's choice: HBM keeps the states of as many layers as it has room for.
  void settle_resident(Plan& p) const {
    if (p.optimizer != plan::Optimizer::stream || s_.plan.optimizer == plan::Optimizer::stream ||
        s_.plan.optimizer_hbm_layers > 0)
      return;
    p.optimizer_hbm_layers = layers_in(room(p) - ends(p), kStates, p);
  }

  // Bytes of the embedding's and the head's states.
  double ends(const Plan& p) const {
    return kStates * 2 * static_cast<double>(s_.model.vocab * s_.model.hidden) /
           static_cast<double>(std::min(p.dense_shard, p.vocabulary));
  }

  // Stream: states come up ahead, all of them, or those of as many layers as HBM has room for beside the
  // embedding's and the buffers through which the others travel.
  void settle_staged(Plan& p) const {
    if (p.optimizer != plan::Optimizer::stream || s_.plan.optimizer_staged_layers > 0) return;
    Plan all = p;
    all.optimizer_staged_layers = s_.model.layers - p.optimizer_hbm_layers;
    p.optimizer_staged_layers = all.optimizer_staged_layers > 0 && room(all) >= 0
                                    ? all.optimizer_staged_layers
                                    : layers_in(room(p) - ends(p), kStates, p, p.optimizer_hbm_layers);
  }

  // Split: the states of as many layers in HBM as the plan with all of them on the host leaves room for. A
  // layer that moves brings its states and its held gradients.
  void settle_split(Plan& p) const {
    if (p.optimizer != plan::Optimizer::split || s_.plan.optimizer == plan::Optimizer::split ||
        s_.plan.optimizer_hbm_layers > 0)
      return;
    Plan on_host = p;
    on_host.optimizer = plan::Optimizer::host;
    p.optimizer_hbm_layers = layers_in(room(on_host), kStates + 4, p);
    if (p.optimizer_hbm_layers == 0) p.optimizer = plan::Optimizer::host;
  }

  bool may_keep() const {
    return s_.plan.family == Family::mop && !s_.plan.kept_layers && s_.plan.save_attention;
  }

  // As many layers as `left` bytes of HBM have room for keep what their products computed.
  void settle_kept(Plan& p, double left) const {
    const auto room_with = [&](int64_t layers) {
      p.kept_layers = layers;
      return room(p);
    };
    int64_t fit = 0, too_many = s_.model.layers;
    if (left <= 0) return;
    double missing = -room_with(too_many);
    if (missing <= 0) return;
    while (fit + 1 < too_many) {
      // The peak grows by as much a layer, once it is where the kept layers are.
      const double share = left / (left + missing);
      const int64_t tried = std::clamp(
          fit + static_cast<int64_t>(share * static_cast<double>(too_many - fit)), fit + 1, too_many - 1);
      const double room = room_with(tried);
      if (room >= 0)
        fit = tried, left = room;
      else
        too_many = tried, missing = -room;
    }
    p.kept_layers = fit;
  }

  static double time_per_token(const predict::Outline& o) {
    return o.step_time / static_cast<double>(o.tokens_per_step);
  }

  // Of a settled plan that keeps nothing. Nothing for one that cannot be.
  const std::optional<predict::Outline>& predicted(const Plan& p, const std::string& text) {
    const auto found = predicted_.find(text);
    if (found != predicted_.end()) return found->second;
    Scenario tried = s_;
    tried.plan = p;
    return predicted_.emplace(text, outlined(tried)).first->second;
  }

  const Tried& try_out(Plan p) {
    settle(p);
    const std::string text = plan::describe(p);
    if (const auto found = known_.find(text); found != known_.end()) return found->second;
    std::optional<predict::Outline> prediction = predicted(p, text);
    // Of a step's four passes, recomputation counted, keeping saves one at most. Where links are the bound it
    // may save nothing, and then HBM is left free.
    if (keeping_ && prediction && prediction->fits && 0.75 * time_per_token(*prediction) < fastest_) {
      Scenario kept = s_;
      kept.plan = p;
      settle_kept(kept.plan, room_of(*prediction));
      const std::optional<predict::Outline> then =
          kept.plan.kept_layers.value_or(0) > 0 ? outlined(kept) : std::nullopt;
      if (then && then->fits && then->step_time < 0.998 * prediction->step_time)
        p = kept.plan, prediction = then;
    }
    Score score;
    score.fits = prediction && prediction->fits;
    if (!prediction) {
      score.missing = std::numeric_limits<double>::infinity();
    } else if (prediction->fits) {
      score.time_per_token = time_per_token(*prediction);
      score.host = prediction->host_peak;
      fastest_ = std::min(fastest_, score.time_per_token);
    } else {
      score.missing = std::max(0.0, static_cast<double>(prediction->hbm_peak - prediction->hbm_capacity)) +
                      std::max(0.0, static_cast<double>(prediction->host_peak - prediction->host_capacity)) /
                          static_cast<double>(s_.used_per_node());
    }
    return known_.emplace(text, Tried{p, score}).first->second;
  }

  const Scenario& s_;
  const std::function<void(size_t, size_t)>& progress_;
  std::map<std::string, Tried> known_;  // by the text of the plan that keeps nothing
  std::map<std::string, std::optional<predict::Outline>> predicted_;
  double fastest_ = std::numeric_limits<double>::infinity();
  bool keeping_ = false;  // layers are kept where there is room: first the best plan that keeps none is found
};

}  // namespace

plan::Plan choose(const Scenario& scenario, const std::function<void(size_t, size_t)>& progress) {
  const bool rounds = scenario.plan.family != Family::mop || scenario.plan.round_rows > 0;
  if (scenario.plan.resolved() && rounds) return scenario.plan;
  plan::validate(scenario.plan, scenario.model, scenario.gpus(), scenario.workload.context);
  return Planner(scenario, progress).choose();
}

}  // namespace mop::search
