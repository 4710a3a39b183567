#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <set>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/base/suggest.h"
#include "sim/plan/plan.h"

namespace mop::plan {
namespace {

[[noreturn]] void bad_value(const char* knob_name, const std::string& text) {
  throw UserError(
      fmt::format("plan setting {} is '{}': it takes {}", knob_name, text, knob(knob_name).values));
}

// A number of a knob: parse_count names the knob in its errors.
int64_t number(const char* knob_name, const std::string& text) {
  return parse_count(text, fmt::format("plan setting {}", knob_name));
}

template <auto Member>
std::string get_degree(const Plan& plan) {
  return plan.*Member == 0 ? "auto" : format_count(plan.*Member);
}

template <auto Member>
std::string get_count(const Plan& plan) {
  return format_count(plan.*Member);
}

template <auto Member>
std::string get_optional(const Plan& plan) {
  return plan.*Member ? format_count(*(plan.*Member)) : "auto";
}

bool parse_switch(const std::string& text, bool& value) {
  if (text == "on" || text == "true" || text == "1") return value = true, true;
  if (text == "off" || text == "false" || text == "0") return value = false, true;
  return false;
}

constexpr std::array kPlaces{"auto", "hbm", "host"};
constexpr std::array kSwitch{"auto", "off", "on"};
constexpr std::array kRecompute{"auto", "none", "full"};
constexpr std::array kReduce{"bf16", "fp32"};
constexpr std::array kRuntime{"eager", "compiled", "native"};
constexpr std::array kPlacement{"inside", "across"};
constexpr std::array kVocabulary{"auto", "weights", "tokens"};
constexpr std::array kMla{"auto", "expanded", "latent"};
constexpr std::array kOptimizer{"auto", "hbm", "host", "stream", "split"};

template <auto Member, const auto& Names>
std::string get_choice(const Plan& plan) {
  return Names[static_cast<size_t>(plan.*Member)];
}

template <auto Member, const auto& Names>
bool set_choice(Plan& plan, const std::string& text) {
  const auto found = std::find_if(Names.begin(), Names.end(), [&](const char* n) { return text == n; });
  if (found == Names.end()) return false;
  using Value = std::remove_reference_t<decltype(plan.*Member)>;
  plan.*Member = static_cast<Value>(found - Names.begin());
  return true;
}

template <auto Member>
std::string get_switch(const Plan& plan) {
  return plan.*Member ? "on" : "off";
}

template <auto Member>
std::string get_number(const Plan& plan) {
  return fmt::format("{}", plan.*Member);
}

bool parse_number(const std::string& text, double& value) {
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), value);
  return status == std::errc() && end == text.data() + text.size() && value > 0;
}

