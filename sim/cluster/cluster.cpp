#include "sim/cluster/cluster.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/base/paths.h"
#include "sim/base/suggest.h"

namespace mop::cluster {

using Json = nlohmann::json;

const std::vector<const char*> kFigures{
    // node
    "gpus_per_node",
    "host_bytes",
    "dram_bw",
    "root_up_bw",
    "root_down_bw",
    "root_both_bw",
    "host_adam_rate_alone",
    "torch_adam_rate",
    "torch_norm_bw",
    "torch_scale_bw",
    // GPU
    "peak_flops",
    "hbm_bytes",
    "hbm_peak_bw",
    "nvlink_bw",
    "pcie_up_bw",
    "pcie_down_bw",
    "pcie_both_bw",
    "pcie_peak_bw",
    "kernel_ns",
    "copy_latency_ns",
    // network
    "nic_bw",
    "nic_peak_bw",
    "nic_latency_ns",
    // what runs beside what
    "all_gather_matmul_slowdown",
    "all_gather_slowdown",
    "reduce_scatter_matmul_slowdown",
    "reduce_scatter_slowdown",
    "all_to_all_matmul_slowdown",
    "all_to_all_slowdown",
    // HBM that is not in any buffer
    "context_bytes",
    "library_bytes",
    "communicator_bytes",
    "communicator_p2p_bytes",
    // launches
    "native_launch_ns",
    "eager_launch_ns",
    "eager_recompute_launch_ns",
    "eager_backward_launch_ns",
    "compiled_launch_ns",
    "collective_launch_ns",
    "fsdp_unshard_launch_ns",
    "fsdp_reduce_launch_ns",
    // bandwidth of a fused memory-bound kernel over that of a copy
    "fused_kernel_share",
};

namespace {

// The tables: number of kind axes, number of grid axes.
struct TableForm {
  const char* name;
  size_t kinds, axes;
};
constexpr std::array kTables{
    TableForm{"matmul", 0, 3},              // m, n, k -> FLOP/s
    TableForm{"grouped_matmul", 2, 2},      // k, n; experts, rows an expert -> FLOP/s
    TableForm{"attention_forward", 2, 2},   // qk width, v width; heads x batch, S -> FLOP/s (causal)
    TableForm{"attention_backward", 2, 2},  // same, of 2.5 x forward FLOPs
    TableForm{"memory_bound", 0, 1},        // bytes moved by one kernel -> bytes/s
    TableForm{"all_gather", 0, 2},          // ranks, bytes of the full buffer -> bus bytes/s
    TableForm{"reduce_scatter", 0, 2},
    TableForm{"all_reduce", 0, 2},
    TableForm{"all_to_all", 0, 2},
    // PyTorch's eager operations: elements -> elements/s
    TableForm{"torch_rms_norm", 0, 1},
    TableForm{"torch_rms_norm_bwd", 0, 1},
    TableForm{"torch_rope", 0, 1},
    TableForm{"torch_rope_bwd", 0, 1},
    TableForm{"torch_gather", 0, 1},
    TableForm{"torch_index_add", 0, 1},
    TableForm{"torch_gate_multiply", 0, 1},
    TableForm{"torch_gate_multiply_bwd", 0, 1},
    TableForm{"torch_swiglu", 0, 1},
    TableForm{"torch_swiglu_bwd", 0, 1},
    TableForm{"torch_router", 0, 1},
    TableForm{"torch_router_bwd", 0, 1},
    TableForm{"torch_sort", 0, 1},
    TableForm{"torch_cross_entropy", 0, 1},
    TableForm{"torch_cross_entropy_bwd", 0, 1},
    TableForm{"torch_embedding_bwd", 0, 1},
    TableForm{"torch_shard_copy_in", 0, 1},
    TableForm{"torch_unsharded_copy_out", 0, 1},
    TableForm{"torch_gradient_cast", 0, 1},
    TableForm{"torch_gradient_norm", 0, 1},
    TableForm{"torch_gradient_scale", 0, 1},
    TableForm{"torch_adamw", 0, 1},
    TableForm{"torch_expert_bias", 0, 1},
    TableForm{"torch_expert_bias_bwd", 0, 1},
    TableForm{"torch_clamped_swiglu", 0, 1},
    TableForm{"torch_clamped_swiglu_bwd", 0, 1},
};

// Tables that a file may have. What mop calibrate measures with our own kernels: it prices native plans.
constexpr std::array kOptionalTables{
    TableForm{"native_matmul", 0, 3},
    TableForm{"native_matmul_gradient", 0, 3},  // C += A^T B, of (m, n, k)
    TableForm{"native_router_gradient", 0, 3},  // C += A B in fp32, of (m, n, k)
    TableForm{"native_grouped_matmul", 2, 2},
    TableForm{"native_grouped_matmul_gradient", 2, 2},
    TableForm{"native_grouped_matmul_added", 2, 2},  // gradients, added to what is there
    TableForm{"native_attention_forward", 2, 2},
    TableForm{"native_attention_backward", 2, 2},
    // qk width, v width; window, heads x batch, S -> FLOP/s of the keys within the window
    TableForm{"native_window_attention_forward", 2, 3},
    TableForm{"native_window_attention_backward", 2, 3},
    TableForm{"native_memory_bound", 0, 1},
    TableForm{"gpu_clock", 0, 1},  // GPU of a node, from 1 -> its clock under tensor work over the median's
    TableForm{"native_all_gather", 0, 2},
    TableForm{"native_reduce_scatter", 0, 2},
    TableForm{"native_all_reduce", 0, 2},
    TableForm{"native_all_to_all", 0, 2},
    TableForm{"copy_engine_all_gather", 0, 2},  // within a node, form as all_gather
    TableForm{"copy_engine_reduce_scatter", 0, 2},
    // One kernel each, by the name of its operation: bytes read and written, as the step program counts them
    // -> bytes/s
    TableForm{"native_rms_norm", 0, 1},
    TableForm{"native_rms_norm_bwd", 0, 1},
    TableForm{"native_rope", 1, 1},  // width of the norm before it, 1: none
    TableForm{"native_rope_bwd", 1, 1},
    TableForm{"native_mla_keys", 0, 1},
    TableForm{"native_mla_keys_bwd", 0, 1},
    TableForm{"native_swiglu", 0, 1},
    TableForm{"native_swiglu_bwd", 0, 1},
    TableForm{"native_clamped_swiglu", 0, 1},
    TableForm{"native_clamped_swiglu_bwd", 0, 1},
    TableForm{"native_expert_bias_bwd", 0, 1},
    TableForm{"native_column_sum", 0, 1},
    TableForm{"native_add", 0, 1},
    TableForm{"native_sum_replicas", 0, 1},
    TableForm{"native_cast", 0, 1},
    TableForm{"native_widen", 0, 1},  // a cast to fp32
    TableForm{"native_clear", 0, 1},
    TableForm{"native_topk", 0, 1},
    TableForm{"native_topk_bwd", 0, 1},
    TableForm{"native_sort", 0, 1},
    TableForm{"native_permute", 0, 1},
    TableForm{"native_unpermute", 0, 1},
    TableForm{"native_unpermute_bwd", 0, 1},
    TableForm{"native_embedding", 0, 1},
    TableForm{"native_embedding_bwd", 0, 1},
    TableForm{"native_cross_entropy", 0, 1},
    TableForm{"native_cross_entropy_bwd", 0, 1},
    TableForm{"native_square_sum", 0, 1},
    TableForm{"native_adam", 0, 1},
    TableForm{"native_adam_low", 0, 1},  // the master copy as the low bits of bf16 weights
    // Bytes of the full buffer -> bytes/s that a GPU sends to other nodes; without them nic_bw.
    TableForm{"network_all_gather", 0, 1},
    TableForm{"network_reduce_scatter", 0, 1},
    TableForm{"network_all_reduce", 0, 1},
    TableForm{"network_all_to_all", 0, 1},
    TableForm{"network_send", 0, 1},  // one way
    // Recorded, and priced by nothing: GPUs of the host at once -> bytes/s of all; NCCL's network transport
    // on one host.
    TableForm{"host_copies_up", 0, 1},
    TableForm{"host_copies_down", 0, 1},
    TableForm{"host_copies_both", 0, 1},
    TableForm{"emulated_network_all_gather", 0, 2},
    TableForm{"emulated_network_reduce_scatter", 0, 2},
    TableForm{"emulated_network_all_reduce", 0, 2},
    TableForm{"emulated_network_all_to_all", 0, 2},
    TableForm{"emulated_network_send", 0, 2},
};

const TableForm* form_of(const std::string& name) {
  const auto in = [&](const auto& forms) {
    const auto found =
        std::find_if(forms.begin(), forms.end(), [&](const TableForm& t) { return name == t.name; });
    return found == forms.end() ? nullptr : &*found;
  };
  const TableForm* form = in(kTables);
  return form != nullptr ? form : in(kOptionalTables);
}

// Only what is added to something may be zero; the rest divides.
bool may_be_zero(std::string_view figure) {
  return figure.ends_with("_ns") || figure.ends_with("context_bytes") || figure.ends_with("library_bytes") ||
         figure.find("communicator_") != std::string_view::npos || figure.ends_with("peer_memory_bytes");
}

std::optional<Spread> parse_spread(const Json& json, const std::string& where) {
  const bool pair = json.is_array() && json.size() == 2 && json[0].is_number() && json[1].is_number();
  const Spread spread = pair ? Spread{json[0].get<double>(), json[1].get<double>()} : Spread{-1, -1};
  if (!(spread.low >= 0 && spread.low <= 1 && spread.high >= 1 && std::isfinite(spread.high)))
    throw UserError(
        fmt::format("{}: a spread is the smallest and the largest over the value, like [0.98, 1.03]", where));
  return spread;
}

Source parse_source(const std::string& text, const std::string& where) {
  if (text == "measured") return Source::measured;
  if (text == "published") return Source::published;
  if (text == "assumed") return Source::assumed;
  throw UserError(fmt::format("{}: source '{}' is none of measured, published, assumed", where, text));
}

Json load(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) throw UserError(fmt::format("cannot read cluster file {}", path.string()));
  Json json = Json::parse(file, nullptr, false);
  if (json.is_discarded() || !json.is_object())
    throw UserError(fmt::format("{} is not a JSON object", path.string()));
  return json;
}

// Of a figure or table that cannot be read: what mop calibrate of another version wrote may not be known
// here.
std::string made_by(const Json& entry) {
  const bool calibrated = entry.is_object() && entry.contains("where") && entry["where"].is_string() &&
                          entry["where"].get<std::string>().find("mop calibrate") != std::string::npos;
  return calibrated ? "; a mop calibrate of another version wrote it: run mop calibrate again" : "";
}

void read_into(ClusterModel& model, const std::filesystem::path& path, int depth) {
  if (depth > 8) throw UserError(fmt::format("{}: 'base' goes round in a circle", path.string()));
  const Json json = load(path);
  const std::string file = path.string();
  if (json.contains("base")) {
    if (!json["base"].is_string()) throw UserError(fmt::format("{}: 'base' is not a text", file));
    const auto base = path.parent_path() / (json["base"].get<std::string>() + ".json");
    if (!std::filesystem::exists(base))
      throw UserError(fmt::format(
          "{} is based on {}, which is not there: bring it, or name the cluster file where it lies",
          path.string(), base.string()));
    read_into(model, base, depth + 1);
  }
  model.name = path.stem().string();
  if (json.contains("description") && !json["description"].is_string())
    throw UserError(fmt::format("{}: 'description' is not a text", file));
  model.description = json.value("description", std::string());
  const Json none = Json::object();
  for (const char* section : {"figures", "tables"})
    if (json.contains(section) && !json[section].is_object())
      throw UserError(fmt::format("{}: '{}' is not an object of names", file, section));
  // What the base's own kernels reach says nothing of another figure or table.
  for (const auto& [key, entry] : (json.contains("figures") ? json["figures"] : none).items())
    model.figures.erase("native_" + key);
  for (const auto& [key, entry] : (json.contains("tables") ? json["tables"] : none).items())
    model.tables.erase("native_" + key);
  for (const auto& [key, entry] : (json.contains("figures") ? json["figures"] : none).items()) {
    const std::string where = fmt::format("{}: figure {}", file, key);
    std::vector<std::string> known(kFigures.begin(), kFigures.end());
    known.insert(known.end(), optional_figures().begin(), optional_figures().end());
    if (std::find(known.begin(), known.end(), key) == known.end())
      throw UserError(fmt::format("{}: {}{}", file, unknown_name("figure", key, known), made_by(entry)));
    if (!entry.is_object() || !entry.contains("value") || !entry["value"].is_number() ||
        !entry.contains("source") || !entry["source"].is_string() || !entry.contains("where") ||
        !entry["where"].is_string())
      throw UserError(fmt::format("{} needs value (a number), source and where (texts)", where));
    const double value = entry["value"].get<double>();
    if (!std::isfinite(value) || value < 0)
      throw UserError(fmt::format("{} is {}: not a usable number", where, value));
    model.figures[key] = {value, parse_source(entry["source"].get<std::string>(), where),
                          entry["where"].get<std::string>()};
    if (entry.contains("spread")) model.figures[key].spread = parse_spread(entry["spread"], where);
  }
  for (const auto& [key, entry] : (json.contains("tables") ? json["tables"] : none).items()) {
    const std::string where = fmt::format("{}: table {}", file, key);
    const TableForm* const form = form_of(key);
    if (form == nullptr) {
      std::vector<std::string> known = optional_tables();
      for (const TableForm& t : kTables) known.emplace_back(t.name);
      throw UserError(fmt::format("{}: {}{}", file, unknown_name("table", key, known), made_by(entry)));
    }
    std::vector<std::vector<double>> points;
    try {
      points = entry.at("points").get<std::vector<std::vector<double>>>();
      model.tables[key] = {Table(key, form->kinds, form->axes, points),
                           parse_source(entry.at("source").get<std::string>(), where),
                           entry.at("where").get<std::string>()};
    } catch (const Json::exception&) {
      throw UserError(fmt::format("{} needs points (rows of numbers), source and where (texts)", where));
    } catch (const UserError& error) {
      throw UserError(fmt::format("{}: {}{}", file, error.what(), made_by(entry)));
    }
    if (!entry.contains("spread")) continue;
    if (!entry["spread"].is_array() || entry["spread"].size() != points.size())
      throw UserError(fmt::format("{}: spread has one entry a point", where));
    for (const Json& one : entry["spread"]) model.tables[key].spreads.push_back(*parse_spread(one, where));
  }
}

}  // namespace

