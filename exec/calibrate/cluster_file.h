// A cluster file of hwmodels/ from what was measured and a base that has the rest.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "exec/calibrate/findings.h"

namespace mop::calibrate {

struct Provenance {
  std::string host, kernel, cpu, date;   // "2026-11-22 08:45 UTC"
  std::vector<std::string> environment;  // NCCL's variables, "NCCL_NVLS_ENABLE=0"
  std::string command;
  int gpus = 0;
  double seconds = 0;  // that it took
};
Provenance provenance_of_this_host();  // host, kernel, cpu, date, environment
std::string to_json(const Provenance& provenance);
// Errors: InternalError for text that to_json has not made.
Provenance provenance_from_json(const std::string& text);

// Every figure and table of the base and of its own base, with their own provenance; what was measured stands
// for that of the same name, with its spread. The base is a file that cluster::read_cluster reads. Errors:
// UserError.
std::string cluster_file(const std::filesystem::path& base, const Findings& findings,
                         const Provenance& provenance);

// Appears whole or not at all, and is a cluster that can be read. Errors: UserError for a place that cannot
// be written.
void write_cluster_file(const std::filesystem::path& path, const std::string& text);

}  // namespace mop::calibrate
