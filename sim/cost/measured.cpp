#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string>
#include <string_view>
#include <utility>

#include "sim/base/error.h"
#include "sim/cost/models.h"
#include "sim/program/alone.h"
#include "sim/program/landing.h"

namespace mop::cost {
namespace {

using engine::Demand;
using engine::Resource;
using program::OpKind;
using program::Phase;
using program::Shape;

constexpr double kSecond = 1e9;  // ns

struct Interference {
  double share;   // of the SMs, at full speed
  double weight;  // progress relative to a compute kernel's when the SMs are short
};

// Two jobs that slow each other down on the SMs: rates x = 1 / slowdown. Weighted sharing of one resource
// reproduces both when the collective's share is (1 - x_matmul) / x_collective and its weight x_collective /
// x_matmul.
Interference interference(double matmul_slowdown, double collective_slowdown) {
  const double matmul = 1 / std::max(1.0, matmul_slowdown),
               collective = 1 / std::max(1.0, collective_slowdown);
  return {std::clamp((1 - matmul) / collective, 0.0, 1.0), collective / matmul};
}

// Bytes that forward attention streams from HBM: each tile of 128 queries reads the keys and values of its
// head, `held` bytes, of which the L2 keeps 40 MB (a tile multiplies 128 x 2 times for each element, of 2
// bytes). So an H200's clock under it falls as contexts grow: in a row, heads of 128, 1695 MHz with 34 MB,
// 1635 with 50, 1545 with 67, 1410 with 101 and 1380 with 134; backward keeps its keys and values, and its
// clock (reports/measurements/h200x1/attention_lengths_2026-11-28-2306.txt).
double streamed(double flops, double held) {
  constexpr double kFlopsPerByte = 128, kKept = 40e6;
  return flops / kFlopsPerByte * std::max(0.0, 1 - kKept / std::max(1.0, held));
}

// What a kind of kernel uses, a matmul's being 1: of the SMs beside NCCL's kernels, of the crossbar beside
// copy engines; and its progress relative to a matmul's when either is short. stays: its blocks fill the
// multiprocessors until it ends; in timelines of our runs small kernels of other streams end right behind the
// product or the attention during which they started.
struct KernelUse {
  double sm = 1, crossbar = 0, weight = 1;
  bool stays = true;
};

// The cluster's figures and tables by name; where our own kernels run, native_<name> stands for <name> if it
// was measured.
class Known {
 public:
  Known(const cluster::ClusterModel& cluster, bool native) {
    for (const auto& [name, figure] : cluster.figures) figures_[name] = figure.value;
    for (const auto& [name, info] : cluster.tables) tables_[name] = &info.table;
    if (!native) return;
    for (const auto& [name, figure] : cluster.figures)
      if (const auto base = base_of(name); figures_.contains(base)) figures_[base] = figure.value;
    for (const auto& [name, info] : cluster.tables)
      if (const auto base = base_of(name); tables_.contains(base)) tables_[base] = &info.table;
  }
  double operator[](std::string_view name) const {
    const auto found = figures_.find(name);
    ensure(found != figures_.end(), "a figure that every cluster has");
    return found->second;
  }
  double figure(std::string_view name, double otherwise) const {
    const auto found = figures_.find(name);
    return found == figures_.end() ? otherwise : found->second;
  }
  const cluster::Table& table(std::string_view name) const {
    const cluster::Table* const found = find(name);
    ensure(found != nullptr, "a table that every cluster has");
    return *found;
  }
  const cluster::Table* find(std::string_view name) const {
    const auto found = tables_.find(name);
    return found == tables_.end() ? nullptr : found->second;
  }