const std::vector<std::string>& optional_figures() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all{"native_kernel_ns",
                                 "native_dram_bw",
                                 "native_context_bytes",
                                 "native_library_bytes",
                                 "native_communicator_bytes",
                                 "native_communicator_p2p_bytes",
                                 "native_peer_memory_bytes",
                                 "native_first_communicator_bytes",
                                 "native_first_p2p_bytes",
                                 "native_nvlink_bw",
                                 "native_idle_communicator_bytes",
                                 "native_all_to_all_beside_gather_slowdown",
                                 "copy_engine_all_gather_beside_exchange_slowdown"};
    // NCCL's memory between nodes; of emulated ones, which a cluster of such nodes takes over.
    for (const char* of : {"communicator", "pair", "p2p"})
      for (const char* network : {"native", "emulated"})
        all.push_back(fmt::format("{}_network_{}_bytes", network, of));
    // Of bytes that go to and from the host at once, those down: of one GPU, of all.
    for (const char* name : {"pcie_down_share", "root_down_share"}) all.emplace_back(name);
    // The CPUs' AdamW while all GPUs copy: its rate over that without; bytes copied for each of its own.
    for (const char* name : {"adam_beside_copies", "copies_beside_adam"}) all.emplace_back(name);
    // Of a GPU's power: the limit, what nothing draws, and what one kind of kernels draws at which clock, in
    // a row, among memory-bound ones and in bursts; products and memory-bound kernels by turns.
    for (const char* name :
         {"power_limit_w", "largest_clock_hz", "idle_power_w", "memory_bound_power_w", "link_power_w",
          "mixed_power_w", "mixed_matmul_share", "mixed_matmul_clock_hz", "mixed_memory_bound_clock_hz"})
      all.emplace_back(name);
    for (const char* kind : {"matmul", "deep_matmul", "grouped_matmul", "attention", "attention_forward",
                             "attention_backward", "narrow_attention_forward", "narrow_attention_backward"})
      for (const char* what : {"power_w", "clock_hz", "burst_clock_hz", "among_power_w", "among_clock_hz"})
        all.push_back(fmt::format("{}_{}", kind, what));
    for (const char* beside : {"native_all_gather", "native_reduce_scatter", "native_all_to_all",
                               "copy_engine_all_gather", "copy_engine_reduce_scatter", "host_copies"}) {
      for (const char* kernel : {"", "_matmul", "_grouped_matmul", "_attention", "_memory_bound"})
        all.push_back(fmt::format("{}{}_slowdown", beside, kernel));
      for (const char* kernel : {"grouped_matmul", "attention", "memory_bound"})
        all.push_back(fmt::format("{}_under_{}_slowdown", beside, kernel));
    }
    return all;
  }();
  return names;
}

