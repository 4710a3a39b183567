#include "sim/predict/estimate.h"

#include <algorithm>
#include <string>

#include "sim/model/counts.h"
#include "sim/model/tensors.h"
#include "sim/program/master.h"

namespace mop::predict {
namespace {

double real(int64_t n) {
  return static_cast<double>(n);
}

// What the plan's kernels and collectives reach.
const cluster::Table& rates(const Scenario& s, const std::string& name) {
  const auto& tables = s.cluster.tables;
  const auto own = s.plan.native() ? tables.find("native_" + name) : tables.end();
  return own != tables.end() ? own->second.table : s.cluster.table(name.c_str());
}

// Seconds that `bytes` a rank take in a ring or exchange over a group: the slower of NVLink inside and NICs
// across.
double on_links(const Scenario& s, const plan::Span& span, double bytes, const char* table) {
  if (span.size <= 1 || bytes <= 0) return 0;
  const auto& c = s.cluster;
  const cost::Placement at =
      cost::place({program::Axis::world, span.size, span.stride}, s.used_per_node(), s.gpus());
  const auto [nvlink, nic] =
      std::string_view(table) == "all_to_all" ? cost::among_all(at, bytes) : cost::in_a_ring(at, bytes);
  const auto network = c.tables.find(std::string("network_") + table);
  const double across = network != c.tables.end() ? network->second.table.at({1e9}).value : c["nic_bw"];
  return std::max(nvlink > 0 ? nvlink / rates(s, table).at({at.local(), 1e9}).value : 0,
                  nic > 0 ? nic / across : 0);
}

// Seconds a token and layer of FSDP2's memory-bound kernels, and a parameter of a rank's shard for its
// copies.
struct Eager {
  double token = 0, parameter = 0;
};
Eager eager(const Scenario& s, double tokens, double shards) {
  const auto& c = s.cluster;
  const auto& m = s.model;
  const bool compiled = s.plan.runtime == plan::Runtime::compiled;
  const double h = real(m.hidden), k = real(m.top_k), i = real(m.expert_intermediate);
  const double qk =
      real((m.heads + (m.attention == model::Attention::mla ? m.heads : m.kv_heads)) * m.qk_dim());
  const double bandwidth = c.table("memory_bound").at({1e9}).value * c["fused_kernel_share"];
  const auto each = [&](const char* table, double elements, double fused_bytes) {
    if (compiled && fused_bytes > 0) return elements * fused_bytes / bandwidth;
    return elements / c.table(table).at({std::max(1.0, elements * tokens)}).value;
  };
  const bool clamped = m.activation == model::Activation::clamped_swiglu;
  const double normed = 2 * h + (m.qk_norm != model::QkNorm::none ? qk : 0);
  const double forward = each("torch_rms_norm", normed, 4) + each("torch_rope", qk, 4) +
                         each("torch_gather", k * h, 4) +
                         each(clamped ? "torch_clamped_swiglu" : "torch_swiglu", k * i, 6) +
                         each("torch_gate_multiply", k * h, 4) +
                         (m.expert_bias ? each("torch_expert_bias", k * (2 * i + h), 4) : 0);
  const double scatter = each("torch_index_add", k * h, 0);
  const double backward = each("torch_rms_norm_bwd", normed, 8) + each("torch_rope_bwd", qk, 4) +
                          each("torch_gather", k * h, 4) +
                          each(clamped ? "torch_clamped_swiglu_bwd" : "torch_swiglu_bwd", k * i, 10) +
                          each("torch_gate_multiply_bwd", k * h, 6) + scatter +
                          (m.expert_bias ? each("torch_expert_bias_bwd", k * (2 * i + h), 0) : 0);
  const bool again = s.plan.recompute == plan::Recompute::full;
  const double loss = real(m.vocab) / real(m.layers) *
                      ((again ? 2 : 1) / c.table("torch_cross_entropy").at({1e9}).value +
                       1 / c.table("torch_cross_entropy_bwd").at({1e9}).value);
  Eager result;
  result.token = (again ? 2 : 1) * forward + (again && compiled ? 2 : 1) * scatter + backward + loss;
  result.parameter = 2 / c.table("torch_shard_copy_in").at({1e8}).value +
                     1 / c.table("torch_gradient_cast").at({1e8}).value +
                     3 * shards / c.table("torch_unsharded_copy_out").at({1e8}).value;
  return result;
}

}  // namespace

double estimate_step_time(const Scenario& s, double clock) {
  const auto& c = s.cluster;
  const plan::Plan& p = s.plan;
  const plan::Layout l = plan::layout(p, s.gpus());
  const model::Parameters parameters = model::count_parameters(s.model);
  const model::Flops f = model_flops(s);
  const bool mop = p.family == plan::Family::mop, native = p.native();
  const double gpus = real(s.gpus()), micro = real(s.workload.accumulate);
  const double tokens = real(tokens_per_step(s)) / gpus;  // of one rank, in the step

  // Computation: forward is a third of the model FLOPs; what is run again comes on top.
  // mop: in layers that keep nothing of theirs. The router's and MLA's heads' are not kept, experts' only
  // where all rows are one round.
  const double kept = real(p.kept_layers.value_or(0));
  const double again = mop                                    ? 1 - kept / real(s.model.layers)
                       : p.recompute == plan::Recompute::full ? 1.0
                                                              : 0.0;
  const bool one_round =
      l.expert.size == 1 && real(p.round_capacity()) >= tokens / micro * real(s.model.top_k);
  const double experts_again = !mop        ? again
                               : one_round ? std::max(0.0, 1 - kept / real(s.model.moe_layers()))
                                           : 1.0;
  double mla_heads = 0;  // forward, of a token
  if (s.model.attention == model::Attention::mla)
    for (const model::Role role :
         {s.model.q_lora_rank > 0 ? model::Role::q_b : model::Role::q, model::Role::kv_b}) {
      const model::MatrixShape of = model::shape(s.model, {role, 0});
      mla_heads += 2 * real(s.model.layers * of.rows * of.cols);
    }
  const double linear = f.projections + f.router + f.shared + f.dense_mlp,
               never_kept = mop ? (1 - again) * (f.router / 3 + mla_heads) : 0;
  const double matmul = rates(s, "matmul").at({8192, 8192, 8192}).value;
  const double rows =
      std::max(1.0, tokens / micro * real(s.model.top_k) / real(s.model.experts) * real(l.expert.size));
  const double grouped = rates(s, "grouped_matmul")
                             .at({real(s.model.hidden), real(2 * s.model.expert_intermediate),
                                  std::max(1.0, real(s.model.experts / l.expert.size)), rows})
                             .value;
  const double heads = real(s.model.heads) / real(native ? l.sequence.size : p.tensor);
  const auto attention = [&](const char* table) {
    return rates(s, table)
        .at({real(s.model.qk_dim()), real(s.model.v_dim()), std::max(1.0, heads * real(s.workload.sequences)),
             real(s.workload.context)})
        .value;
  };
  const bool attention_again = mop ? !p.save_attention : again > 0;
  double compute =
      tokens / clock *
      ((linear / 3 * (3 + again) + never_kept) / matmul + f.head / 3 * (3 + (native ? 0 : again)) / matmul +
       f.experts / 3 * (3 + experts_again * (native ? 2.0 / 3 : 1.0)) / grouped +
       f.attention / 3 *
           ((attention_again ? 2 : 1) / attention("attention_forward") +
            2.5 / attention("attention_backward")));

  if (!native) {
    const double shards = real(l.dense.size);
    const Eager e = eager(s, tokens / micro, shards);
    compute += tokens * real(s.model.layers) * e.token + micro * real(parameters.total) / gpus * e.parameter;
  }

  // Weights and tokens on the links.
  // fsdp2's root group: PyTorch's is taken for one more layer, ours is gathered once a step. mop gathers
  // neither table.
  const double root = mop ? 0 : real(parameters.embedding + parameters.head + parameters.final_norm);
  double dense = native ? 0 : root, experts = 0;
  for (const auto& layer : parameters.layers) dense += real(layer.dense()), experts += real(layer.experts);
  const double gradient = p.reduce == plan::Reduce::fp32 ? 4 : 2;
  // Gathered twice, reduced once. Ours finds the last two layers still gathered.
  const double gathers = native ? 2 - 2 / real(s.model.layers) : 2, moved = 2 * gathers + gradient;
  double links = micro * (on_links(s, l.dense, moved * dense / real(native ? 1 : p.tensor), "all_gather") +
                          on_links(s, l.expert_shard,
                                   moved * experts / real(native || p.expert > 1 ? l.expert.size : p.tensor),
                                   "all_gather"));
  if (native) links += on_links(s, l.dense, (2 + micro * gradient) * root, "all_gather");
  const double exchanged = real(s.model.top_k * s.model.hidden) * 2 * tokens * real(s.model.moe_layers());
  const double routed = on_links(s, l.expert, (native ? 5 : 6) * exchanged, "all_to_all");
  links += routed;
  if (native) {
    const double kv = s.model.attention == model::Attention::mla
                          ? real(s.model.heads)
                          : real(std::max(s.model.kv_heads, l.sequence.size));
    const double width = real(s.model.heads) * real(s.model.qk_dim() + s.model.v_dim()) +
                         kv * real(s.model.qk_dim() + s.model.v_dim());
    links += on_links(s, l.sequence, 2 * tokens * real(s.model.layers) * 3 * width, "all_to_all");
  }

  // The optimizer: over HBM, or over the host's memory and PCIe; FSDP2's runs when all else is done.
  const double shard = real(parameters.total) / gpus;
  const bool host =
      mop ? p.optimizer == plan::Optimizer::host || p.optimizer == plan::Optimizer::split : p.offloaded();
  const double hbm = c.table("memory_bound").at({1e15}).value;
  double update = shard * ((mop ? 26 : 28) + (!p.clip ? 0 : native ? 2 : 12)) / hbm;
  const double hosted =
      1 - real(p.optimizer_hbm_layers) / real(s.model.layers);  // part of the states on the host
  if (native && host)
    update =
        hosted * std::max(shard * real(program::kHostAdamTraffic) * real(s.used_per_node()) / c["dram_bw"],
                          shard / c["host_adam_rate_alone"]);
  if (mop && p.optimizer == plan::Optimizer::stream)
    update = hosted * shard * 20 * real(s.used_per_node()) / c["root_both_bw"];
  if (!mop && host && !native) {
    update = shard / c["torch_adam_rate"] +
             (p.clip ? shard * 4 / c["torch_norm_bw"] + shard * 8 / c["torch_scale_bw"] : 0);
    links += micro * shard * 8 * real(s.used_per_node()) / c["root_up_bw"] +
             micro * shard * 4 * real(s.used_per_node()) / c["root_down_bw"];
  }
  double copies =
      0;  // between host and HBM: fp32 weights as often as they are gathered, gradients once a step
  if (!mop && host && native)
    copies = 4 * real(s.used_per_node()) / gpus *
             std::max((micro * gathers * (dense + experts) + root) / c["root_up_bw"],
                      real(parameters.total) / c["root_down_bw"]);
  // FSDP2's updates follow all else. PyTorch's synchronous exchanges of expert parallelism do not overlap
  // with computation.
  if (!mop && native) return std::max({compute, links, copies}) + update;
  if (!mop) return std::max(compute + routed, links) + update;
  return std::max({compute, links, update});
}

}  // namespace mop::predict