 private:
  static constexpr std::string_view kNative = "native_";
  static std::string_view base_of(std::string_view name) {
    return name.starts_with(kNative) ? name.substr(kNative.size()) : std::string_view();
  }
  std::map<std::string_view, double> figures_;
  std::map<std::string_view, const cluster::Table*> tables_;
};

class Measured : public CostModel {
 public:
  Measured(const cluster::ClusterModel& cluster, const plan::Plan& plan, int64_t gpus, int64_t gpus_per_node,
           const StepClocks& clocks)
      : c_(cluster, plan.native()),
        torch_(!plan.native()),
        rooms_(!torch_ && cluster.figures.contains("native_all_gather_matmul_slowdown")),
        compiled_(plan.runtime == plan::Runtime::compiled),
        checkpointed_(plan.recompute == plan::Recompute::full),
        gpus_per_node_(gpus_per_node),
        gpus_(gpus),
        beside_(beside_adam()),
        clocks_(clocks),
        hbm_bw_(c_.table("memory_bound").at({1e15}).value),
        gather_(interference(c_["all_gather_matmul_slowdown"], c_["all_gather_slowdown"])),
        reduce_(interference(c_["reduce_scatter_matmul_slowdown"], c_["reduce_scatter_slowdown"])),
        exchange_(interference(c_["all_to_all_matmul_slowdown"], c_["all_to_all_slowdown"])),
        copied_gather_(copied("copy_engine_all_gather")),
        copied_reduce_(copied("copy_engine_reduce_scatter")),
        matmul_{1, copies() ? 1.0 : 0.0, 1},
        grouped_(use_of("grouped_matmul")),
        attention_(use_of("attention")),
        memory_(use_of("memory_bound")) {
    memory_.stays = false;
    if (torch_) return;
    for (size_t kind = 0; kind < own_kernels_.size(); ++kind)
      if (program::is_memory_bound(static_cast<OpKind>(kind)))
        own_kernels_[kind] = c_.find(std::string("native_") + program::name(static_cast<OpKind>(kind)));
  }

  Price price(const program::Op& op, const Shape& shape, const program::Group* group) const override {
    const bool exchange = program::is_collective(op.kind);
    Price p = exchange ? collective(op, shape, *group) : local(op, shape);
    p.launch_ns = static_cast<engine::Time>(launch(op));
    // Who comes after a kernel of another stream waits for it, and it for none of compute's but those that
    // stay.
    if (Demand& kernel = exchange ? p.after : p.demand; kernel.takes_room || kernel.needs_room) {
      if (op.stream == program::Stream::compute)
        kernel.needs_room = true;
      else
        kernel.takes_room = true, kernel.weight *= kPriority;
    }
    return p;
  }

 private:
  // Shares are of capacity over the whole duration; rounding up by less than a millionth keeps them above
  // zero.
  static void use(Demand& d, Resource r, double amount, double capacity, double seconds) {
    if (amount <= 0 || seconds <= 0) return;
    const double share = std::min(1.0, amount / (capacity * seconds));
    d.add(r, static_cast<uint32_t>(std::max(1.0, share * static_cast<double>(engine::kFull))));
  }
  // Fair in bytes/s: a flow that could draw twice the rate rises at half the pace. 1e12 bytes/s has weight
  // 4096.
  static uint32_t weight(double bytes_per_second) {
    return static_cast<uint32_t>(std::clamp(4096e12 / std::max(1.0, bytes_per_second), 1.0, 1048576.0));
  }
  static Demand lasting(double seconds) {
    Demand d;
    d.duration = static_cast<engine::Time>(std::llround(seconds * kSecond));
    return d;
  }
  static constexpr double kComputeWeight = 1024;  // that of a kernel that draws 4 TB/s
  // Our own kernels on other streams than compute have priority (exec/cuda/rank.cpp): a multiprocessor that
  // is free is theirs first.
  static constexpr uint32_t kPriority = 32;

  // CPU time. PyTorch: a kernel's share of eager forward, recompute or backward, and FSDP's own hooks around
  // a group's copies.
  double launch(const program::Op& op) const {
    if (!torch_) return op.kernels * c_["native_launch_ns"];
    if (program::is_collective(op.kind)) return c_["collective_launch_ns"];
    if (op.component == program::Component::weights) {
      if (op.kind == OpKind::copy) return c_["fsdp_unshard_launch_ns"];
      return op.kind == OpKind::concatenate ? c_["fsdp_reduce_launch_ns"] : 0;
    }
    const bool in_block = op.component != program::Component::vocabulary &&
                          op.component != program::Component::embedding && op.phase != Phase::optimizer;
    if (compiled_ && in_block) return op.kernels * c_["compiled_launch_ns"];
    const bool recorded = op.phase == Phase::recompute || (op.phase == Phase::forward && !checkpointed_);
    const char* each = op.phase == Phase::backward ? "eager_backward_launch_ns"
                       : recorded                  ? "eager_recompute_launch_ns"
                                                   : "eager_launch_ns";
    return op.kernels * c_[each];
  }