const std::vector<std::string>& optional_tables() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const TableForm& form : kOptionalTables) all.emplace_back(form.name);
    return all;
  }();
  return names;
}

const char* name(Source source) {
  return source == Source::measured ? "measured" : source == Source::published ? "published" : "assumed";
}

double ClusterModel::operator[](const char* figure) const {
  const auto found = figures.find(figure);
  if (found == figures.end()) throw InternalError(fmt::format("cluster {} has no figure {}", name, figure));
  return found->second.value;
}

double ClusterModel::native(const char* figure) const {
  const auto found = figures.find(fmt::format("native_{}", figure));
  return found != figures.end() ? found->second.value : (*this)[figure];
}

const Table& ClusterModel::table(const char* table_name) const {
  const auto found = tables.find(table_name);
  if (found == tables.end()) throw InternalError(fmt::format("cluster {} has no table {}", name, table_name));
  return found->second.table;
}

std::vector<std::string> shipped_clusters() {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(data_home() / "hwmodels", error))
    if (entry.path().extension() == ".json") names.push_back(entry.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

std::filesystem::path cluster_file(const std::string& where) {
  std::filesystem::path path = where;
  if (where.find('/') != std::string::npos || path.extension() == ".json") return path;
  path = data_home() / "hwmodels" / (where + ".json");
  if (!std::filesystem::exists(path)) throw UserError(unknown_name("cluster", where, shipped_clusters()));
  return path;
}

ClusterModel read_cluster(const std::string& where) {
  const std::filesystem::path path = cluster_file(where);
  ClusterModel model;
  read_into(model, path, 0);
  for (const char* figure : kFigures)
    if (!model.figures.contains(figure))
      throw UserError(fmt::format("{}: figure {} is missing", path.string(), figure));
  for (const TableForm& form : kTables)
    if (!model.tables.contains(form.name))
      throw UserError(fmt::format("{}: table {} is missing", path.string(), form.name));
  for (const auto& [figure, entry] : model.figures)
    if (!may_be_zero(figure) && entry.value <= 0)
      throw UserError(fmt::format("{}: figure {} must be above zero", path.string(), figure));
  if (model["gpus_per_node"] != std::floor(model["gpus_per_node"]) || model["gpus_per_node"] > 1024)
    throw UserError(fmt::format("{}: figure gpus_per_node is {}: it must be a whole number up to 1024",
                                path.string(), model["gpus_per_node"]));
  return model;
}

}  // namespace mop::cluster
