#include "exec/cli/calibrate.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "exec/calibrate/cluster_file.h"
#include "exec/calibrate/families.h"
#ifdef MOP_CUDA
#include "exec/calibrate/measure.h"
#include "kernels/fallback.h"
#endif
#include "exec/launch/peers.h"
#include "exec/launch/place.h"
#include "exec/launch/spawn.h"
#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cli/text.h"
#include "sim/cluster/cluster.h"

namespace mop::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

std::string read(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

// What a folder has of one calibration: what each set of processes found, and the provenance.
constexpr const char *kOneHost = "host.json", *kTwoHosts = "two-hosts.json", *kProvenance = "provenance.json";

// A folder for what the processes found, that goes with the object unless it is kept.
class Exchange {
 public:
  Exchange() : path_((fs::temp_directory_path() / "mop-calibrate-XXXXXX").string()) {
    if (mkdtemp(path_.data()) == nullptr)
      throw UserError(fmt::format("no folder can be made in {}; set TMPDIR to one that can be written",
                                  fs::temp_directory_path().string()));
  }
  ~Exchange() {
    std::error_code ignored;
    if (!kept_) fs::remove_all(path_, ignored);
  }
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;
  std::string file(bool emulated) const { return path_ + "/" + (emulated ? kTwoHosts : kOneHost); }
  const std::string& keep(const calibrate::Provenance& provenance) {
    kept_ = true;
    std::ofstream(path_ + "/" + kProvenance) << calibrate::to_json(provenance);
    return path_;
  }

 private:
  std::string path_;
  bool kept_ = false;
};

struct Calibrate {
  const Invocation& invocation;
  int64_t gpus = 0;
  std::string base = "h200x4", out, only, from, format = "table";
  std::string found;      // of a process that this command started: where process 0 leaves what was found
  bool emulated = false;  // and whether it is of the set that stands for two hosts

  Calibrate(CLI::App& command, const Invocation& call) : invocation(call) {
    command.add_option("--gpus", gpus, "GPUs of this host, a process each; nothing else may run on them")
        ->type_name("N");
    command
        .add_option("--base", base,
                    "cluster that has what is not measured: published figures, PyTorch's own, networks")
        ->type_name("NAME|FILE")
        ->default_str(base);
    command.add_option("--out", out, "cluster file to write, such as hwmodels/mine.json")->type_name("FILE");
    command.add_option("--only", only, "some of what is listed below; else all")->type_name("NAME,...");
    command
        .add_option("--from", from,
                    "folder in which a calibration kept what it measured when its file could not be written: "
                    "write that, measure nothing")
        ->type_name("FOLDER");
    command.add_option("--format", format, "of the answer")->type_name("table|json")->default_str(format);
    command.add_option("--found", found)->group("");
    command.add_flag("--emulated", emulated)->group("");
    std::string names;
    for (const calibrate::Family& family : calibrate::families())
      names += fmt::format("  {:<13} {}\n", family.name, family.what);
    command.footer(names +
                   "Micro-benchmarks of our own kernels, NCCL, copies and the CPU's optimizer, on all GPUs "
                   "at once; never a step.\n"
                   "Every figure is the median over repeats, of kernels and collectives that of the slowest "
                   "GPU, with its spread.\n"
                   "What takes too long is left out, and said.\n"
                   "Example:\n"
                   "  mop calibrate --gpus 4 --out hwmodels/mine.json\n"
                   "  mop calibrate --gpus 8 --base h200 --out hwmodels/mine.json --only "
                   "collectives,copy-engines,interference");
  }

  void run() {
    const std::optional<launch::Place> place =
        launch::place_of([](const char* name) -> const char* { return std::getenv(name); });
    const std::vector<std::string> names = calibrate::parse_families(only);
    if (format != "table" && format != "json")
      throw UserError(fmt::format("--format is '{}'; write table or json", format));
    if (!from.empty() && (gpus != 0 || !only.empty()))
      throw UserError("--from writes all that was measured before; leave out --gpus and --only");
    if (from.empty() && gpus < 1)
      throw UserError(gpus == 0 ? "no GPUs are given; write --gpus N, for all of this host"
                                : fmt::format("--gpus is {}; at least one is needed", gpus));
    if (gpus > 1024) throw UserError(fmt::format("--gpus is {}, more than a host has", gpus));
    if (gpus == 1 && !calibrate::any_of(names, false))
      throw UserError("two emulated hosts need two GPUs; write --gpus 2 or more");
    if (out.empty()) throw UserError("no file is given; write --out FILE, such as hwmodels/mine.json");
    if (!out.ends_with(".json"))
      throw UserError(fmt::format("--out is '{}'; names of cluster files end in .json", out));
    if (const fs::path folder = fs::path(out).parent_path(); !folder.empty() && !fs::is_directory(folder))
      throw UserError(fmt::format("--out is '{}', in a folder that is not there; create it first", out));
    cluster::read_cluster(base);
    if (!from.empty()) return write_kept();
#ifdef MOP_CUDA
    if (!found.empty() && place) return measure(*place, names);
    if (place && place->size > 1)
      throw UserError(
          fmt::format("mop calibrate starts its own processes; run it once, without {}", place->launcher));
    answer(names);
#else
    (void)place;
    throw UserError(
        "mop calibrate measures GPUs, and this build has no CUDA: install the CUDA toolkit, run ./setup and "
        "build again");
#endif
  }

  // What an earlier calibration kept.
  void write_kept() const {
    const fs::path folder = from;
    calibrate::Findings findings;
    for (const char* name : {kOneHost, kTwoHosts})
      if (fs::exists(folder / name)) findings.add(part(folder / name, calibrate::from_json));
    if (findings.figures.empty() && findings.tables.empty())
      throw UserError(
          fmt::format("--from is '{}', and nothing that a calibration measured is there ({} or {})", from,
                      kOneHost, kTwoHosts));
    if (!fs::exists(folder / kProvenance))
      throw UserError(fmt::format("--from is '{}', and {} is not there: where and when it was measured", from,
                                  kProvenance));
    write(findings, part(folder / kProvenance, calibrate::provenance_from_json));
  }

  template <class T>
  static T part(const fs::path& path, T (*parse)(const std::string&)) {
    try {
      return parse(read(path));
    } catch (const InternalError& error) {
      throw UserError(fmt::format("{} is not what a calibration kept: {}", path.string(), error.what()));
    }
  }

  void write(const calibrate::Findings& findings, const calibrate::Provenance& provenance) const {
    calibrate::write_cluster_file(out,
                                  calibrate::cluster_file(cluster::cluster_file(base), findings, provenance));
    if (!findings.cut_short.empty())
      fmt::print(stderr, "mop: there was no time for all of: {}\n", fmt::join(findings.cut_short, ", "));
    fmt::print("{}", format == "json" ? json(findings, provenance) : table(findings, provenance));
  }

#ifdef MOP_CUDA
  // One of the processes.
  void measure(const launch::Place& place, const std::vector<std::string>& names) const {
    const std::unique_ptr<launch::Peers> peers = launch::connect(place);
    try {
      std::optional<Progress> progress;
      if (place.rank == 0) {
        progress.emplace(emulated ? "measuring two emulated hosts" : "measuring");
        kernels::warn_of_fallbacks(
            [](const std::string& path) { fmt::print(stderr, "mop: warning: {}\n", path); });
      }
      const calibrate::Findings findings =
          calibrate::measure(place, *peers, names, emulated, [&](size_t done, size_t total) {
            if (progress) progress->show(done, total);
          });
      progress.reset();
      if (place.rank != 0) return;
      std::ofstream file(found);
      file << calibrate::to_json(findings);
      file.close();
      if (!file) throw UserError(fmt::format("{} cannot be written; is the disk full?", found));
    } catch (const std::exception& error) {
      peers->abandon(error.what(), dynamic_cast<const UserError*>(&error) != nullptr ? 2 : 1);
    }
  }

  calibrate::Findings of_processes(const Exchange& exchange, bool two_hosts) const {
    std::vector<std::string> words = invocation.words;
    words.insert(words.end(), {"--found", exchange.file(two_hosts)});
    if (two_hosts) words.emplace_back("--emulated");
    const auto ranks = static_cast<int>(gpus);
    const int status = launch::spawn(ranks, words, std::chrono::seconds(30), [&](int rank) {
      return two_hosts ? calibrate::emulated_host(rank, ranks) : launch::Environment();
    });
    if (status != 0) throw Ended{status};
    return calibrate::from_json(read(exchange.file(two_hosts)));
  }

  void answer(const std::vector<std::string>& names) const {
    fmt::print(stderr, "mop: measuring {} on {} GPUs, {} at most\n", fmt::join(names, ", "), gpus,
               format_seconds(calibrate::longest(names, static_cast<int>(gpus))));
    const auto begin = std::chrono::steady_clock::now();
    calibrate::Provenance provenance = calibrate::provenance_of_this_host();
    provenance.command = invocation.command_line;
    provenance.gpus = static_cast<int>(gpus);
    Exchange exchange;
    calibrate::Findings findings;
    if (calibrate::any_of(names, false)) findings.add(of_processes(exchange, false));
    if (calibrate::any_of(names, true) && gpus > 1) {
      try {
        findings.add(of_processes(exchange, true));
      } catch (const Ended&) {  // its processes have said why, and nothing is priced by what they measure
        if (findings.figures.empty() && findings.tables.empty()) throw;
        findings.cut_short.emplace_back("network");
      }
    }
    provenance.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    try {
      write(findings, provenance);
    } catch (const UserError& error) {
      const std::string& kept = exchange.keep(provenance);
      throw UserError(
          fmt::format("{}; what was measured is in {}: write it with --from {}", error.what(), kept, kept));
    }
  }
#endif

  static std::string range(const calibrate::Reading& r) {
    return fmt::format("{:+.1f} .. {:+.1f} %", 100 * (r.low - 1), 100 * (r.high - 1));
  }

  std::string table(const calibrate::Findings& findings, const calibrate::Provenance& p) const {
    TextTable figures({"figure", "value", "spread", "what"}, "lrrl"),
        tables({"table", "points", "what"}, "lrl");
    for (const auto& [name, figure] : findings.figures)
      figures.add({name, fmt::format("{:.6g}", figure.reading.value), range(figure.reading), figure.what});
    for (const auto& [name, table] : findings.tables)
      tables.add({name, std::to_string(table.points.size()), table.what});
    std::vector<std::string> families;
    for (const auto& [name, seconds] : findings.seconds)
      families.push_back(fmt::format("{} {:.1f}", name, seconds));
    return fmt::format("{}\n{}\n{}, {}; {} s ({}); written to {}\n", figures.text(), tables.text(),
                       findings.machine, findings.libraries, std::lround(p.seconds),
                       fmt::join(families, ", "), out);
  }

  std::string json(const calibrate::Findings& findings, const calibrate::Provenance& p) const {
    Json answer{{"file", out},
                {"machine", findings.machine},
                {"libraries", findings.libraries},
                {"date", p.date},
                {"gpus", p.gpus},
                {"seconds", p.seconds},
                {"family_seconds", findings.seconds},
                {"cut_short", findings.cut_short},
                {"figures", Json::object()},
                {"tables", Json::object()}};
    for (const auto& [name, figure] : findings.figures)
      answer["figures"][name] = {
          {"value", figure.reading.value}, {"low", figure.reading.low}, {"high", figure.reading.high}};
    for (const auto& [name, table] : findings.tables) answer["tables"][name] = table.points.size();
    return answer.dump(2) + "\n";
  }
};

}  // namespace

void add_calibrate(CLI::App& program, const Invocation& invocation) {
  CLI::App* command =
      program.add_subcommand("calibrate", "measure this host's GPUs for predictions, by micro-benchmarks");
  const auto calibrate = std::make_shared<Calibrate>(*command, invocation);
  command->callback([calibrate] { calibrate->run(); });
}

}  // namespace mop::cli