  // The measured rate of an eager operation, or null where bytes over bandwidth will do.
  static const char* eager_table(const program::Op& op, const Shape& s) {
    switch (op.kind) {
      case OpKind::rms_norm:
        return "torch_rms_norm";
      case OpKind::rms_norm_bwd:
        return "torch_rms_norm_bwd";
      case OpKind::rope:
        return "torch_rope";
      case OpKind::rope_bwd:
        return "torch_rope_bwd";
      case OpKind::swiglu:
        return "torch_swiglu";
      case OpKind::swiglu_bwd:
        return "torch_swiglu_bwd";
      case OpKind::clamped_swiglu:
        return "torch_clamped_swiglu";
      case OpKind::clamped_swiglu_bwd:
        return "torch_clamped_swiglu_bwd";
      case OpKind::expert_bias:
        return "torch_expert_bias";
      case OpKind::expert_bias_bwd:
        return "torch_expert_bias_bwd";
      case OpKind::topk:
        return "torch_router";
      case OpKind::topk_bwd:
        return "torch_router_bwd";
      case OpKind::sort:
        return "torch_sort";
      case OpKind::permute:
        return "torch_gather";
      case OpKind::unpermute:
        return "torch_index_add";
      case OpKind::scale:
        return op.phase == Phase::optimizer ? "torch_gradient_scale" : "torch_gate_multiply";
      case OpKind::scale_bwd:
        return "torch_gate_multiply_bwd";
      case OpKind::cross_entropy:
        return "torch_cross_entropy";
      case OpKind::cross_entropy_bwd:
        return "torch_cross_entropy_bwd";
      case OpKind::embedding_bwd:
        return "torch_embedding_bwd";
      case OpKind::cast:
        return s.v[1] > s.v[2] ? "torch_shard_copy_in" : "torch_gradient_cast";
      case OpKind::copy:
      case OpKind::concatenate:
        return "torch_unsharded_copy_out";
      case OpKind::square_sum:
        return "torch_gradient_norm";
      case OpKind::adam:
        return "torch_adamw";
      default:
        return nullptr;
    }
  }

  // Copy engines meet kernels at the crossbar, and NCCL on the links, where they take what they want: there,
  // how much each of the two loses says who gives way, if it was measured. The share of the crossbar is then
  // what slows a matmul down as measured.
  Interference copied(const std::string& name) const {
    const double matmul = std::max(1.0, c_.figure(name + "_matmul_slowdown", 1));
    const Interference at_crossbar = interference(matmul, c_.figure(name + "_slowdown", 1));
    const double exchange = c_.figure("native_all_to_all_beside_gather_slowdown", 0),
                 gather = c_.figure("copy_engine_all_gather_beside_exchange_slowdown", 0);
    if (exchange == 0 || gather == 0) return at_crossbar;
    const double weight = exchange_.weight * std::max(1.0, exchange) / std::max(1.0, gather);
    if (weight <= at_crossbar.weight) return at_crossbar;
    return {weight >= matmul ? 1 - 1 / matmul : (matmul - 1) / weight, weight};
  }

  static constexpr double kUntouched = 1.01;  // a slowdown up to which a kernel is none the slower

