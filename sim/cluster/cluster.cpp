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

void read_into(ClusterModel& model, const std::filesystem::path& path, int depth) {
  if (depth > 8) throw UserError(fmt::format("{}: 'base' goes round in a circle", path.string()));
  const Json json = load(path);
  const std::string file = path.string();
  if (json.contains("base")) {
    if (!json["base"].is_string()) throw UserError(fmt::format("{}: 'base' is not a text", file));
    read_into(model, path.parent_path() / (json["base"].get<std::string>() + ".json"), depth + 1);
  }
  model.name = path.stem().string();
  if (json.contains("description") && !json["description"].is_string())
    throw UserError(fmt::format("{}: 'description' is not a text", file));
  model.description = json.value("description", std::string());
  const Json none = Json::object();
  for (const char* section : {"figures", "tables"})
    if (json.contains(section) && !json[section].is_object())
      throw UserError(fmt::format("{}: '{}' is not an object of names", file, section));
  for (const auto& [key, entry] : (json.contains("figures") ? json["figures"] : none).items()) {
    const std::string where = fmt::format("{}: figure {}", file, key);
    if (std::none_of(kFigures.begin(), kFigures.end(), [&](const char* f) { return key == f; }))
      throw UserError(fmt::format(
          "{}: {}", file,
          unknown_name("figure", key, std::vector<std::string>(kFigures.begin(), kFigures.end()))));
    if (!entry.is_object() || !entry.contains("value") || !entry["value"].is_number() ||
        !entry.contains("source") || !entry["source"].is_string() || !entry.contains("where") ||
        !entry["where"].is_string())
      throw UserError(fmt::format("{} needs value (a number), source and where (texts)", where));
    const double value = entry["value"].get<double>();
    if (!std::isfinite(value) || value < 0)
      throw UserError(fmt::format("{} is {}: not a usable number", where, value));
    model.figures[key] = {value, parse_source(entry["source"].get<std::string>(), where),
                          entry["where"].get<std::string>()};
  }
  for (const auto& [key, entry] : (json.contains("tables") ? json["tables"] : none).items()) {
    const std::string where = fmt::format("{}: table {}", file, key);
    const auto form =
        std::find_if(kTables.begin(), kTables.end(), [&](const TableForm& t) { return key == t.name; });
    if (form == kTables.end()) {
      std::vector<std::string> known;
      for (const TableForm& t : kTables) known.emplace_back(t.name);
      throw UserError(fmt::format("{}: {}", file, unknown_name("table", key, known)));
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
      throw UserError(fmt::format("{}: {}", file, error.what()));
    }
  }
}

}  // namespace

const char* name(Source source) {
  return source == Source::measured ? "measured" : source == Source::published ? "published" : "assumed";
}

double ClusterModel::operator[](const char* figure) const {
  const auto found = figures.find(figure);
  if (found == figures.end()) throw InternalError(fmt::format("cluster {} has no figure {}", name, figure));
  return found->second.value;
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

ClusterModel read_cluster(const std::string& where) {
  std::filesystem::path path = where;
  if (where.find('/') == std::string::npos && path.extension() != ".json") {
    path = data_home() / "hwmodels" / (where + ".json");
    if (!std::filesystem::exists(path)) throw UserError(unknown_name("cluster", where, shipped_clusters()));
  }
  ClusterModel model;
  read_into(model, path, 0);
  for (const char* figure : kFigures)
    if (!model.figures.contains(figure))
      throw UserError(fmt::format("{}: figure {} is missing", path.string(), figure));
  for (const TableForm& form : kTables)
    if (!model.tables.contains(form.name))
      throw UserError(fmt::format("{}: table {} is missing", path.string(), form.name));
  // Only what is added to something may be zero; the rest divides.
  for (const char* figure : kFigures) {
    const std::string_view name = figure;
    const bool added = name.ends_with("_ns") || name == "context_bytes" || name == "library_bytes" ||
                       name.starts_with("communicator_");
    if (!added && model[figure] <= 0)
      throw UserError(fmt::format("{}: figure {} must be above zero", path.string(), figure));
  }
  if (model["gpus_per_node"] != std::floor(model["gpus_per_node"]) || model["gpus_per_node"] > 1024)
    throw UserError(fmt::format("{}: figure gpus_per_node is {}: it must be a whole number up to 1024",
                                path.string(), model["gpus_per_node"]));
  return model;
}

}  // namespace mop::cluster