std::vector<Knob> make_knobs() {
  constexpr bool both = true, yes = true, no = false;
  const char* degree = "auto or a whole number";
  const char* count = "a whole number above 0";
  const char* on_off = "on or off";
#define COUNT(n, m)                                               \
  get_degree<&Plan::m>, [](Plan& plan, const std::string& text) { \
    plan.m = text == "auto" || text == "0" ? 0 : number(n, text); \
  }
#define POSITIVE(n, m) \
  get_count<&Plan::m>, [](Plan& plan, const std::string& text) { plan.m = number(n, text); }
#define SIZE(n, m) \
  get_count<&Plan::m>, [](Plan& plan, const std::string& text) { plan.m = text == "0" ? 0 : number(n, text); }
#define SWITCH(n, m)                                              \
  get_switch<&Plan::m>, [](Plan& plan, const std::string& text) { \
    if (!parse_switch(text, plan.m)) bad_value(n, text);          \
  }
#define NUMBER(n, m)                                              \
  get_number<&Plan::m>, [](Plan& plan, const std::string& text) { \
    if (!parse_number(text, plan.m)) bad_value(n, text);          \
  }
#define CHOICE(n, m, names)                                              \
  get_choice<&Plan::m, names>, [](Plan& plan, const std::string& text) { \
    if (!set_choice<&Plan::m, names>(plan, text)) bad_value(n, text);    \
  }
  return {
      {"ep", both, yes, degree,
       "expert parallel ranks (Ep); mop shards each expert over F = GPUs/Ep ranks more", COUNT("ep", expert)},
      {"reduce", both, yes, "bf16 or fp32", "type in which gradients are reduced and, mop, held",
       CHOICE("reduce", reduce, kReduce)},
      {"clip", both, yes, on_off, "exact clipping by the global gradient norm", SWITCH("clip", clip)},
      {"windows", both, yes, on_off,
       "sliding-window layers attend to their window; off: to the whole context", SWITCH("windows", windows)},

      {"tp", yes, no, degree, "tensor parallel ranks, with sequence parallelism between the blocks",
       COUNT("tp", tensor)},
      {"cp", yes, no, degree, "context parallel ranks (ring attention) that share a sequence",
       COUNT("cp", context)},
      {"replicate", yes, no, degree, "copies of the sharded model (HSDP)", COUNT("replicate", replicate)},
      {"cp-balance", yes, no, on_off, "ring attention with head-and-tail load balancing",
       SWITCH("cp-balance", balanced_ring)},
      {"recompute", yes, no, "auto, none or full", "activation checkpointing of whole blocks",
       CHOICE("recompute", recompute, kRecompute)},
      {"reshard", yes, no, on_off, "free the gathered weights after forward", SWITCH("reshard", reshard)},
      {"prefetch", yes, no, on_off, "gather the next block's weights while this one computes",
       SWITCH("prefetch", prefetch)},
      {"loss-chunk", yes, no, "a number of tokens, or 0",
       "tokens a checkpointed chunk of the logits; 0: all at once", SIZE("loss-chunk", loss_chunk)},
      {"offload", yes, no, "auto, on or off",
       "CPUOffloadPolicy: parameters, gradients and optimizer live on the host",
       CHOICE("offload", offload, kSwitch)},
      {"runtime", yes, no, "eager, compiled or native",
       "PyTorch eager, torch.compile of each block with checkpointing around it, or the kernels of mop run",
       CHOICE("runtime", runtime, kRuntime)},

      {"dense-shard", no, yes, degree,
       "ranks that share one copy of the dense weights: all GPUs, or a node (hybrid)",
       COUNT("dense-shard", dense_shard)},
      {"ulysses", no, yes, degree, "ranks that share a sequence (D): attention all-to-alls over heads",
       COUNT("ulysses", sequence)},
      {"expert-placement", no, yes, "inside or across", "expert group inside a node, or across nodes",
       CHOICE("expert-placement", expert_placement, kPlacement)},
      {"vp", no, yes, degree, "ranks that share the vocabulary projection (P)", COUNT("vp", vocabulary)},
      {"vp-scheme", no, yes, "auto, weights or tokens", "what moves between them: V-ring or X-gather",
       CHOICE("vp-scheme", vocabulary_scheme, kVocabulary)},
      {"vp-tile", no, yes, count, "tokens of each rank in one tile of the vocabulary projection",
       POSITIVE("vp-tile", vocabulary_tile)},
      {"mla-exchange", no, yes, "auto, expanded or latent",
       "what Ulysses moves of the keys and values of MLA", CHOICE("mla-exchange", mla_exchange, kMla)},
      {"head-chunks", no, yes, count, "pieces in which a rank's heads are processed",
       POSITIVE("head-chunks", head_chunks)},
      {"save-attention", no, yes, on_off,
       "keep attention outputs, so that backward does not re-run attention",
       SWITCH("save-attention", save_attention)},
      {"kept-layers", no, yes, "auto or a number of layers",
       "the last layers, which keep for backward what their products computed, the router's and those of "
       "MLA's heads aside; the others compute it again. auto: as many as fit and save time, where the "
       "planner has other settings to choose, too; else none",
       get_optional<&Plan::kept_layers>,
       [](Plan& plan, const std::string& text) {
         plan.kept_layers.reset();
         if (text != "auto") plan.kept_layers = text == "0" ? 0 : number("kept-layers", text);
       }},
      {"checkpoints", no, yes, "auto, hbm or host", "where the activation checkpoints wait for backward",
       CHOICE("checkpoints", checkpoints, kPlaces)},
      {"optimizer", no, yes, "auto, hbm, host, stream or split",
       "optimizer states: in HBM; on the host with CPU Adam; on the host, streamed through the GPU; split by "
       "layer",
       CHOICE("optimizer", optimizer, kOptimizer)},
      {"optimizer-hbm-layers", no, yes, "a number of layers, or 0",
       "split, stream: layers whose states stay in HBM", SIZE("optimizer-hbm-layers", optimizer_hbm_layers)},
      {"optimizer-staged-layers", no, yes, "a number of layers, or 0",
       "stream: layers whose states come up a step ahead and wait in HBM for their update",
       SIZE("optimizer-staged-layers", optimizer_staged_layers)},
      {"least-loaded", no, yes, on_off,
       "least-loaded expert parallelism; off: every expert stays on its owner",
       SWITCH("least-loaded", least_loaded)},
      {"capacity-factor", no, yes, "a number above 0", "least-loaded alpha: rows of a rank over the mean",
       NUMBER("capacity-factor", capacity_factor)},
      {"spill-min-rows", no, yes, count, "least-loaded m: fewest rows worth moving an expert for",
       POSITIVE("spill-min-rows", spill_min_rows)},
      {"spill-gate", no, yes, "a number above 0",
       "least-loaded lambda: below this max/mean load nothing is moved", NUMBER("spill-gate", spill_gate)},
      {"spill-slots", no, yes, count, "foreign experts that a rank holds at most at a time",
       POSITIVE("spill-slots", spill_slots)},
      {"round-rows", no, yes, "auto or a whole number",
       "rows that a rank sends or receives at most in a streaming round", COUNT("round-rows", round_rows)},
  };
#undef COUNT
#undef POSITIVE
#undef SIZE
#undef SWITCH
#undef NUMBER
#undef CHOICE
}

