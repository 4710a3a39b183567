// ClusterModel: nodes, GPUs, links, host memory, and measured cost tables, each figure with where it came
// from. It knows nothing of models or plans. One JSON file of hwmodels/ a cluster; a variant names its base
// and what differs.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sim/cluster/table.h"

namespace mop::cluster {

enum class Source : uint8_t { measured, published, assumed };
const char* name(Source source);

// The smallest and the largest of what was measured, over the value that the file gives.
struct Spread {
  double low = 1, high = 1;
};

// One number with its provenance. Units are in the name of the key: _flops FLOP/s, _bw bytes/s, _bytes, _ns,
// _share 0..1.
struct Figure {
  double value = 0;
  Source source = Source::assumed;
  std::string where;  // file, document or reason
  std::optional<Spread> spread = {};
};

// The figures that every cluster file has (hwmodels/README.md explains each). Errors for a missing one name
// it.
extern const std::vector<const char*> kFigures;
// Figures and tables that a file may have beside those: what mop calibrate measures of our own kernels
// (native_...), of collectives by copy engines, of what runs beside what, and of the host.
const std::vector<std::string>& optional_figures();
const std::vector<std::string>& optional_tables();

struct TableInfo {
  Table table;
  Source source = Source::assumed;
  std::string where;
  std::vector<Spread> spreads = {};  // none, or one a point of the file
};

struct ClusterModel {
  std::string name, description;
  std::map<std::string, Figure> figures;
  std::map<std::string, TableInfo> tables;

  double operator[](const char* figure) const;  // InternalError when there is none: the reader has checked
  const Table& table(const char* table_name) const;
  // What our own kernels reach: native_<figure> where it was measured, else the figure.
  double native(const char* figure) const;
  int64_t gpus_per_node() const { return static_cast<int64_t>((*this)["gpus_per_node"]); }
};

// A path, or a short name of hwmodels/. Errors: UserError naming the file and the field, or the nearest known
// cluster.
ClusterModel read_cluster(const std::string& where);
std::filesystem::path cluster_file(const std::string& where);  // the file that read_cluster reads first
std::vector<std::string> shipped_clusters();

}  // namespace mop::cluster
