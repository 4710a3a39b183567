#include "exec/calibrate/measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "exec/calibrate/benchmarks.h"
#include "sim/base/error.h"

namespace mop::calibrate {
namespace {

void run(Bench& bench, std::string_view family) {
  if (family == "memory") return memory(bench);
  if (family == "matmul") return matmul(bench);
  if (family == "grouped") return grouped(bench);
  if (family == "attention") return attention(bench);
  if (family == "kernels") return kernels_of_memory(bench);
  if (family == "launch") return launches(bench);
  if (family == "adam") return host_adam(bench);
  if (family == "collectives") return collectives(bench, false);
  if (family == "copy-engines") return copy_engines(bench);
  if (family == "copies") return host_copies(bench);
  if (family == "interference") return interference(bench);
  if (family == "power") return power(bench);
  if (family == "network") {
    memory_of_network(bench);
    return collectives(bench, true);
  }
  ensure(false, "every family has its benchmarks");
}

}  // namespace

Findings measure(const launch::Place& place, launch::Peers& peers, const std::vector<std::string>& names,
                 bool emulated, const std::function<void(size_t done, size_t total)>& before) {
  std::vector<const Family*> chosen;
  for (const Family& family : families())
    if (family.emulated == emulated && std::ranges::find(names, family.name) != names.end())
      chosen.push_back(&family);
  Bench bench(place, peers);
  try {
    for (size_t i = 0; i < chosen.size(); ++i) {
      before(i, chosen.size());
      bench.begin(*chosen[i]);
      const auto begin = std::chrono::steady_clock::now();
      run(bench, chosen[i]->name);
      bench.findings().seconds[chosen[i]->name] =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
  } catch (const std::exception& error) {
    // Here, while everything is still there: what hangs in NCCL would hang in the course of an exception,
    // too.
    if (peers.size() > 1)
      peers.abandon(error.what(), dynamic_cast<const UserError*>(&error) != nullptr ? 2 : 1);
    throw;
  }
  return std::move(bench.findings());
}

std::vector<std::pair<std::string, std::string>> emulated_host(int rank, int ranks) {
  return {{"NCCL_HOSTID", rank < ranks / 2 ? "mop-calibrate-first" : "mop-calibrate-second"},
          {"NCCL_SOCKET_IFNAME", "lo"},
          {"NCCL_IB_DISABLE", "1"}};
}

}  // namespace mop::calibrate