  // Two jobs share a resource as interference() has it: a kernel that is x times slower beside a collective,
  // which is y times slower itself, uses (1 - share / y) x of it. One that would use more than all gives way
  // instead. Where y was not measured, the collective is taken to lose as it does beside matmuls, in
  // proportion to what the kernel loses.
  KernelUse use_of(const std::string& kind) const {
    KernelUse use = matmul_;
    if (torch_) return use;
    double logs = 0;  // of weights
    int weights = 0;
    const auto mean = [&](std::initializer_list<const char*> collectives, double& share) {
      double shares = 0;
      int count = 0;
      for (const std::string name : collectives) {
        const double of_kind = c_.figure(name + "_" + kind + "_slowdown", 0),
                     of_matmul = c_.figure(name + "_matmul_slowdown", 1),
                     of_it = c_.figure(name + "_slowdown", 1);
        if (of_kind == 0 || of_matmul <= 1) continue;
        const double x = std::max(1.0, of_kind);
        const Interference with =
            name.starts_with("copy_engine") ? copied(name) : interference(of_matmul, of_it);
        const double part = std::clamp((x - 1) / (of_matmul - 1), 0.0, 1.0),
                     y = std::max(1.0,
                                  c_.figure(name + "_under_" + kind + "_slowdown", 1 + part * (of_it - 1)));
        const double used = (1 - with.share / y) * x;
        shares += std::clamp(used, 0.0, 1.0);
        ++count;
        if (x <= kUntouched) continue;  // nothing was short: it says nothing of who gives way
        logs += std::log(std::clamp(used < 1 ? with.weight * y / x : (of_matmul - 1) / (x - 1), 0.125, 8.0));
        ++weights;
      }
      if (count > 0) share = shares / count;
    };
    mean({"native_all_gather", "native_reduce_scatter", "native_all_to_all"}, use.sm);
    mean({"copy_engine_all_gather", "copy_engine_reduce_scatter"}, use.crossbar);
    if (weights > 0) use.weight = std::exp(logs / weights);
    return use;
  }

  // Whether copy engines have prices of their own.
  bool copies() const { return !torch_ && c_.find("copy_engine_all_gather") != nullptr; }

  Price kernel(double seconds, double bytes, bool outside, const KernelUse& of) const {
    Price p{lasting(seconds), 0, outside};
    p.demand.takes_room = rooms_ && of.stays;
    p.demand.needs_room = rooms_ && !of.stays;
    p.demand.weight = static_cast<uint32_t>(kComputeWeight * of.weight);
    use(p.demand, Resource::sm, of.sm, 1, 1);
    use(p.demand, Resource::crossbar, of.crossbar, 1, 1);
    use(p.demand, Resource::hbm, bytes, hbm_bw_, seconds);
    return p;
  }

  // Of tensor work at the clock of its kind. rate: at the largest.
  double tensor_seconds(const program::Op& op, Draws draws, double flops, double rate, double least,
                        double bytes) const {
    const double clock = clocks_[stage_of(op.phase)].tensor[static_cast<size_t>(draws)];
    return std::max({least, flops / (clock * rate), bytes / hbm_bw_});
  }
  Price tensor(const program::Op& op, Draws draws, double flops, double rate, double least, double bytes,
               bool outside, const KernelUse& of) const {
    Price p = kernel(tensor_seconds(op, draws, flops, rate, least, bytes), bytes, outside, of);
    p.draws = draws;
    return p;
  }

