// ClusterModel: nodes, GPUs, links, host memory, and measured cost tables, each figure with where it came
// from. It knows nothing of models or plans. One JSON file of hwmodels/ a cluster; a variant names its base
// and what differs.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "sim/cluster/table.h"

namespace mop::cluster {

enum class Source : uint8_t { measured, published, assumed };
const char* name(Source source);

// One number with its provenance. Units are in the name of the key: _flops FLOP/s, _bw bytes/s, _bytes, _ns,
// _share 0..1.
struct Figure {
  double value = 0;
  Source source = Source::assumed;
  std::string where;  // file, document or reason
};

// The figures that every cluster file has (hwmodels/README.md explains each). Errors for a missing one name
// it.
extern const std::vector<const char*> kFigures;

struct TableInfo {
  Table table;
  Source source = Source::assumed;
  std::string where;
};

struct ClusterModel {
  std::string name, description;
  std::map<std::string, Figure> figures;
  std::map<std::string, TableInfo> tables;

  double operator[](const char* figure) const;  // InternalError when there is none: the reader has checked
  const Table& table(const char* table_name) const;
  int64_t gpus_per_node() const { return static_cast<int64_t>((*this)["gpus_per_node"]); }
};

// A path, or a short name of hwmodels/. Errors: UserError naming the file and the field, or the nearest known
// cluster.
ClusterModel read_cluster(const std::string& where);
std::vector<std::string> shipped_clusters();

}  // namespace mop::cluster