Plan defaults(Family family) {
  Plan plan;
  plan.family = family;
  plan.expert = family == Family::mop ? 0 : 1;
  return plan;
}

}  // namespace

const std::vector<Knob>& knobs() {
  static const std::vector<Knob> all = make_knobs();
  return all;
}

const Knob& knob(const std::string& name) {
  for (const Knob& k : knobs())
    if (name == k.name) return k;
  std::vector<std::string> known;
  for (const Knob& k : knobs()) known.emplace_back(k.name);
  throw UserError(unknown_name("plan setting", name, known));
}

void set_knob(Plan& plan, const std::string& name, const std::string& value) {
  const Knob& k = knob(name);
  if (!(plan.family == Family::mop ? k.mop : k.fsdp2))
    throw UserError(fmt::format("plan setting {} belongs to {}, not to {}; see 'mop show plan --help'", name,
                                k.mop ? "mop" : "fsdp2", family_name(plan.family)));
  k.set(plan, value);
}

const char* family_name(Family family) {
  return family == Family::mop ? "mop" : "fsdp2";
}

Plan parse_plan(const std::string& text) {
  const size_t colon = text.find(':');
  const std::string family = text.substr(0, colon);
  if (family != "mop" && family != "fsdp2") {
    const std::vector<std::string> known{"fsdp2", "mop"};
    throw UserError(unknown_name("plan", family, known));
  }
  Plan plan = defaults(family == "mop" ? Family::mop : Family::fsdp2);
  std::set<std::string> given;
  for (size_t at = colon; at != std::string::npos;) {
    const size_t next = text.find(',', at + 1);
    const std::string setting = text.substr(at + 1, next == std::string::npos ? next : next - at - 1);
    const size_t equals = setting.find('=');
    if (equals == std::string::npos)
      throw UserError(fmt::format("plan '{}': '{}' has no value; write setting=value", text, setting));
    const std::string name = setting.substr(0, equals);
    if (!given.insert(name).second) throw UserError(fmt::format("plan '{}': {} is given twice", text, name));
    set_knob(plan, name, setting.substr(equals + 1));
    at = next;
  }
  return plan;
}

std::string describe(const Plan& plan) {
  const Plan standard = defaults(plan.family);
  std::string text = family_name(plan.family);
  char separator = ':';
  for (const Knob& k : knobs()) {
    if (!(plan.family == Family::mop ? k.mop : k.fsdp2) || k.get(plan) == k.get(standard)) continue;
    text += fmt::format("{}{}={}", separator, k.name, k.get(plan));
    separator = ',';
  }
  return text;
}

}  // namespace mop::plan