  Price local(const program::Op& op, const Shape& s) const {
    const auto v = [&](int i) { return static_cast<double>(s.v[i]); };
    const double flops = program::flops(op.kind, s), bytes = program::hbm_bytes(op.kind, s);
    const double least = c_["kernel_ns"] / kSecond * std::max<double>(1, op.kernels);
    switch (op.kind) {
      case OpKind::gemm: {
        if (flops <= 0) return kernel(least, 0, false, matmul_);
        // Gradients of weights; what a router adds to its input's gradient, a sum in fp32 whose bytes count.
        const bool routers = op.component == program::Component::router && op.does.accumulate;
        const char* const other = op.does.transpose_a ? "native_matmul_gradient"
                                  : routers           ? "native_router_gradient"
                                                      : nullptr;
        const cluster::Table* const own = !torch_ && other != nullptr ? c_.find(other) : nullptr;
        const auto rate = (own != nullptr ? *own : c_.table("matmul")).at({v(0), v(1), v(2)});
        if (routers && own != nullptr)  // bytes, which no clock holds up
          return kernel(std::max({least, flops / rate.value, bytes / hbm_bw_}), bytes, rate.outside, matmul_);
        return tensor(op, draws_of_product(v(2)), flops, rate.value, least, bytes, rate.outside, matmul_);
      }
      case OpKind::grouped_gemm: {
        const bool gradient = !torch_ && op.does.transpose_a, adds = gradient && op.does.accumulate;
        // Experts beyond those that the work comes from cost their weights, or the gradients of those, which
        // no work hides. (One layer of Qwen3 with 109 such took 0.2 to 0.4 ms more a product than one with
        // 39.)
        const double beyond = std::max(0.0, v(4) - v(3)) * 2 * v(1) * v(2) * (adds ? 2 : 1);
        if (flops <= 0) {
          const double zeros = gradient ? beyond : 0;
          return kernel(std::max(least, zeros / hbm_bw_), zeros, false, matmul_);
        }
        const char *table = "native_grouped_matmul_gradient", *alike = "native_grouped_matmul_added";
        if (adds) std::swap(table, alike);
        const cluster::Table* own = gradient ? c_.find(table) : nullptr;
        if (gradient && own == nullptr) own = c_.find(alike);
        const auto rate = (own != nullptr ? *own : c_.table("grouped_matmul"))
                              .at({v(2), v(1), v(3), std::max(1.0, v(0) / v(3))});
        const bool alone = program::alone(v(0) / v(3), v(1), op.does.transpose_a);
        const Draws draws =
            alone ? draws_of_product(op.does.transpose_a ? v(0) / v(3) : v(2)) : Draws::grouped_matmul;
        Price p =
            kernel(tensor_seconds(op, draws, flops, rate.value, least, bytes - beyond) + beyond / hbm_bw_,
                   bytes, rate.outside, grouped_);
        p.draws = draws;
        if (alone) p.demand.kernels = static_cast<uint16_t>(std::clamp<int64_t>(s.v[3], 1, UINT16_MAX));
        return p;
      }
      case OpKind::attention_fwd:
      case OpKind::attention_bwd: {
        const auto a = program::AttentionShape::of(s);
        // A window or a ring block is priced as causal attention with the same number of keys a query.
        const double length = std::max(1.0, 2 * a.pairs() / static_cast<double>(a.q_len));
        const double parallel =
            static_cast<double>(a.heads * a.batch) * std::max(1.0, static_cast<double>(a.q_len) / length);
        const bool forward = op.kind == OpKind::attention_fwd;
        const auto qk = static_cast<double>(a.qk_dim), width = static_cast<double>(a.v_dim);
        const cluster::Table* const windows =
            !torch_ && a.window > 0 && a.window < a.q_len && a.q_len == a.kv_len
                ? c_.find(forward ? "native_window_attention_forward" : "native_window_attention_backward")
                : nullptr;
        const auto rate =
            windows != nullptr
                ? windows->at({qk, width, static_cast<double>(a.window),
                               static_cast<double>(a.heads * a.batch), static_cast<double>(a.q_len)})
                : c_.table(forward ? "attention_forward" : "attention_backward")
                      .at({qk, width, parallel, length});
        const double keys = std::min(length, static_cast<double>(a.kv_len)),
                     streams = forward ? streamed(flops, keys * 2 * (qk + width)) : 0;
        Price p = tensor(op, draws_of_attention(qk + width, forward), flops, rate.value, least,
                         bytes + streams, rate.outside, attention_);
        p.streams = streams / hbm_bw_;
        return p;
      }
      case OpKind::copy_h2d:
      case OpKind::copy_d2h:
        return copy(op.kind == OpKind::copy_h2d, bytes);
      case OpKind::adam_host:
      case OpKind::norm_host:
      case OpKind::scale_host:
        return host(op.kind, v(0), v(1));
      default: {
        if (op.kernels == 0) return {};
        if (const char* table = op.eager ? eager_table(op, s) : nullptr; table != nullptr && v(0) > 0) {
          const auto rate = c_.table(table).at({v(0)});
          return kernel(std::max({least / 4, v(0) / rate.value, bytes / hbm_bw_}), bytes, rate.outside,
                        memory_);
        }
        if (const cluster::Table* const own = own_kernel(op, s); own != nullptr && bytes > 0) {
          const bool rotates = op.kind == OpKind::rope || op.kind == OpKind::rope_bwd;
          const double rate = (rotates ? own->at({std::max(1.0, v(3)), bytes}) : own->at({bytes})).value;
          return kernel(std::max({least, bytes / rate, bytes / c_["hbm_peak_bw"]}), bytes, false, memory_);
        }
        const double each = bytes / op.kernels;
        const double rate =
            each > 0 ? c_.table("memory_bound").at({each}).value * (op.eager ? 1 : c_["fused_kernel_share"])
                     : 1;
        return kernel(std::max(least, bytes / rate), bytes, false, memory_);
      }
    }
  }

