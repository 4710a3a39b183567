// Plan: which component of the model is sharded how, and which policies trade memory for time. It holds no
// tensors and no times; the lowering turns it into a StepProgram.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sim/model/config.h"

namespace mop::plan {

enum class Family : uint8_t { fsdp2, mop };
enum class Place : uint8_t { automatic, hbm, host };
enum class Switch : uint8_t { automatic, off, on };
enum class Recompute : uint8_t { automatic, none, full };  // activation checkpointing of whole blocks
enum class Reduce : uint8_t { bf16, fp32 };  // type in which gradients are reduced (and, mop, held)
// fsdp2: PyTorch eager, torch.compile of each block, or our executor (native).
enum class Runtime : uint8_t { eager, compiled, native };
enum class ExpertPlacement : uint8_t {
  inside,
  across
};  // Ep inside the node and F across, or the other way round
enum class VocabularyScheme : uint8_t {
  automatic,
  weights,
  tokens
};  // what moves: V-ring or X-gather (mop.md 5)
enum class MlaExchange : uint8_t { automatic, expanded, latent };  // what Ulysses sends of K and V
enum class Optimizer : uint8_t { automatic, hbm, host, stream, split };

// A degree of 0 is chosen by the planner (sim/search); a resolved plan has none.
struct Plan {
  Family family = Family::mop;

  int64_t expert = 1;  // Ep, both families; mop: F = W / Ep
  Reduce reduce = Reduce::bf16;
  bool clip = true;     // exact global-norm clipping
  bool windows = true;  // sliding-window layers attend to their window only

  // fsdp2 (PyTorch FSDP2 with TorchTitan's TP, CP and EP)
  int64_t tensor = 1, context = 1, replicate = 1;  // TP with sequence parallelism, CP (ring), HSDP replicas
  bool reshard = true, prefetch = true;
  bool balanced_ring = true;  // context parallel: head-and-tail load balancing
  Recompute recompute = Recompute::full;
  int64_t loss_chunk = 4096;     // tokens a checkpointed chunk of logits; 0: all logits at once
  Switch offload = Switch::off;  // CPUOffloadPolicy: parameters, gradients and optimizer on the host
  Runtime runtime = Runtime::eager;

  // mop (arXiv 2607.01844)
  int64_t dense_shard = 0;  // ranks that share one copy of the dense weights: W, or fewer (hybrid)
  int64_t sequence = 0;     // D: Ulysses degree
  ExpertPlacement expert_placement = ExpertPlacement::inside;
  int64_t vocabulary = 0;  // P
  VocabularyScheme vocabulary_scheme = VocabularyScheme::automatic;
  int64_t vocabulary_tile = 1024;  // tokens a tile from each rank
  MlaExchange mla_exchange = MlaExchange::automatic;
  int64_t head_chunks = 1;
  bool save_attention =
      true;  // keep the attention output and log-sum-exp, so that backward does not re-run it
  // Layers, the last ones, that keep what their products computed: backward does not compute it again. Not
  // said: the planner's choice, none where nobody plans.
  std::optional<int64_t> kept_layers;
  Place checkpoints = Place::automatic;
  Optimizer optimizer = Optimizer::automatic;
  int64_t optimizer_hbm_layers = 0;     // split, stream: states of this many layers stay in HBM
  int64_t optimizer_staged_layers = 0;  // stream: states of this many layers come up a step ahead
  bool least_loaded = true;
  double capacity_factor = 1.0;   // alpha
  int64_t spill_min_rows = 1024;  // m
  double spill_gate = 1.3;        // lambda
  int64_t spill_slots = 2;
  int64_t round_rows = 0;  // capacity of a streaming round; 0: the planner's choice, 32K where nobody plans

  bool offloaded() const { return offload == Switch::on; }
  bool native() const { return family == Family::mop || runtime == Runtime::native; }  // by our executor
  bool resolved() const;
  int64_t round_capacity() const { return round_rows > 0 ? round_rows : 32768; }
};

// "mop", "fsdp2", or with settings: "fsdp2:context=16,expert=16,offload=true". Settings are the knobs of
// knobs(). Errors: UserError with the nearest family or knob name, or the values that a knob takes.
Plan parse_plan(const std::string& text);
std::string describe(
    const Plan& plan);  // canonical text: the family and every knob that differs from its default

// One setting of a plan: the same name is a command-line flag (--<name>), a plan-text key and a JSON field.
struct Knob {
  const char* name;
  bool fsdp2, mop;     // which families have it
  const char* values;  // "0 (planner) or a divisor of the GPUs", shown by help and errors
  const char* help;
  std::string (*get)(const Plan&);
  void (*set)(Plan&, const std::string&);  // throws UserError
};
const std::vector<Knob>& knobs();
const Knob& knob(const std::string& name);  // UserError with the nearest name
const char* family_name(Family family);
// Sets one knob. Errors: UserError for an unknown name (the nearest is suggested), one of the other family, a
// bad value.
void set_knob(Plan& plan, const std::string& name, const std::string& value);

// Throws UserError when the plan cannot run this model on this many GPUs: names the knob, and the values that
// divide. Degrees left to the planner are not looked at.
void validate(const Plan& plan, const model::ModelConfig& model, int64_t gpus, int64_t context);

// Where a degree's ranks are: groups of `size` ranks, `stride` apart; a rank's group is {base + i * stride}.
struct Span {
  int64_t size = 1, stride = 1;
  int64_t index(int64_t rank) const { return rank / stride % size; }        // of a rank in its group
  int64_t base(int64_t rank) const { return rank - index(rank) * stride; }  // lowest rank of its group
  // Groups by number, from 0 on, in the order of their lowest ranks.
  int64_t group(int64_t rank) const { return rank / (stride * size) * stride + rank % stride; }
  int64_t first(int64_t group) const { return group / stride * stride * size + group % stride; }
};

// Which ranks share what. fsdp2 is TorchTitan's mesh (replicate, shard, cp, tp), the last one innermost, with
// the experts over the innermost ranks; mop's groups are overlapping subsets of the same ranks.
struct Layout {
  int64_t ranks = 1;
  Span tensor, context;                  // fsdp2
  Span dense, dense_replicas;            // shards of the dense weights; ranks that hold the same shard
  Span expert, expert_shard;             // Ep; F
  Span sequence;                         // ranks that share a sequence: cp x tp, or D
  Span vocabulary, vocabulary_replicas;  // mop
  int64_t sequence_groups = 1;
};
Layout layout(const Plan& plan, int64_t gpus);  // of a resolved plan

}  // namespace mop::plan