  // The rate of our own kernel, or null where that of all fused kernels will do.
  const cluster::Table* own_kernel(const program::Op& op, const Shape& s) const {
    if (torch_) return nullptr;
    if (op.kind == OpKind::adam && op.does.b == static_cast<int64_t>(program::Master::low))
      return c_.find("native_adam_low");
    const bool widens = op.kind == OpKind::cast && s.v[1] < s.v[2];
    const cluster::Table* const wide = widens ? c_.find("native_widen") : nullptr;
    return wide != nullptr ? wide : own_kernels_[static_cast<size_t>(op.kind)];
  }

  Price copy(bool up, double bytes) const {
    // A host may give less than one GPU's link takes.
    const double link = c_[up ? "pcie_up_bw" : "pcie_down_bw"], root = c_[up ? "root_up_bw" : "root_down_bw"],
                 rate = std::min({link, root, c_["root_both_bw"]});
    const double seconds = c_["copy_latency_ns"] / kSecond + bytes / rate;
    Price p{lasting(seconds), 0, false};
    Demand& d = p.demand;
    const double down = down_share();
    d.weight = weight(bytes / seconds / (2 * (up ? 1 - down : down)));
    use(d, up ? Resource::pcie_up : Resource::pcie_down, bytes, link, seconds);
    use(d, Resource::pcie_both, bytes, c_["pcie_both_bw"], seconds);
    use(d, up ? Resource::root_up : Resource::root_down, bytes, root, seconds);
    use(d, Resource::root_both, bytes, c_["root_both_bw"], seconds);  // one way alone moves no more
    use(d, Resource::dram, bytes * beside_.cost, c_["dram_bw"], seconds);
    use(d, Resource::hbm, bytes, hbm_bw_, seconds);
    return p;
  }

  // Copies beside AdamW, as measured of those to the GPUs: how many of its bytes AdamW has to do without for
  // one that is copied, and bytes copied for each that it moves. Without a measurement all are alike.
  struct BesideAdam {
    double cost = 1, pace = 1;
  };
  BesideAdam beside_adam() const {
    const double rate = c_.figure("adam_beside_copies", 0), copied = c_.figure("copies_beside_adam", 0);
    if (torch_ || rate <= 0 || copied <= 0) return {};
    // What is copied up has its part of both ways' pace (copy()); AdamW has to keep the measured one to it.
    return {std::clamp((1 - rate) / (rate * copied), 0.0, 1.0), 2 * (1 - down_share()) / copied};
  }
  double down_share() const {  // of both ways one may give way to the other
    const bool alone = std::min(gpus_, gpus_per_node_) == 1;
    return c_.figure(alone ? "pcie_down_share" : "root_down_share", 0.5);
  }

  // CPU work of one rank. PyTorch's rates were measured with one process a GPU, so its share of the DRAM is
  // at most that.
  Price host(OpKind kind, double parameters, double traffic) const {
    double seconds = 0;
    if (torch_)
      seconds = kind == OpKind::adam_host
                    ? parameters / c_["torch_adam_rate"]
                    : traffic / c_[kind == OpKind::norm_host ? "torch_norm_bw" : "torch_scale_bw"];
    else
      seconds = parameters / c_["host_adam_rate_alone"];
    const double limit = torch_ ? 1 / static_cast<double>(gpus_per_node_) : 1.0;
    const double least = traffic / c_["dram_bw"];
    if (!torch_) seconds = std::max(seconds, least);
    Price p{lasting(seconds), 0, false};
    p.demand.weight = weight(traffic / std::max(seconds, 1e-12) / beside_.pace);
    use(p.demand, Resource::dram, std::min(least / std::max(seconds, 1e-12), limit), 1, 1);
    return p;
  }

  Price collective(const program::Op& op, const Shape& s, const program::Group& group) const {
    const auto v = [&](int i) { return static_cast<double>(s.v[i]); };
    const Placement at = place(group, gpus_per_node_, gpus_);
    const double n = static_cast<double>(at.ranks), g = at.local(), m = static_cast<double>(at.nodes);
    LinkBytes links;
    double buffer = v(0);  // the message size that the table is asked for
    const bool rows =
        op.does.exchange == program::Exchange::dispatch || op.does.exchange == program::Exchange::combine;
    const bool spills = program::spills(op.does.exchange);
    std::string_view table = "all_gather";
    Interference with = gather_;
    Resource meets = Resource::sm;
    switch (op.kind) {
      case OpKind::all_gather:
      case OpKind::reduce_scatter:
      case OpKind::all_reduce: {
        links = in_a_ring(at, (op.kind == OpKind::all_reduce ? 2 : 1) * v(0));
        table = op.kind == OpKind::all_gather       ? "all_gather"
                : op.kind == OpKind::reduce_scatter ? "reduce_scatter"
                                                    : "all_reduce";
        if (op.kind != OpKind::all_gather) with = reduce_;
        break;
      }
      case OpKind::all_to_all:
        // Columns go to all ranks alike, this one included; of rows v(2) go to others of the node and v(3) to
        // other nodes; what is spilled all goes to others, v(2) of it to other nodes.
        buffer = std::max(v(0), v(1));
        if (rows)
          links = {v(2), v(3)};
        else if (spills)
          links = {g > 1 ? buffer - v(2) : 0, v(2)};
        else
          links = among_all(at, buffer);
        if (rows || spills) buffer = (links.nvlink + links.nic) * n / (n - 1);
        table = "all_to_all";
        with = exchange_;
        break;
      case OpKind::send_recv:
        // Neighbours of a ring; on the rank at a node's edge the next one is across the network.
        buffer = 2 * v(0);
        links = m > 1 ? LinkBytes{0, v(0)} : LinkBytes{v(0), 0};
        table = "all_to_all";
        with = exchange_;
        break;
      default:
        ensure(false, "a collective operation");
    }
    auto [nvlink, nic] = links;
    // By copy engines, as exec/cuda/peer_memory.h does it.
    const bool reduces = op.kind == OpKind::reduce_scatter;
    if (!torch_ && m <= 1 && program::by_copy_engines(op, group.span())) {
      const std::string_view copied = reduces ? "copy_engine_reduce_scatter" : "copy_engine_all_gather";
      if (c_.find(copied) != nullptr)
        table = copied, with = reduces ? copied_reduce_ : copied_gather_, meets = Resource::crossbar;
    }
    bool outside = false;
    double on_nvlink = 0, on_nic = 0;
    if (nvlink > 0) {
      const auto bus = c_.table(table).at({g, std::max(1.0, buffer)});
      on_nvlink = nvlink / bus.value;
      outside = bus.outside;
    }
    if (nic > 0) {
      const double hops = c_["nic_latency_ns"] / kSecond * (1 + std::log2(m));
      const bool one_way = spills && std::min(v(0), v(1)) <= 0;
      const cluster::Table* const sends = one_way ? c_.find("network_send") : nullptr;
      const cluster::Table* const network =
          sends != nullptr ? sends : c_.find(std::string("network_").append(table));
      if (network != nullptr) {
        const auto rate = network->at({std::max(1.0, sends != nullptr ? nic : buffer)});
        on_nic = std::max(nic / rate.value, hops);
        outside = outside || rate.outside;
      } else {
        on_nic = nic / c_["nic_bw"] + hops;
      }
    }
    // What our executor packs or unpacks (sim/program/workspace.h), read and written once, on the same
    // stream.
    const double exchanged = std::max(v(0), v(1));
    const bool packs =
        !torch_ && op.kind == OpKind::all_to_all && program::packs(op.does.exchange) && exchanged > 0;
    const cluster::Table* const reorders =  // rows, by the kernel that permutes them
        rows ? own_kernels_[static_cast<size_t>(OpKind::permute)] : nullptr;
    const cluster::Table& packer = reorders != nullptr ? *reorders : c_.table("memory_bound");
    const double packing = packs ? 2 * exchanged / packer.at({2 * exchanged}).value : 0;
    const bool apart = packs && op.region == 0;  // kernels of their own, which links have nothing to do with
    Price p{{}, 0, outside};
    double seconds = std::max({on_nvlink, on_nic, c_["kernel_ns"] / kSecond}) + (apart ? 0 : packing);
    if (apart) p.after = kernel(packing, 2 * exchanged, false, memory_).demand;
    if (reduces && meets == Resource::crossbar) {
      // Parts land in pieces, and a kernel adds up each (sim/program/landing.h).
      const double part = v(0) / n, read = part * (op.does.accumulate ? n + 2 : n + 1);
      p.turns = static_cast<int>(program::landing_pieces(static_cast<int64_t>(part), group.size));
      const double sum = std::max(c_["kernel_ns"] / kSecond,
                                  read / p.turns / c_.table("memory_bound").at({read / p.turns}).value);
      seconds = std::max(seconds / p.turns - sum, nvlink / p.turns / c_["nvlink_bw"]);
      nvlink /= p.turns;
      p.after = kernel(sum, read / p.turns, false, memory_).demand;
    }
    p.demand = lasting(seconds);
    Demand& d = p.demand;
    d.needs_room = rooms_ && meets == Resource::sm;
    if (packs && !apart) use(d, Resource::hbm, 2 * exchanged, hbm_bw_, seconds);
    // A collective that the network holds back moves fewer bytes through the SMs a second.
    const double busy =
        on_nic > 0 ? std::clamp(std::max(on_nvlink, nic / c_["nvlink_bw"]) / seconds, 0.1, 1.0) : 1.0;
    d.weight = static_cast<uint32_t>(std::max(1.0, kComputeWeight * with.weight / busy));
    if (const auto sm = static_cast<uint32_t>(with.share * busy * static_cast<double>(engine::kFull)); sm > 0)
      d.add(meets, sm);
    use(d, Resource::nvlink_out, nvlink, c_["nvlink_bw"], seconds);
    use(d, Resource::nvlink_in, nvlink, c_["nvlink_bw"], seconds);
    use(d, Resource::nic_out, nic, c_["nic_bw"], seconds);
    use(d, Resource::nic_in, nic, c_["nic_bw"], seconds);
    return p;
  }

  const Known c_;
  bool torch_;
  bool rooms_;  // else the waits for room are in the slowdowns: those of mop calibrate have the collective
                // there first
  bool compiled_, checkpointed_;
  int64_t gpus_per_node_, gpus_;
  BesideAdam beside_;
  StepClocks clocks_;  // those of the tables being 1
  double hbm_bw_;
  Interference gather_, reduce_, exchange_, copied_gather_, copied_reduce_;
  KernelUse matmul_, grouped_, attention_, memory_;
  std::array<const cluster::Table*, static_cast<size_t>(OpKind::next_batch) + 1> own_kernels_{};
};

}  // namespace

std::unique_ptr<CostModel> make_measured(const cluster::ClusterModel& cluster, const plan::Plan& plan,
                                         int64_t gpus, int64_t gpus_per_node, const StepClocks& clocks) {
  return std::make_unique<Measured>(cluster, plan, gpus, gpus_per_node, clocks);
}

}  // namespace mop::cost
